"""The loop host: an asynchronous engine, on the running event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from logto_webhooks.adapters.hosts.failures import translated
from logto_webhooks.adapters.hosts.sessions import (
    SESSION,
    SYNC,
    end_sync,
    kept,
    no_session,
    room_in,
    sync_wish,
    translated_as,
    undone,
    untranslated,
)
from logto_webhooks.core.ports import Store
from logto_webhooks.service.aside import Aside

T = TypeVar("T")


class LoopHost:
    """Runs the very same work as the thread host, by `AsyncConnection.run_sync`."""

    def __init__(
        self,
        engine: AsyncEngine,
        bind: Callable[[sa.Connection], Store],
        owns: bool = True,
        theirs: Any = None,
    ) -> None:
        """`owns`: whether to dispose of the engine at the end; `theirs`: the application's
        `translation`."""
        self._engine = engine
        self._bind = bind
        self._owns = owns
        self._theirs = theirs

    @property
    def room(self) -> int:
        """How many handlers may be in a transaction at once."""
        return room_in(self._engine.pool)

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for what the database says."""
        with translated(self._engine.url):
            async with self._begin() as connection:
                return await connection.run_sync(lambda sync: work(self._bind(sync)))

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing."""
        with translated(self._engine.url):
            async with self._engine.connect() as connection:
                return await connection.run_sync(lambda sync: work(self._bind(sync)))

    async def within(self, session: Any, work: Callable[[Store], T]) -> T:
        """Run within the transaction of an application's AsyncSession or AsyncConnection.

        Raises SettingInvalid, StoreUnavailable, RowRejected.
        """
        if not isinstance(session, AsyncSession | AsyncConnection):
            raise no_session(session, "an AsyncSession or an AsyncConnection")
        if isinstance(session, AsyncSession):
            connection = await session.connection()
        else:
            connection = session

        def run(sync: sa.Connection) -> T:
            with translated_as(self._engine.sync_engine, sync):
                return work(self._bind(sync))

        with translated(self._engine.url):
            return await connection.run_sync(run)

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """The kinds of transaction that a handler, `awaited` or not, can ask for by annotation."""
        return (AsyncSession, AsyncConnection) if awaited else SYNC

    async def handle(
        self, wish: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with the transaction that was wished for, and let `finish` end in the same one."""

        def end(sync: sa.Connection) -> None:
            kept(sync, begun)
            finish(self._bind(sync))

        async with self._begin() as connection:
            begun = await connection.run_sync(sa.Connection.begin_nested)
            assert connection.sync_connection is not None
            try:
                with untranslated(connection.sync_connection, self._theirs):
                    if issubclass(wish, SYNC):
                        await _call_sync(connection, wish, call)
                    else:
                        await _call(connection, wish, call)
            except BaseException:
                await connection.run_sync(undone, begun)
                raise
            await connection.run_sync(end)

    async def close(self) -> None:
        """Close the connections, if they are ours."""
        if self._owns:
            await self._engine.dispose()

    def _begin(self) -> AbstractAsyncContextManager[AsyncConnection]:
        return _transaction(self._engine)


@asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """As `engine.begin()`; but what can't be rolled back, because a handler left something that
    still uses it, is closed: the next to have that connection would be in the same transaction."""
    async with engine.connect() as connection:
        try:
            yield connection
            await connection.commit()
        except sa.exc.InterfaceError:
            await connection.invalidate()
            raise
        except BaseException:
            await _rolled_back(connection)
            raise


async def _rolled_back(connection: AsyncConnection) -> None:
    try:
        await connection.rollback()
    except sa.exc.SQLAlchemyError:
        await connection.invalidate()


async def _call(connection: AsyncConnection, wish: type, call: Callable[[Any], Any]) -> None:
    if wish is AsyncConnection:
        await _awaited(call(connection))
        return
    async with wish(bind=connection, **SESSION) as session:
        await _awaited(call(session))
        await session.commit()


async def _awaited(result: Any) -> None:
    if inspect.isawaitable(result):
        await result


async def _call_sync(connection: AsyncConnection, wish: type, call: Callable[[Any], Any]) -> None:
    """Call in a thread, which may block; left behind, it loses its connection."""
    # Needs greenlet, which comes with the extras of PostgreSQL's drivers.
    from logto_webhooks.adapters.hosts.crossing import Crossing

    crossing, sync = Crossing(), connection.sync_connection
    assert sync is not None

    def call_with_it() -> None:
        given = sync_wish(wish, sync)
        call(given)
        end_sync(given)

    try:
        await Aside[None]().awaited(partial(crossing.run, call_with_it))
    except asyncio.CancelledError:
        await crossing.close()
        await connection.invalidate()
        raise
