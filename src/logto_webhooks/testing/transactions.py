"""Run transactions on a connection that the test rolls back."""

from __future__ import annotations

from asyncio import events
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from logto_webhooks.database.async_runner import AsyncRunner
from logto_webhooks.database.errors import translate_errors
from logto_webhooks.database.sessions import (
    app_schema,
    finish_session,
    handler_savepoint,
    in_schema,
    make_session,
    sync_types,
    translation,
)
from logto_webhooks.database.store import Store


@contextmanager
def hide_running_loop() -> Iterator[None]:
    """Let a plain handler find no event loop, as outside of tests, where it has a thread of its
    own: so it may call what waits, such as `logto.call`."""
    loop = events._get_running_loop()
    events._set_running_loop(None)
    try:
        yield
    finally:
        events._set_running_loop(loop)


T = TypeVar("T")


class SavepointRunner:
    """Runs work on a Connection, at once, on the caller's thread."""

    def __init__(self, connection: sa.Connection, schema: str | None) -> None:
        """`schema` is where our tables are."""
        self._connection = connection
        self._schema = schema
        self._theirs = translation(connection)

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run in a savepoint. Raises StoreUnavailable or RowRejected for what the database says."""
        return await self.on(lambda connection: work(Store(connection)))

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run."""
        return await self.run(work)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run."""
        return await self.run(work)

    async def on(self, work: Callable[[sa.Connection], T]) -> T:
        """The same with the connection itself."""
        with translate_errors(self._connection.engine), self._savepoint():
            return work(self._connection)

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """The kinds of transaction that a handler, `awaited` or not, can ask for by annotation."""
        return () if awaited else sync_types()

    async def handle(
        self, wish: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with what was wished for, and let `finish` end in the same savepoint."""
        with self._savepoint():
            with handler_savepoint(self._connection), app_schema(self._connection, self._theirs):
                session = make_session(wish, self._connection)
                with hide_running_loop():
                    call(session)
                finish_session(session)
            finish(Store(self._connection))

    async def close(self) -> None:
        """Nothing is ours."""

    @contextmanager
    def _savepoint(self) -> Iterator[None]:
        begin(self._connection)
        with in_schema(self._connection, self._schema), self._connection.begin_nested():
            yield


class AsyncSavepointRunner(AsyncRunner):
    """The same on an AsyncConnection."""

    _is_pooled = False  # it is the test's own

    def __init__(self, connection: AsyncConnection, schema: str | None) -> None:
        """`schema` is where our tables are."""
        assert connection.sync_connection is not None
        theirs = translation(connection.sync_connection)
        super().__init__(connection.engine, owns=False, theirs=theirs, watched=False)
        self._connection = connection
        self._schema = schema

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run in a savepoint. Raises StoreUnavailable or RowRejected for what the database says."""
        return await self.on(lambda connection: work(Store(connection)))

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run."""
        return await self.run(work)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run."""
        return await self.run(work)

    async def on(self, work: Callable[[sa.Connection], T]) -> T:
        """The same with the connection itself."""
        with translate_errors(self._connection.engine):
            async with self._savepoint() as connection:
                return await connection.run_sync(work)

    def _begin(self) -> AbstractAsyncContextManager[AsyncConnection]:
        return self._savepoint()

    @asynccontextmanager
    async def _savepoint(self) -> AsyncIterator[AsyncConnection]:
        assert self._connection.sync_connection is not None
        with in_schema(self._connection.sync_connection, self._schema):
            async with self._connection.begin_nested():
                yield self._connection


def begin(connection: sa.Connection) -> None:
    """Begin a transaction where Python's driver for SQLite doesn't: there, the end of an outermost
    savepoint would be a commit."""
    if connection.dialect.name != "sqlite":
        return
    driver: Any = connection.connection.dbapi_connection
    if not driver.in_transaction:
        connection.exec_driver_sql("BEGIN")
