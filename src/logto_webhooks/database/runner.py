"""Run transactions: the interfaces, how to end calls that a database doesn't answer, and the runner
for synchronous engines, which uses threads."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from threading import Lock, Thread
from typing import Any, ClassVar, Final, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError

from logto_webhooks.database.errors import diagnose, translate_errors
from logto_webhooks.database.sessions import (
    OF_APPLICATION,
    ConnectionWatch,
    finish_session,
    get_handler_limit,
    get_sync_types,
    handler_savepoint,
    lend,
    make_session,
    make_session_error,
    use_our_schema,
    writing,
)
from logto_webhooks.database.store import DRIVER_S, LOCK_S, STATEMENT_S, Project, Store
from logto_webhooks.database.threads import (
    HAS_WRITER,
    DetachedCall,
    SerialExecutor,
)
from logto_webhooks.errors import (
    NoAnswer,
    StoreUnavailable,
    TimedOut,
    TimeLimitExceeded,
    WriterBusy,
)
from logto_webhooks.event_loop import start_thread, to_error

logger = logging.getLogger("logto_webhooks")
T = TypeVar("T")
# For accepting: each statement is a transaction, so a silent connection leaves none open.
ACCEPTS: Final[dict[str, Any]] = {"isolation_level": "AUTOCOMMIT", "logto_accepts": True}
RUN_S: Final = 10.0  # for a transaction of ours, which should take a second
READ_S: Final = 15.0
CANCEL_S: Final = 0.5  # for the server to confirm that it cancelled
CUT_S: Final = 0.5  # for a call that was cut off to end
CLOSE_S: Final = 1.0
_CONNECTED_AT: Final = "logto_connected_at"
WRITER_S: Final = 2.0  # how long a handler may hold the only writer: accepting waits meanwhile
WRITING_HANDLERS: Final = 1  # at once, with one writer: accepting waits for it
MOST_STUCK: Final = 8  # abandoned calls, whose threads still wait
CANCEL_WAIT_S: Final = 3.0
CANCEL_EVERY_S: Final = 0.1
OPEN_S: Final = 60.0  # for transactions that are open when a handler or a mapping is registered
LOOK_S: Final = 0.05
LATE_S: Final = 0.3  # for an answer that is there, but wasn't read in time


class TransactionRunner(Protocol):
    """Runs functions that take a Store, each in one transaction."""

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for errors of the database."""

    async def run_large(self, work: Callable[[Store], T]) -> T:
        """The same for work with large values, without blocking the event loop."""

    async def run_slow(self, work: Callable[[Store], T], statement_s: float) -> T:
        """The same for work of which a statement may take so long. It delays no other work."""

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run `Store.add` alone within a time limit. Each statement is committed by itself.

        A connection that doesn't answer is replaced, and so are all that were opened before. After
        the time limit, the deliveries may still have been stored. Raises what `run` raises.
        """

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing, and without waiting for a writer."""

    async def read_long(self, work: Callable[[Store], T]) -> T:
        """The same for work that may take seconds, such as counting. It delays no `read`."""

    async def close(self) -> None:
        """End threads and close connections."""


