"""Time in tests: moments to date deliveries by, and a clock that stands still."""

from __future__ import annotations

import time
from typing import Final

# An application that starts after its deliveries were made must still be older than they are.
_AHEAD_MS: Final = 5_000
_APART_MS: Final = 120  # with less, a change of a part would be in doubt


class Moments:
    """The time of Logto, as `make` tells it: from now on, in milliseconds since the epoch. Its
    moments are far enough apart to have an order."""

    def __init__(self) -> None:
        self.last = 0

    def now(self) -> int:
        """Return the present, which is never before a moment of the past."""
        return max(time.time_ns() // 1_000_000 + _AHEAD_MS, self.last)

    def next(self) -> int:
        """Return a moment after all earlier ones."""
        self.last = max(self.now(), self.last + _APART_MS)
        return self.last


MOMENTS: Final = Moments()


class FrozenClock:
    """A clock that moves only when you move it. `now` is in milliseconds since the epoch, by
    default the time that `make` gives to the next delivery."""

    def __init__(self, now: int | None = None) -> None:
        self.ahead_ms = 0
        self._now = MOMENTS.next() if now is None else now

    def now(self) -> int:
        """Return the clock's time."""
        return self._now

    def tick(self, seconds: float) -> None:
        """Move the clock by `seconds`."""
        self._now += round(seconds * 1000)
