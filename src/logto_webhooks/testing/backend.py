"""The database of an application under test: one connection, which the test rolls back."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from asyncio import events
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from logto_webhooks.database import migrate
from logto_webhooks.database.async_runner import AsyncRunner
from logto_webhooks.database.dialect import now
from logto_webhooks.database.errors import translate_errors
from logto_webhooks.database.runner import run_and_project
from logto_webhooks.database.schema import deliveries, metadata_with_indexes, queue_keys
from logto_webhooks.database.sessions import (
    finish_session,
    get_sync_types,
    handler_savepoint,
    lend,
    make_session,
    use_schema,
)
from logto_webhooks.database.store import Project, Store
from logto_webhooks.deliveries import DeliveryState
from logto_webhooks.errors import SettingInvalid, TransactionEnded

T = TypeVar("T")
_DATABASES: Final = ("sqlite", "postgresql")
_INSTEAD: Final = {
    "Engine": ", which engine.connect() opens",
    "AsyncEngine": ", which engine.connect() opens",
    "Session": "; pass session.connection()",
    "AsyncSession": "; pass await session.connection()",
}
_IS_PENDING: Final = deliveries.c.state == DeliveryState.PENDING
_NEXT: Final = sa.func.coalesce(queue_keys.c.held_until, queue_keys.c.due_at).label("due_at")


class Backend:
    """A database and its clock. `host` runs transactions in savepoints."""

    def __init__(self, connection: sa.Connection | AsyncConnection, schema: str | None) -> None:
        """Raises SettingInvalid for a connection that can't be used."""
        _check_connection(connection, schema)
        self.connection = connection
        self.host: SavepointRunner | AsyncSavepointRunner
        if isinstance(connection, sa.Connection):
            self.host = SavepointRunner(connection, schema)
        else:
            self.host = AsyncSavepointRunner(connection, schema)
        self._schema = schema

    async def check(self) -> None:
        """Raise SchemaMismatch for a database without our tables."""
        await self.host.on(lambda connection: migrate.check(connection, self._schema))

    async def advance(self, milliseconds: int) -> None:
        """Let time pass at once, by making everything that waits due sooner."""
        pending = sa.update(deliveries).where(_IS_PENDING)
        sooner = {name: queue_keys.c[name] - milliseconds for name in ("due_at", "held_until")}

        def advance(connection: sa.Connection) -> None:
            connection.execute(pending.values(due_at=deliveries.c.due_at - milliseconds))
            connection.execute(sa.update(queue_keys).values(sooner))

        await self.host.on(advance)

    async def until_due(self, handlers: Sequence[str]) -> int | None:
        """Return the milliseconds until the next delivery, or job of these handlers, is due; None
        if nothing waits."""
        waiting = sa.union_all(
            sa.select(deliveries.c.due_at).where(_IS_PENDING),
            sa.select(_NEXT).where(queue_keys.c.handler.in_(handlers)),
        ).subquery()
        query = sa.select(sa.func.min(waiting.c.due_at) - now())
        return await self.host.on(lambda connection: connection.scalar(query))


class MemoryBackend(Backend):
    """A SQLite database in memory with our tables. It is closed with its last user."""

    def __init__(self) -> None:
        # The garbage collector, which may run in any thread, closes the connection.
        any_thread = {"check_same_thread": False}
        engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool, connect_args=any_thread)
        connection = engine.connect()
        metadata_with_indexes().create_all(connection)
        super().__init__(connection, None)
        weakref.finalize(self.host, _close, connection)

    async def check(self) -> None:
        """Do nothing: the tables were just created, without a version."""


def _close(connection: sa.Connection) -> None:
    connection.close()
    connection.engine.dispose()


def _check_connection(connection: object, schema: str | None) -> None:
    if not isinstance(connection, sa.Connection | AsyncConnection):
        kind = type(connection).__name__
        problem = f"it must be a Connection or an AsyncConnection, not {kind}"
        raise _make_error(f"{problem}{_INSTEAD.get(kind, '')}")
    is_async = isinstance(connection, AsyncConnection)
    sync = connection.sync_connection if isinstance(connection, AsyncConnection) else connection
    if sync is None or sync.closed:
        block = f"{'async ' if is_async else ''}with engine.connect() as connection"
        raise _make_error(f"it isn't open; use it inside `{block}`")
    dialect = sync.dialect.name
    if dialect not in _DATABASES:
        raise _make_error(f"it must be of SQLite or PostgreSQL, not {dialect}")
    if schema is not None and dialect == "sqlite":
        raise _make_error(f"it is of SQLite, which has no schema {schema!r}, as logto wants")


