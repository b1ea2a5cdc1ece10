"""The host of the store in memory: one at a time, rolled back on an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from logto_webhooks.core.ports import Store

T = TypeVar("T")


class MemoryHost:
    """Runs work at once, on the caller's thread."""

    def __init__(self, open_store: Callable[[], tuple[Store, Callable[[], None]]]) -> None:
        """`open_store` gives a store, and what undoes all that is done on it from now on."""
        self._open = open_store

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run; undo what was done if it raises."""
        store, undo = self._open()
        try:
            return work(store)
        except BaseException:
            undo()
            raise

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run."""
        return await self.run(work)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run."""
        store, _ = self._open()
        return work(store)

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """No kind of transaction: handlers that ask for one are refused."""
        return ()

    async def handle(
        self, wish: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with nothing to give, for none can be asked for."""
        raise LookupError(f"there is no {wish.__name__} in memory")

    async def close(self) -> None:
        """Nothing is held."""
