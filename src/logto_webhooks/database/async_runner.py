"""Run transactions on an asynchronous engine, on the event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    suppress,
)
from functools import partial
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.util import await_only

from logto_webhooks.database.coroutines import DetachedTask
from logto_webhooks.database.errors import translate_errors
from logto_webhooks.database.runner import (
    ACCEPTS,
    CLOSE_S,
    CUT_S,
    READ_S,
    RUN_S,
    HeldConnection,
    OurEngine,
    PoolRefresher,
    await_within,
    close_returned,
    limit_slow,
    run_and_project,
    run_on_async_session,
    run_within,
)
from logto_webhooks.database.sessions import (
    SESSION,
    ConnectionWatch,
    check_not_closed,
    finish_session,
    get_handler_limit,
    get_sync_types,
    lend,
    make_session,
    make_session_error,
    note_closing,
    release,
    roll_back_savepoint,
)
from logto_webhooks.database.store import LOCK_S, STATEMENT_S, Project, Store
from logto_webhooks.database.threads import DetachedCall, GreenletBridge

T = TypeVar("T")
CUT_ALL_S: Final = 5.0  # to cut off connections, which takes long only on a very slow machine
ROLLBACK_S: Final = 8.0  # for the server to answer, which may be silent
PAUSE_S: Final = 1.0  # before each statement of an abandoned coroutine, which fails


class AsyncRunner:
    """Runs the same work as ThreadRunner, with `AsyncConnection.run_sync`."""

    project: Project | None = None
    _is_pooled = True  # whether others get a handler's connection after it

    def __init__(
        self,
        engine: AsyncEngine,
        add_pool: Callable[[sa.Engine], sa.Engine] | None = None,
        is_of_test: bool = False,
        unlimited: AsyncEngine | None = None,
    ) -> None:
        """`add_pool`: of OurEngine, if `engine` is the application's; `is_of_test`: whether the
        engine is a test's, so that its connections are neither replaced nor closed; `unlimited`: an
        engine whose driver waits for statements however long they take, if `engine` isn't one."""
        self._unlimited = unlimited
        self._engine = engine
        self._is_of_test = is_of_test
        self._refresher = None if is_of_test else PoolRefresher()
        self._ours = OurEngine(engine.sync_engine, add_pool, self._refresher)
        self._abandoned: set[asyncio.Task[Any]] = set()

    @property
    def room(self) -> int:
        """How many handlers may be in a transaction at once."""
        return get_handler_limit(self._engine.pool)

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for errors of the database."""
        return await self._within(RUN_S, lambda held: self._run(work, held))

    async def run_large(self, work: Callable[[Store], T]) -> T:
        """The same in a thread. Only its statements run on the event loop."""
        return await self._within(RUN_S, lambda held: self._run_in_thread(work, held))

    async def run_slow(self, work: Callable[[Store], T], statement_s: float) -> T:
        """The same for work of which a statement may take so long."""
        return await self._within(
            limit_slow(statement_s),
            lambda held: self._run_in_thread(work, held, statement_s, self._unlimited),
        )

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run each statement as a transaction of its own, within a time limit."""
        return await self._within(
            limit_s, lambda held: self._look(lambda sync: work(Store(sync)), held, ACCEPTS)
        )

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing."""
        return await self.look(lambda sync: work(Store(sync)), READ_S)

    async def read_long(self, work: Callable[[Store], T]) -> T:
        """The same, because each call has a connection of its own."""
        return await self.read(work)

    async def look(self, work: Callable[[sa.Connection], T], limit_s: float) -> T:
        """The same as `read` with the connection itself, within a time limit."""
        return await self._within(limit_s, lambda held: self._look(work, held))

    async def within(self, session: Any, work: Callable[[Store], T], *, writes: bool = True) -> T:
        """Run within the transaction of an application's AsyncSession or AsyncConnection.

        Raises SettingInvalid, StoreUnavailable, RowRejected.
        """
        if not isinstance(session, AsyncSession | AsyncConnection):
            wanted = "an AsyncSession or an AsyncConnection"
            raise make_session_error(session, wanted, "in a plain handler, leave out session=")
        run = partial(run_within, self._engine.sync_engine, self.project, work, writes)
        with translate_errors(self._engine):
            return await run_on_async_session(session, run)

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """Return the types of session that a handler, `awaited` or not, can ask for."""
        return (AsyncSession, AsyncConnection) if awaited else get_sync_types()

    async def handle(
        self, kind: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call `call` with a session of a `kind`, and `finish` in the same transaction.

        A coroutine that goes on after it was cancelled is abandoned and loses its connection.
        """
        async with self._begin(self._engine) as connection:
            handle = partial(self._handle, connection, kind, call, finish)
            if self._is_pooled and not issubclass(kind, get_sync_types()):
                await DetachedTask(partial(_take_back, connection)).run(handle)
            else:
                await handle()

    async def _handle(
        self,
        connection: AsyncConnection,
        kind: type,
        call: Callable[[Any], Any],
        finish: Callable[[Store], None],
    ) -> None:
        try:
            to_close = await self._call_and_finish(connection, kind, call, finish)
            if self._is_pooled:
                await connection.commit()
        except BaseException:
            # The handler may have had effects beyond its transaction.
            if self._is_pooled and not connection.closed:
                try:
                    await _roll_back_or_drop(connection)
                finally:  # this may be cancelled again
                    await drop_connection(connection)
            raise
        if to_close:
            await drop_connection(connection)

    async def _call_and_finish(
        self,
        connection: AsyncConnection,
        kind: type,
        call: Callable[[Any], Any],
        finish: Callable[[Store], None],
    ) -> bool:
        """Return whether to close the connection, because others should not get it."""
        sync = _to_sync(connection)
        watch = await connection.run_sync(ConnectionWatch) if self._is_pooled else None

        def end(sync: sa.Connection) -> bool:
            release(sync, savepoint)
            to_close = watch is not None and watch.restore()
            finish(Store(sync))
            return to_close

        savepoint = await connection.run_sync(sa.Connection.begin_nested)
        try:
            with lend(sync):
                if issubclass(kind, get_sync_types()):
                    await _call_sync(connection, kind, call)
                else:
                    await _call(connection, kind, call)
        except BaseException as error:
            if not connection.closed:
                await connection.run_sync(roll_back_savepoint, savepoint, error)
            raise
        return await connection.run_sync(end)

    async def close(self) -> None:
        """Close our own connections. Those that don't answer are cut off."""
        for task in self._abandoned:
            task.cancel()
        if self._is_of_test or self._ours.own is None:
            return
        own = AsyncEngine(self._ours.own)
        pool = self._ours.own.pool
        try:
            if await _finish_within(CLOSE_S, own.dispose()):
                return
            if self._refresher:
                self._refresher.refresh()  # so that none is waited for
            await _finish_within(CUT_ALL_S, own.dispose())
        finally:
            close_returned(pool)

    async def _run(self, work: Callable[[Store], T], held: HeldConnection) -> T:
        async with self._begin(self._our_engine()) as connection:
            store = Store(_to_sync(connection), self.project)
            return await connection.run_sync(lambda _: _hold_and_run(work, held, store))

    async def _run_in_thread(
        self,
        work: Callable[[Store], T],
        held: HeldConnection,
        statement_s: float = STATEMENT_S,
        engine: AsyncEngine | None = None,
    ) -> T:
        async with self._begin(engine or self._our_engine()) as connection:
            store = Store(_to_sync(connection), self.project)
            call = partial(_hold_and_run, work, held, store, statement_s)
            return await _call_in_thread(connection, call, DetachedCall())

    async def _look(
        self,
        work: Callable[[sa.Connection], T],
        held: HeldConnection,
        options: dict[str, Any] | None = None,
    ) -> T:
        def run(sync: sa.Connection) -> T:
            held.hold(sync)
            return work(sync.execution_options(**options) if options else sync)

        async with _connect(self._our_engine()) as connection:
            return await connection.run_sync(run)

    async def _within(
        self, limit_s: float, call: Callable[[HeldConnection], Coroutine[Any, Any, T]]
    ) -> T:
        """Await a call within a time limit. Raises StoreUnavailable, RowRejected."""
        held = HeldConnection()
        with translate_errors(self._engine):
            task = asyncio.create_task(call(held))

            def abandon() -> None:
                self._abandoned.add(task)
                task.add_done_callback(self._abandoned.discard)
                task.add_done_callback(_retrieve_error)

            end = partial(held.end, task, task.cancel, abandon)
            return await await_within(limit_s, task, end, self._refresher)

    def _our_engine(self) -> AsyncEngine:
        return AsyncEngine(self._ours.get())

    def _begin(self, engine: AsyncEngine) -> AbstractAsyncContextManager[AsyncConnection]:
        return _transaction(engine)