def _make_error(problem: str) -> SettingInvalid:
    return SettingInvalid(name="connection", problem=problem)


@contextmanager
def hide_running_loop() -> Iterator[None]:
    """Hide the event loop from a synchronous handler, so that it may call functions that wait, such
    as `logto.call`. Outside of tests, it has its own thread."""
    loop = events._get_running_loop()
    events._set_running_loop(None)
    try:
        yield
    finally:
        events._set_running_loop(loop)


def _end_savepoint(session: Any) -> None:
    """End the savepoint of a Session whose handler raised, because ours around it ends next."""
    if not isinstance(session, sa.Connection):
        with suppress(Exception):  # the handler may have ended the transaction
            session.close()


class _OneConnection(ABC):
    """Runs all work in savepoints of one connection."""

    project: Project | None = None

    @abstractmethod
    async def on(self, work: Callable[[sa.Connection], T]) -> T:
        """Run in a savepoint. Raises StoreUnavailable or RowRejected for errors of the database."""

    async def run_large(self, work: Callable[[Store], T]) -> T:
        """The same as `run`."""
        return await self.run(work)

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run as `on`."""
        return await self.on(
            lambda connection: run_and_project(work, Store(connection, self.project))
        )

    async def run_slow(self, work: Callable[[Store], T], statement_s: float) -> T:
        """Run as `on`."""
        return await self.run(work)

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run as `on`."""
        return await self.run(work)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run as `on`."""
        return await self.run(work)

    async def read_long(self, work: Callable[[Store], T]) -> T:
        """Run as `on`."""
        return await self.run(work)


class SavepointRunner(_OneConnection):
    """Runs work on a Connection, in the caller's thread, without waiting."""

    def __init__(self, connection: sa.Connection, schema: str | None) -> None:
        """`schema` is where our tables are."""
        self._connection = connection
        self._schema = schema

    async def on(self, work: Callable[[sa.Connection], T]) -> T:
        """Run in a savepoint."""
        with translate_errors(self._connection.engine), self._savepoint():
            return work(self._connection)

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """Return the types of session that a handler, `awaited` or not, can ask for."""
        return () if awaited else get_sync_types()

    async def handle(
        self, kind: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with what was wished for, and let `finish` end in the same savepoint."""
        try:
            with self._savepoint():
                with handler_savepoint(self._connection), lend(self._connection):
                    session = make_session(kind, self._connection)
                    try:
                        with hide_running_loop():
                            call(session)
                    except BaseException:
                        _end_savepoint(session)
                        raise
                    finish_session(session)
                finish(Store(self._connection))
        except TransactionEnded:
            _roll_back(self._connection)
            raise

    async def close(self) -> None:
        """Do nothing: the connection is the test's."""

    @contextmanager
    def _savepoint(self) -> Iterator[None]:
        _begin(self._connection)
        with use_schema(self._connection, self._schema), self._connection.begin_nested():
            yield


class AsyncSavepointRunner(_OneConnection, AsyncRunner):
    """Runs work on an AsyncConnection."""

    _is_pooled = False  # the connection is the test's

    def __init__(self, connection: AsyncConnection, schema: str | None) -> None:
        """`schema` is where our tables are."""
        super().__init__(connection.engine, is_of_test=True)
        self._connection = connection
        self._schema = schema

    async def on(self, work: Callable[[sa.Connection], T]) -> T:
        """Run in a savepoint."""
        with translate_errors(self._connection.engine):
            async with self._begin(self._engine) as connection:
                return await connection.run_sync(work)

    async def handle(
        self, kind: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with what was wished for, and let `finish` end in the same savepoint."""
        try:
            await super().handle(kind, call, finish)
        except TransactionEnded:
            await self._connection.run_sync(_roll_back)
            raise

    @asynccontextmanager
    async def _begin(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        assert self._connection.sync_connection is not None
        with use_schema(self._connection.sync_connection, self._schema):
            async with self._connection.begin_nested():
                yield self._connection


def _roll_back(connection: sa.Connection) -> None:
    """Make the connection usable again. A refused commit ends SQLAlchemy's transaction, but not the
    driver's."""
    connection.connection.rollback()
    connection.rollback()


def _begin(connection: sa.Connection) -> None:
    """Begin a transaction on SQLite, because Python's driver doesn't: without one, releasing the
    outermost savepoint would commit."""
    if connection.dialect.name != "sqlite":
        return
    driver: Any = connection.connection.driver_connection
    if not driver.in_transaction:
        connection.exec_driver_sql("BEGIN")
