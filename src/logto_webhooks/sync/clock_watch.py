"""Notice that the database's clock was set back, and move due times along with it."""

from __future__ import annotations

import time
from typing import Final

from logto_webhooks.database.store import TransactionRunner
from logto_webhooks.errors import TimedOut
from logto_webhooks.instrumentation.events import ClockSetBack, Observer

LOOK_S: Final = 2.0
SLACK_MS: Final = 1_000  # what clocks of several servers, or a small correction, may differ
NOTE_MS: Final = 60_000


class ClockWatch:
    """Looks at the database's clock."""

    def __init__(self, host: TransactionRunner, observe: Observer) -> None:
        self._host = host
        self._observe = observe
        self._looked_at: float | None = None  # monotonic
        self._seen = 0  # what the database's clock said then
        self._moved = 0  # by how much due times had been moved by then, by whomever

    async def look(self) -> None:
        """Compare, if that is due; mend what must be. Raises StoreUnavailable."""
        asked_at = time.monotonic()
        if self._looked_at is not None and asked_at - self._looked_at < LOOK_S:
            return
        told = await self._host.read(lambda store: store.clock())
        # From the end of one look to the beginning of the next: so much passed at least, however
        # long each of them waited for its answer.
        passed_ms = 0 if self._looked_at is None else int((asked_at - self._looked_at) * 1000)
        moved_ms = max(0, told.moved - self._moved)  # by somebody else, since the last look
        expected = self._seen + passed_ms - moved_ms if self._seen else 0
        expected = max(expected, told.noted, told.installed)
        self._looked_at, self._seen, self._moved = time.monotonic(), told.now, told.moved
        back_ms = expected - told.now
        try:
            if back_ms > SLACK_MS:
                await self._host.run(lambda store: store.set_clock_back(back_ms, told.moved))
                self._moved += back_ms
                self._observe(ClockSetBack(back_ms / 1000))
            elif told.due_too_late or told.now - told.noted >= NOTE_MS:
                await self._host.run(lambda store: store.set_clock_back(0, told.moved))
        except TimedOut:  # something is locked: found again by the next look
            self._seen = expected