def _hold_and_run(
    work: Callable[[Store], T],
    held: HeldConnection,
    store: Store,
    statement_s: float = STATEMENT_S,
) -> T:
    held.hold(store.connection)
    store.limit_waits(LOCK_S, statement_s)
    return run_and_project(work, store)


async def _call_in_thread(
    connection: AsyncConnection, call: Callable[[], T], thread: DetachedCall[T]
) -> T:
    """Call a function that may block, and runs its statements on the connection. If this is
    cancelled, the call is abandoned and loses the connection."""
    bridge = GreenletBridge()
    try:
        return await thread.run(partial(bridge.run, call))
    except asyncio.CancelledError:
        await bridge.close(connection.invalidate)
        raise


async def _finish_within(limit_s: float, work: Coroutine[Any, Any, None]) -> bool:
    """Await work within a time limit, and cancel it after that. Return whether it finished."""
    task = asyncio.create_task(work)
    done, _ = await asyncio.wait({task}, timeout=limit_s)
    task.cancel()
    task.add_done_callback(_retrieve_error)
    return bool(done)


def _retrieve_error(task: asyncio.Task[Any]) -> None:
    """Retrieve the error, or the event loop would log that nobody did."""
    if not task.cancelled():
        task.exception()


@asynccontextmanager
async def _connect(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Like `engine.connect()`, but without connections that are in a transaction already.

    If an application uses its engine on two event loops, asyncpg's connection can return to the
    pool with a transaction that SQLAlchemy doesn't know of, and nothing on it is ever committed.
    """
    async with engine.connect() as connection:
        while await _is_in_transaction(connection):
            await drop_connection(connection)
        yield connection


async def _is_in_transaction(connection: AsyncConnection) -> bool:
    driver: Any = (await connection.get_raw_connection()).driver_connection
    is_in_transaction = getattr(driver, "is_in_transaction", None)  # only asyncpg's has it
    return bool(is_in_transaction and is_in_transaction())


@asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Like `engine.begin()`, but close a connection that can't be rolled back because something
    that a handler left running uses it. Else its next user would be in the same transaction."""
    async with _connect(engine) as connection:
        try:
            yield connection
            await connection.commit()
        except sa.exc.InterfaceError:
            await drop_connection(connection)
            raise
        except BaseException:
            await _roll_back_or_drop(connection)
            raise


async def _roll_back_or_drop(connection: AsyncConnection) -> None:
    try:
        async with asyncio.timeout(ROLLBACK_S):
            await connection.rollback()
    except (sa.exc.SQLAlchemyError, TimeoutError):
        await drop_connection(connection)


async def drop_connection(connection: AsyncConnection) -> None:
    """Close a connection, so that nobody gets it again. psycopg's survives `invalidate` alone."""
    if connection.invalidated or connection.closed:
        return
    driver: Any = None
    try:
        with suppress(Exception):
            driver = (await connection.get_raw_connection()).driver_connection
            async with asyncio.timeout(CLOSE_S):
                await driver.close()
            return
        terminate = getattr(driver, "terminate", None)  # of asyncpg, whose `close` refuses
        if terminate is not None:  # a connection in use, as does `invalidate`
            terminate()
    finally:
        await connection.invalidate()


async def _take_back(connection: AsyncConnection, cancel: Callable[[], object]) -> None:
    """End the transaction of a coroutine that goes on, and prevent further statements in it.

    `cancel` ends the statement that runs, also on the server.
    """
    sync, held = _to_sync(connection), HeldConnection()
    # Nothing is awaited before it is closed: the coroutine could get another one from the pool.
    with suppress(Exception):  # the handler closed it
        if not sync.invalidated:
            held.hold(sync)
            sync.detach()
            sync.invalidate()
    with suppress(Exception):
        sync.close()
    for name in ("before_execute", "begin", "savepoint"):
        event.listen(sync, name, _pause)
    cancel()
    try:
        await asyncio.sleep(CUT_S)
    finally:  # this may be cancelled again
        held.cut()
    await asyncio.sleep(CUT_S / 10)  # pending waits for the server notice it: psycopg needs that
    await held.close()


def _pause(*_: object) -> None:
    """Let others run: a coroutine that repeats a failing statement would block the event loop."""
    await_only(asyncio.sleep(PAUSE_S))


def _to_sync(connection: AsyncConnection) -> sa.Connection:
    assert connection.sync_connection is not None
    return connection.sync_connection


async def _call(connection: AsyncConnection, kind: type, call: Callable[[Any], Any]) -> None:
    if kind is AsyncConnection:
        await _await_result(call(connection))
        return
    async with kind(bind=connection, **SESSION) as session:
        note_closing(session.sync_session)
        await _await_result(call(session))
        check_not_closed(session.sync_session)
        await session.commit()


async def _await_result(result: Any) -> None:
    if inspect.isawaitable(result):
        await result


async def _call_sync(connection: AsyncConnection, kind: type, call: Callable[[Any], Any]) -> None:
    sync = _to_sync(connection)

    def call_with_session() -> None:
        session = make_session(kind, sync)
        call(session)
        finish_session(session)

    await _call_in_thread(connection, call_with_session, DetachedCall())
