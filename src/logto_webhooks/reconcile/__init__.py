"""Compare with Logto: recover, refetch, reconcile."""

from collections.abc import Callable

from logto_webhooks.errors import describe
from logto_webhooks.instrumentation import ApiUnavailable, Observer


def report_to(observe: Observer, wait_s: float) -> Callable[[Exception], float]:
    """Return what reports an error of a loop, and lets it wait for so long."""

    def report(error: Exception) -> float:
        observe(ApiUnavailable(describe(error), wait_s))
        return wait_s

    return report
