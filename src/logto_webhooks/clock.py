"""The clock, in milliseconds since the epoch."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Returns the time. `ahead_ms` is how far Logto's clock is known to be ahead of it (ms)."""

    ahead_ms: int

    def now(self) -> int:
        """Return the milliseconds since the epoch."""


class SystemClock:
    """The machine's clock."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def now(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000


def to_iso(at: int) -> str:
    """Write milliseconds since the epoch as a date and time, to the second."""
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="seconds")