class HandlerRunner(TransactionRunner, Protocol):
    """A runner that lets handlers take part in its transactions.

    `project` writes the application's rows that follow from changed records.
    """

    project: Project | None

    @property
    def room(self) -> int:
        """How many handlers may be in a transaction at once."""

    async def within(self, session: Any, work: Callable[[Store], T], *, writes: bool = True) -> T:
        """Run within the transaction of an application's session, which the application ends. If
        work raises, what it wrote and locked is undone.

        Raises SettingInvalid for a session that can't be used here, and what `run` raises.
        """

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """Return the types of session that a handler, `awaited` or not, can ask for."""

    async def handle(
        self, kind: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call `call` with a session of a `kind`, and await its result if that is awaitable. Then
        call `finish` in the same transaction. If either raises, all is rolled back.

        Raises what they raise, and StoreUnavailable.
        """


async def run_or_rehearse(runner: TransactionRunner, work: Callable[[Store], T], dry: bool) -> T:
    """Run work, which may be large, in a transaction and return its result. With `dry`, roll the
    transaction back."""
    if not dry:
        return await runner.run_large(work)
    results: list[T] = []

    def rehearse(store: Store) -> T:
        results.append(work(store))
        raise _RolledBack

    try:
        return await runner.run_large(rehearse)
    except _RolledBack:
        return results[-1]


async def await_open_transactions(runner: TransactionRunner) -> None:
    """Wait until the transactions that change records now are over. They may have read what was
    registered before, and no list of records has yet what they will commit.

    After OPEN_S, warn and go on. Raises StoreUnavailable.
    """
    give_up_at = time.monotonic() + OPEN_S
    left = await runner.read(Store.open_transactions)
    while left and time.monotonic() < give_up_at:
        await asyncio.sleep(LOOK_S)
        left &= await runner.read(Store.open_transactions)
    if left:
        logger.warning(
            "a transaction has changed records for more than %d s: what it creates may be left out;"
            " when it is over, run `mapping apply` or `handlers run` again",
            OPEN_S,
        )


def limit_slow(statement_s: float) -> float:
    """Return how long `run_slow` may take in all: two such statements, and the rest."""
    return 2 * statement_s + RUN_S


def run_and_project(work: Callable[[Store], T], store: Store) -> T:
    """Run work, and write what follows from the records that it changed."""
    result = work(store)
    store.project_changes()
    return result


def run_within(
    engine: sa.Engine,
    project: Project | None,
    work: Callable[[Store], T],
    writes: bool,
    session: sa.Connection | Any,
) -> T:
    """Run work within the transaction of an application's Session or Connection. Raises
    SettingInvalid, StoreUnavailable, RowRejected."""
    with translate_errors(engine):
        connection = session if isinstance(session, sa.Connection) else session.connection()
        with (
            use_our_schema(engine, connection),
            writing(connection) if writes else nullcontext(),
        ):
            return run_and_project(work, Store(connection, project))


async def run_on_async_session(session: Any, work: Callable[[sa.Connection], T]) -> T:
    """Run work on the connection of an AsyncSession or AsyncConnection."""
    is_session = hasattr(session, "sync_session")
    connection = await session.connection() if is_session else session
    result: T = await connection.run_sync(work)
    return result


class _RolledBack(Exception):
    """Rolls the transaction back."""


class HeldConnection:
    """The connection that a call holds, which others can cut off."""

    def __init__(self) -> None:
        self.is_abandoned = False  # whether nobody waits for the call any more
        self._driver: Any = None
        self._lock = Lock()  # held while the connection must not go to another call
        self._began_at: float | None = None

    def hold(self, connection: sa.Connection) -> None:
        """Note the connection. Raises TimeoutError if nobody waits for the call any more."""
        self._driver = connection.connection.driver_connection
        self.check()

    def check(self) -> None:
        """Raise TimeoutError if nobody waits for the call any more, so that it doesn't commit."""
        if self.is_abandoned:
            raise TimeoutError("its caller no longer waits for it")

    def begin(self) -> None:
        """Note that the call has begun."""
        self._began_at = time.monotonic()

    @property
    def has_begun(self) -> bool:
        """Whether the call has begun."""
        return self._began_at is not None

    def left_s(self, limit_s: float) -> float:
        """Return how much of a call's time limit is left: all of it until it begins."""
        return limit_s - (0 if self._began_at is None else time.monotonic() - self._began_at)

    @contextmanager
    def holding(self, connection: sa.Connection) -> Iterator[None]:
        """Note the connection within the block. Afterwards, another call may have it."""
        self.hold(connection)
        try:
            yield
        finally:
            with self._lock:
                self._driver = None

    async def end(
        self, call: asyncio.Future[Any], cancel: Callable[[], Any], abandon: Callable[[], Any]
    ) -> None:
        """End the call: `cancel` its statement. If that doesn't help, cut off its connection. If
        that doesn't help either, `abandon` the call."""
        self.is_abandoned = True
        cancel()
        try:
            done, _ = await asyncio.wait({call}, timeout=CANCEL_S)
            if not done:
                self.cut()
                done, _ = await asyncio.wait({call}, timeout=CUT_S)
        except asyncio.CancelledError:  # once more, so there is no time to wait
            if not call.done():
                self.cut()
                abandon()
            raise
        if not done:
            abandon()
        elif not call.cancelled():
            call.exception()  # or asyncio would log that nobody retrieved it

    def cancel(self) -> None:
        """Ask the server to cancel the statement. Blocks; for drivers that are used in threads."""
        driver = self._driver
        with suppress(Exception):  # if this fails, the connection is cut off
            if hasattr(driver, "cancel_safe"):
                driver.cancel_safe(timeout=CANCEL_S)
            else:
                driver.cancel()

    def interrupt(self) -> None:
        """Interrupt the statement of a SQLite connection, from any thread."""
        with self._lock:
            if self._driver is not None:
                self._driver.interrupt()

    def cut(self) -> None:
        """Cut off the connection, from any thread, so that its call fails at once."""
        driver = self._driver
        with suppress(Exception):  # it may be closed already
            if hasattr(driver, "terminate"):  # asyncpg
                driver.terminate()
            elif driver is not None:
                with socket.socket(fileno=os.dup(driver.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Close the connection that was cut off, if its driver is asynchronous."""
        with suppress(Exception):
            await self._driver.close()


async def await_within(
    limit_s: float,
    call: asyncio.Future[T],
    end: Callable[[], Awaitable[None]],
    refresher: PoolRefresher | None,
    left_s: Callable[[float], float] = lambda limit_s: 0,
) -> T:
    """Await a call within a time limit. After that, or if the caller is cancelled, `end` the call.

    `left_s` returns how much of the limit is left because the call had to wait for its turn.
    Raises StoreUnavailable if there is no result, and an Exception for whatever the call raised.
    """
    try:
        done, _ = await asyncio.wait({call}, timeout=limit_s)
        while not done and (more_s := left_s(limit_s)) > 0:
            done, _ = await asyncio.wait({call}, timeout=more_s)
        if not done:  # the process may have been paused, and the answer is there by now
            done, _ = await asyncio.wait({call}, timeout=LATE_S)
    except asyncio.CancelledError:
        await end()
        raise
    if not done:
        if refresher is not None:
            refresher.refresh()
        await end()
    if not call.done() or (call.cancelled() and not done):
        raise NoAnswer(problem=f"no answer within {limit_s:g} s")
    try:
        return call.result()
    except Exception:
        raise
    except BaseException as error:  # nobody cancelled the call
        raise to_error(error) from error


class PoolRefresher:
    """Replaces connections of engines that were opened before the last call without an answer
    (within our limit, or the driver's), or before the last error that a new session may not have,
    such as that the session is read-only."""

    def __init__(self) -> None:
        self._engines: set[sa.Engine] = set()
        self._stale_since = 0.0

    def watch(self, engine: sa.Engine) -> None:
        """Watch an engine."""
        self._engines.add(engine)
        event.listen(engine, "connect", self._note_connected)
        event.listen(engine, "checkout", self._refuse_stale)
        event.listen(engine, "close", self._close_stale)
        event.listen(engine, "handle_error", self._note_error)

    def refresh(self) -> None:
        """Replace each connection that is open now before its next use."""
        self._stale_since = time.monotonic()

    def _note_connected(self, connection: Any, record: Any) -> None:
        record.info[_CONNECTED_AT] = time.monotonic()
        # asyncpg has no public way to ask for its command_timeout.
        config = getattr(getattr(connection, "driver_connection", None), "_config", None)
        record.info[DRIVER_S] = getattr(config, "command_timeout", None)

    def _refuse_stale(self, connection: Any, record: Any, proxy: Any) -> None:
        if self._is_stale(record):
            raise InvalidatePoolError()

    def _note_error(self, context: sa.engine.ExceptionContext) -> None:
        options = getattr(context.execution_context, "execution_options", {})
        if context.connection is not None:
            options = {**context.connection.get_execution_options(), **options}
        if context.engine not in self._engines or options.get(OF_APPLICATION):
            return  # an error about the application's tables, which may be frequent
        error = context.original_exception
        diagnostics = diagnose(error)
        is_silent = context.connection is not None and isinstance(error, TimeoutError)
        if is_silent or (diagnostics is not None and diagnostics.is_of_session):
            self.refresh()

    def _close_stale(self, connection: Any, record: Any) -> None:
        # asyncpg would wait for an answer that never comes.
        driver: Any = getattr(connection, "driver_connection", None)
        if self._is_stale(record) and hasattr(driver, "terminate"):
            driver.terminate()

    def _is_stale(self, record: Any) -> bool:
        return bool(self._stale_since) and record.info.get(_CONNECTED_AT, 0.0) <= self._stale_since


class OurEngine:
    """The engine of this package's own transactions. If it isn't ours but the application's, it
    gets a pool of its own, because all connections of the application's may be in use."""

    def __init__(
        self,
        engine: sa.Engine,
        add_pool: Callable[[sa.Engine], sa.Engine] | None,
        refresher: PoolRefresher | None,
    ) -> None:
        """`add_pool` returns the application's engine with another pool."""
        self._engine = engine
        self._add_pool = add_pool
        self._refresher = refresher
        self._own = engine if add_pool is None else None
        self._lock = Lock()
        if refresher is not None:
            refresher.watch(engine)

    def get(self) -> sa.Engine:
        """Return our engine, but the application's until that has connected: both share a dialect,
        which SQLAlchemy sets up with the first connection, for one pool at a time.

        The pool is made at its first use. Listeners that are added later don't hold for it.
        """
        with self._lock:
            is_set_up = hasattr(self._engine.dialect, "default_isolation_level")
            if self._own is None and self._add_pool is not None and is_set_up:
                self._own = self._add_pool(self._engine)
                if self._refresher is not None:
                    self._refresher.watch(self._own)
            return self._own or self._engine

    @property
    def own(self) -> sa.Engine | None:
        """Our engine, if it was made."""
        return self._own


def close_returned(pool: sa.Pool) -> None:
    """Let connections that were in use when their pool was disposed of be closed when they return:
    nobody else would close them. Before `dispose`, the next pool would take over the listener."""

    def close(connection: Any, record: Any) -> None:
        if connection is not None:
            record.invalidate()

    event.listen(pool, "checkin", close)


class ThreadRunner:
    """Runs transactions on a synchronous engine, in threads. Writes run in the order of calls."""

    _reads: ClassVar[dict[str, Any]] = {}  # options of a connection that only reads
    project: Project | None = None
    _one_writer = False  # whether the database has only one writer, which handlers use in turn

    def __init__(
        self,
        engine: sa.Engine,
        add_pool: Callable[[sa.Engine], sa.Engine] | None = None,
    ) -> None:
        """`add_pool`: of OurEngine, if `engine` is the application's."""
        self._engine = engine
        self._writer = SerialExecutor("logto-writer")
        self._slow_writer = SerialExecutor("logto-slow-writer")
        self._reader = SerialExecutor("logto-reader")
        self._long_reader = SerialExecutor("logto-long-reader")
        # With several writers, accepting doesn't wait for a worker's transaction.
        self._acceptor = self._writer if self._one_writer else SerialExecutor("logto-acceptor")
        self._refresher = None if self._one_writer else PoolRefresher()
        self._ours = OurEngine(engine, add_pool, self._refresher)
        self._abandoned: list[Thread] = []

    @property
    def room(self) -> int:
        """How many handlers may be in a transaction at once."""
        return WRITING_HANDLERS if self._one_writer else get_handler_limit(self._engine.pool)

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for errors of the database, and
        WriterBusy in a handler that holds the only writer: they would wait for each other."""
        if HAS_WRITER.get():
            raise WriterBusy()
        return await self._within(RUN_S, self._writer, partial(self._write, work))

    async def run_large(self, work: Callable[[Store], T]) -> T:
        """The same, because all work runs in threads."""
        return await self.run(work)

    async def run_slow(self, work: Callable[[Store], T], statement_s: float) -> T:
        """The same for work of which a statement may take so long, in a thread of its own.

        With one writer, this is `run`, which has no time limit.
        """
        if self._one_writer:
            return await self.run(work)
        write = partial(self._write, work, statement_s=statement_s)
        return await self._within(limit_slow(statement_s), self._slow_writer, write)

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run each statement as a transaction of its own, within a time limit.

        With one writer, this is `run`: it waits its turn, and a file always answers.
        """
        if self._one_writer:
            return await self.run(work)
        add = partial(self._look, lambda connection: work(Store(connection)), ACCEPTS)
        return await self._within(limit_s, self._acceptor, add)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing, and without waiting for a writer."""
        return await self.look(lambda connection: work(Store(connection)), READ_S)

    async def read_long(self, work: Callable[[Store], T]) -> T:
        """The same for work that may take seconds: in another thread, one after the other."""
        read = partial(self._look, lambda connection: work(Store(connection)), self._reads)
        return await self._within(READ_S, self._long_reader, read, is_read=True)

    async def look(self, work: Callable[[sa.Connection], T], limit_s: float) -> T:
        """The same as `read` with the connection itself, within a time limit."""
        read = partial(self._look, work, self._reads)
        return await self._within(limit_s, self._reader, read, is_read=True)

    async def within(self, session: Any, work: Callable[[Store], T], *, writes: bool = True) -> T:
        """Run within the transaction of an application's Session or Connection, in a thread: a lock
        that another session holds must not block the event loop. An AsyncSession or an
        AsyncConnection, such as of aiosqlite, waits by itself.

        Raises SettingInvalid, StoreUnavailable, RowRejected.
        """
        run = partial(run_within, self._engine, self.project, work, writes)
        if hasattr(session, "run_sync"):
            return await run_on_async_session(session, run)
        if not isinstance(session, get_sync_types()):
            raise make_session_error(session, "a Session or a Connection")
        return await DetachedCall[T]().run(partial(run, session))

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """Return the types of session that a handler, `awaited` or not, can ask for.

        A coroutine can't have one: it would block the event loop while it waits for the database.
        """
        return () if awaited else get_sync_types()

    async def handle(
        self, kind: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call `call` with a session of a `kind`, and `finish` in the same transaction.

        If this is cancelled, or the call holds the only writer too long, the call is abandoned and
        loses its transaction. Raises TimeLimitExceeded.
        """
        called = DetachedCall[None](has_writer=self._one_writer)
        handle = partial(self._handle, called, kind, call, finish)
        executor = self._writer if self._one_writer else SerialExecutor("logto-keeper")
        try:
            await executor.run(handle)
        except asyncio.CancelledError:
            called.abandon()
            raise
        finally:
            if executor is not self._writer:
                executor.close(wait_s=0)

    async def close(self) -> None:
        """End threads and close connections. A thread that is stuck is abandoned."""
        self._writer.close(CLOSE_S)
        self._slow_writer.close(CLOSE_S)
        self._reader.close(CLOSE_S)
        self._long_reader.close(CLOSE_S)
        if self._acceptor is not self._writer:
            self._acceptor.close(CLOSE_S)
        if (own := self._ours.own) is not None:
            pool = own.pool
            own.dispose()
            close_returned(pool)
            pool.dispose()  # of those that returned in between

    async def _within(
        self,
        limit_s: float,
        executor: SerialExecutor,
        call: Callable[[HeldConnection], T],
        *,
        is_read: bool = False,
    ) -> T:
        """Run a call on an executor and await its result. The time limit is for servers, which may
        not answer. It starts when a read begins, but at once for other calls. If the caller is
        cancelled, the call is ended and rolled back.

        Raises StoreUnavailable, RowRejected.
        """
        held = HeldConnection()

        def begin() -> T:
            held.begin()
            return call(held)

        if self._refresher is None:
            try:
                return await executor.run(begin)
            except asyncio.CancelledError:
                held.is_abandoned = True
                if is_read:  # the error of a write would close connections
                    held.interrupt()
                raise
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if len(self._abandoned) >= MOST_STUCK:
            raise StoreUnavailable(problem=f"{MOST_STUCK} calls are still waiting for an answer")
        called = asyncio.ensure_future(executor.run(begin))

        def cancel() -> None:
            with suppress(StoreUnavailable):  # then the connection is cut off
                start_thread(Thread(target=held.cancel, name="logto-canceller", daemon=True))

        def abandon() -> None:
            called.cancel()
            if held.has_begun and (thread := executor.abandon()):
                self._abandoned.append(thread)

        end = partial(held.end, called, cancel, abandon)
        if not is_read:
            return await await_within(limit_s, called, end, self._refresher)
        return await await_within(limit_s, called, end, self._refresher, held.left_s)

    def _write(
        self, work: Callable[[Store], T], held: HeldConnection, statement_s: float = STATEMENT_S
    ) -> T:
        # The transaction begins with the first statement: what `work` does before delays nobody.
        try:
            with self._connect(held) as connection:
                store = Store(connection, self.project)
                store.limit_waits(LOCK_S, statement_s)
                result = run_and_project(work, store)
                held.check()
                self._commit(connection)
            self._check_commit()
        except TimedOut:
            raise
        except StoreUnavailable:
            self._reset()
            raise
        return result

    def _handle(
        self,
        called: DetachedCall[None],
        kind: type,
        call: Callable[[Any], Any],
        finish: Callable[[Store], None],
    ) -> None:
        with self._engine.connect() as connection:
            try:
                to_close = self._call_and_finish(connection, called, kind, call, finish)
                connection.commit()
            except BaseException:
                with suppress(sa.exc.SQLAlchemyError):
                    connection.rollback()
                connection.invalidate()  # it may have effects beyond the transaction
                raise
            if to_close:
                connection.invalidate()
        self._check_commit()

    def _call_and_finish(
        self,
        connection: sa.Connection,
        called: DetachedCall[None],
        kind: type,
        call: Callable[[Any], Any],
        finish: Callable[[Store], None],
    ) -> bool:
        """Return whether to close the connection, because others should not get it."""
        watch = ConnectionWatch(connection)
        with handler_savepoint(connection), lend(connection):
            session = make_session(kind, connection)
            if not called.wait(partial(call, session), WRITER_S if self._one_writer else None):
                self._stop(connection)
                connection.invalidate()
                raise TimeLimitExceeded(seconds=WRITER_S)
            finish_session(session)
        to_close = watch.restore()
        finish(Store(connection))
        return to_close

    def _look(
        self, work: Callable[[sa.Connection], T], options: dict[str, Any], held: HeldConnection
    ) -> T:
        with self._connect(held) as connection:
            return work(connection.execution_options(**options))

    @contextmanager
    def _connect(self, held: HeldConnection) -> Iterator[sa.Connection]:
        engine = self._ours.get()
        with (
            translate_errors(engine),
            engine.connect() as connection,
            held.holding(connection),
        ):
            yield connection

    def _commit(self, connection: sa.Connection) -> None:
        try:
            connection.commit()
        except BaseException:
            connection.invalidate()  # SQLite keeps the transaction open
            raise

    def _check_commit(self) -> None:
        """Raise StoreUnavailable if the last commit may be lost."""

    def _reset(self) -> None:
        """Close connections that may still have the cause of the last error."""

    def _stop(self, connection: sa.Connection) -> None:
        """End the statement of a connection, from any thread, and prevent further ones.

        This waits for psycopg's lock: psycopg crashes if it is closed while it sends something.
        """
        driver: Any = connection.connection.driver_connection
        lock = getattr(driver, "lock", None)
        while lock and not lock.acquire(timeout=CANCEL_EVERY_S):
            with suppress(Exception):  # without cancelling, it ends by itself
                driver.cancel_safe(timeout=CANCEL_WAIT_S)
        try:
            driver.close()
        finally:
            if lock:
                lock.release()
