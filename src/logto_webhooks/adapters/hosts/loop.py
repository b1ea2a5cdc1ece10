"""The loop host: an asynchronous engine, on the running event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from logto_webhooks.adapters.hosts.failures import translated
from logto_webhooks.core.ports import Store

T = TypeVar("T")


class LoopHost:
    """Runs the very same work as the thread host, by `AsyncConnection.run_sync`."""

    def __init__(self, engine: AsyncEngine, bind: Callable[[sa.Connection], Store]) -> None:
        self._engine = engine
        self._bind = bind

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for what the database says."""
        with translated():
            async with self._engine.begin() as connection:
                return await connection.run_sync(lambda sync: work(self._bind(sync)))

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing."""
        with translated():
            async with self._engine.connect() as connection:
                return await connection.run_sync(lambda sync: work(self._bind(sync)))

    async def close(self) -> None:
        """Close the connections."""
        await self._engine.dispose()
