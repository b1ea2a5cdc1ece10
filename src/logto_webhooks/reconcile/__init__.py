"""Compare with Logto: recover, refetch, reconcile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from logto_webhooks.errors import LogtoApiError, LogtoUnreachable, describe
from logto_webhooks.instrumentation import ApiUnavailable, Observer

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

# Errors that a request about one record may raise although Logto answers other requests.
REFUSALS: Final = (LogtoUnreachable, LogtoApiError)


async def is_answering(logto: ManagementClient) -> bool:
    """Whether Logto answers a request that isn't about a record."""
    try:
        await anext(logto.webhooks(), None)
    except REFUSALS:
        return False
    return True


def report_to(observe: Observer, wait_s: float) -> Callable[[Exception], float]:
    """Return a function that reports an error of a loop, and returns how long the loop waits."""

    def report(error: Exception) -> float:
        observe(ApiUnavailable(describe(error), wait_s))
        return wait_s

    return report
