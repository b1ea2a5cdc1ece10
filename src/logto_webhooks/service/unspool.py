"""Storing what was spooled, as soon as the database takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from logto_webhooks.core.delivery import Delivery
from logto_webhooks.core.ports import Host, Observer
from logto_webhooks.core.reports import NotUnspooled, Unspooled
from logto_webhooks.errors import NotADelivery, RowRejected, StoreUnavailable

LOOK_S: Final = 1.0
MAX_ROWS: Final = 512
MAX_BYTES: Final = 16 * 2**20


class Spool(Protocol):
    """Deliveries on disk, by name."""

    def oldest(self, limit: int, max_bytes: int) -> list[str]:
        """Name those that were received first: as many as fit, at least one."""

    def read(self, name: str) -> Delivery | None:
        """Read one; None if another process has stored it. Raises OSError, NotADelivery."""

    def remove(self, names: Sequence[str]) -> None:
        """Remove what is stored by now. Raises OSError."""

    def set_aside(self, name: str) -> None:
        """Rename what can't be stored. Raises OSError."""


class Unspooler:
    """Moves deliveries from the spool to the inbox, the oldest first."""

    def __init__(
        self, spool: Spool, host: Host, observe: Observer, stored: Callable[[], None]
    ) -> None:
        """`stored` is called when the inbox got something."""
        self._spool = spool
        self._host = host
        self._observe = observe
        self._stored = stored

    async def keep(self) -> None:
        """Look again and again; what can't be stored now is tried again."""
        while True:
            try:
                while await self.turn():
                    pass
            except (StoreUnavailable, OSError):
                pass  # it waits in the spool, which `status` counts
            await asyncio.sleep(LOOK_S)

    async def turn(self) -> int:
        """Store some; return how many. Raises StoreUnavailable, OSError."""
        names = await asyncio.to_thread(self._spool.oldest, MAX_ROWS, MAX_BYTES)
        found: list[tuple[str, Delivery]] = []
        for name in names:
            try:
                delivery = await asyncio.to_thread(self._spool.read, name)
            except NotADelivery as error:
                self._refuse(name, str(error))
            else:
                if delivery is not None:
                    found.append((name, delivery))
        return await self._store(found)

    async def _store(self, found: Sequence[tuple[str, Delivery]]) -> int:
        if not found:
            return 0
        deliveries = [delivery for _, delivery in found]
        try:
            await self._host.run(lambda store: store.add(deliveries))
        except RowRejected as error:
            if len(found) == 1:
                self._refuse(found[0][0], str(error))
                return 1
            # One bad row harms nobody else: halve until it is alone.
            middle = len(found) // 2
            return await self._store(found[:middle]) + await self._store(found[middle:])
        await asyncio.to_thread(self._spool.remove, [name for name, _ in found])
        self._observe(Unspooled(len(found)))
        self._stored()
        return len(found)

    def _refuse(self, name: str, problem: str) -> None:
        self._spool.set_aside(name)
        self._observe(NotUnspooled(name, problem))
