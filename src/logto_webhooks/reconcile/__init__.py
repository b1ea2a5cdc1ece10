"""Compare with Logto: recover, refetch, reconcile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from logto_webhooks.batch_sizes import cut_by_size
from logto_webhooks.errors import LogtoApiError, LogtoUnreachable, describe
from logto_webhooks.instrumentation import ApiUnavailable, Observer
from logto_webhooks.records.record import ApiRead, Change

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

# Errors that a request about one record may raise although Logto answers other requests.
REFUSALS: Final = (LogtoUnreachable, LogtoApiError)

PIECE_BYTES: Final = 2 * 2**20  # of Logto's answers per transaction: about 0.1 s


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


def cut_changes(changes: Sequence[Change]) -> list[Sequence[Change]]:
    """Cut changes into pieces that take a short transaction each, unless one alone is larger. This
    takes time if they are large, so call it in a thread."""
    sizes = [
        len(msgspec.json.encode(change.contents)) if isinstance(change, ApiRead) else 0
        for change in changes
    ]
    return list(cut_by_size(changes, sizes, PIECE_BYTES))
