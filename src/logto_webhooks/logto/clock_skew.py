"""Place answers of the Management API on Logto's clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from logto_webhooks.clock import Clock
from logto_webhooks.database.store import TransactionRunner
from logto_webhooks.deliveries import ReceivedBody, estimate_ahead
from logto_webhooks.event_loop import forever
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import SECOND_MS, ApiResponse, Span

RECENT: Final = 50  # deliveries that tell how far apart the clocks are
LOOK_S: Final = 60.0

SpanClock = Callable[[ApiResponse], Span]


async def make_span_clock(host: TransactionRunner) -> SpanClock:
    """Return what tells an answer's span. Raises StoreUnavailable.

    Who asks later asks no earlier: so no answer is older than the one before, however long it
    took; else the users of a slow page would look as if they hadn't been listed at all. But no
    answer is of later than a second after its own date.
    """
    known = await host.read(lambda store: store.clocks(RECENT))
    recent = [
        ReceivedBody(b"", delivery.occurred_at, delivery.received_at)
        for delivery in known.recent
        if delivery.believed
    ]
    latest = 0

    def when(answered: ApiResponse) -> Span:
        nonlocal latest
        span = api_responses.read_span(answered, recent)
        latest = max(latest, span.at)
        at = latest if answered.date is None else min(latest, answered.date + SECOND_MS)
        return Span(at, max(at, span.end))

    return when


class Ahead:
    """Knows how far Logto's clock is ahead of ours (ms): by that, deliveries are believed."""

    def __init__(self, host: TransactionRunner, clock: Clock) -> None:
        self._host = host
        self._clock = clock
        self._ahead = 0

    def __call__(self) -> int:
        """Return what the last look found."""
        return self._ahead

    async def keep(self) -> None:
        """Look now, and every minute. While the database can't be reached, nothing changes."""
        await forever(self.look, LOOK_S)

    async def look(self) -> None:
        """Compare the clocks. Raises StoreUnavailable."""
        known = await self._host.read(lambda store: store.clocks(RECENT))
        self._ahead = estimate_ahead(self._clock.now(), known)
