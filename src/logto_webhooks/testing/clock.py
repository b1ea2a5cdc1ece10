"""A clock that stands still until it is told to go on."""

from __future__ import annotations


class FrozenClock:
    """A Clock; `now` is in milliseconds since the epoch."""

    def __init__(self, now: int = 1_795_485_335_924) -> None:
        self._now = now

    def now(self) -> int:
        """Return the time at which it stands."""
        return self._now

    def tick(self, seconds: float) -> None:
        """Go on by `seconds`."""
        self._now += round(seconds * 1000)
