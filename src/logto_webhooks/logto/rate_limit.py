"""How many requests Logto gets: evenly let in, a few at a time, in the order of asking."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

AT_ONCE: Final = 4


class RateLimiter:
    """At most so many requests in any second, token requests included."""

    def __init__(
        self,
        per_second: float,
        sleep: Callable[[float], Awaitable[None]],
        monotonic: Callable[[], float],
    ) -> None:
        self._gap = 1 / per_second
        self._sleep = sleep
        self._monotonic = monotonic
        self._next = monotonic()
        self._places = asyncio.Semaphore(AT_ONCE)
        self._line = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait in line, then hold one of the places."""
        async with self._places:
            async with self._line:
                wait = self._next - self._monotonic()
                if wait > 0:
                    await self._sleep(wait)
                # From when it is really let in: who wakes late doesn't crowd the next.
                self._next = self._monotonic() + self._gap
            yield
