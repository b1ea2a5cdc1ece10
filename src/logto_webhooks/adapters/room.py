"""Room for the bodies that are in flight: who comes when there is none waits in line."""

from __future__ import annotations

import asyncio
from collections import deque


class Room:
    """So many bytes; who takes some of them gives them back."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> int:
        """Wait until there is room, and those before have theirs; return what to give back."""
        wanted = min(size, self._total)
        if self._waiting or wanted > self._free:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((wanted, turn))
            await self._wait(wanted, turn)
        else:
            self._free -= wanted
        return wanted

    async def _wait(self, wanted: int, turn: asyncio.Future[None]) -> None:
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(wanted)  # it came just as the caller went
            raise

    def give_back(self, size: int) -> None:
        """Let the next ones in."""
        self._free += size
        while self._waiting:
            wanted, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
            elif wanted <= self._free:
                self._waiting.popleft()
                self._free -= wanted
                turn.set_result(None)
            else:
                break
