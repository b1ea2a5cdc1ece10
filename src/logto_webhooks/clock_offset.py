"""Estimate how far Logto's clock is ahead of ours, from recent deliveries."""

from __future__ import annotations

from statistics import median_low

from msgspec import Struct


class Dated(Struct, frozen=True):
    """How one delivery is dated, in milliseconds since the epoch: by Logto, by the inbox (another
    date where Logto's can't be believed), and when it was received."""

    created_at: int
    occurred_at: int
    received_at: int
    origin: str = "webhook"

    @property
    def believed(self) -> bool:
        """Whether the inbox took Logto's own date."""
        return self.created_at == self.occurred_at


class Clocks(Struct, frozen=True):
    """The database's clock, and how the newest deliveries are dated."""

    now: int
    recent: list[Dated]


def ahead(ours: int, clocks: Clocks) -> int:
    """Return how far Logto's clock is ahead of ours (ms), by which a new delivery is judged.

    It is the distance to the database's clock, plus the median of how far recent deliveries are
    dated ahead of that. One delivery alone doesn't shift the median. Dates in the past don't
    count: most often they are of deliveries that were held up or sent again.
    """
    database = clocks.now - ours
    offsets = [
        each.created_at - each.received_at - database
        for each in clocks.recent
        if each.origin == "webhook"
    ]
    return database + max(0, median_low([0, *offsets]))
