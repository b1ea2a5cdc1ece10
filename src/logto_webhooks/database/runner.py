"""Run transactions: the interfaces, what is done when a database doesn't answer, and how a
synchronous engine runs them in threads."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Thread
from typing import Any, ClassVar, Final, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError

from logto_webhooks.database.errors import diagnose, translate_errors
from logto_webhooks.database.sessions import (
    THEIRS,
    Traces,
    finish_session,
    handler_savepoint,
    lend,
    make_session,
    no_session,
    our_schema,
    pool_limit,
    sync_types,
)
from logto_webhooks.database.store import LOCK_S, STATEMENT_S, Store
from logto_webhooks.database.threads import HAS_WRITER, DetachedCall, SerialExecutor
from logto_webhooks.errors import StoreUnavailable, TimedOut, TimeLimitExceeded, WriterBusy

T = TypeVar("T")
# Accepting: each statement is a transaction, so that no silent connection leaves one open.
ACCEPTS: Final[dict[str, Any]] = {"isolation_level": "AUTOCOMMIT", "logto_accepts": True}
RUN_S: Final = 10.0  # a transaction of ours, which is meant to take a second
READ_S: Final = 15.0
CANCEL_S: Final = 0.5  # for the server to confirm that it cancelled
CUT_S: Final = 0.5  # for what was cut off to end
CLOSE_S: Final = 1.0
_BORN: Final = "logto_connected_at"
LONGEST_S: Final = 2.0  # that a handler may hold the one writer: accepting waits meanwhile
IN_TURN: Final = 1  # handler in its line: who accepts waits for no more, nor does one's time
MOST_LEFT: Final = 8  # calls that may be left behind at once
CANCEL_WAIT_S: Final = 3.0
CANCEL_EVERY_S: Final = 0.1


class TransactionRunner(Protocol):
    """Runs functions of a Store, each in one transaction."""

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for what the database says."""

    async def run_large(self, work: Callable[[Store], T]) -> T:
        """The same for work with large values: it holds back nobody else on this event loop."""

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run `Store.add` alone, each statement committed by itself, within a limit.

        A connection that doesn't answer is thrown away, and so are all others of its age. What
        was given up may be stored all the same. Raises as `run`.
        """

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing, and without waiting for who writes."""

    async def close(self) -> None:
        """Give back threads and connections."""


class HandlerRunner(TransactionRunner, Protocol):
    """A runner that lets handlers take part in its transactions."""

    @property
    def room(self) -> int:
        """For how many handlers there is room."""

    async def within(self, session: Any, work: Callable[[Store], T]) -> T:
        """Run within the transaction of an application's session, which it ends by itself.

        Raises SettingInvalid for a session that can't be used here, and what `run` raises.
        """

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """The kinds of transaction that a handler, `awaited` or not, can ask for by annotation."""

    async def handle(
        self, wish: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with the transaction that was wished for, await what it returns if need be, and
        let `finish` end in the same one. All is rolled back if either raises.

        Raises what they raise, and StoreUnavailable.
        """


async def run_or_rehearse(runner: TransactionRunner, work: Callable[[Store], T], dry: bool) -> T:
    """Run work in a transaction; with `dry`, roll it back and return its result all the same."""
    if not dry:
        return await runner.run(work)
    results: list[T] = []

    def rehearse(store: Store) -> T:
        results.append(work(store))
        raise _RolledBack

    try:
        return await runner.run(rehearse)
    except _RolledBack:
        return results[-1]


class _RolledBack(Exception):
    """Rolls the transaction back."""


class Held:
    """The connection that a call holds, known to whoever may have to cut it off."""

    def __init__(self) -> None:
        self.left = False  # nobody waits for the call any more
        self._driver: Any = None

    def hold(self, connection: sa.Connection) -> None:
        """Note what is held. Raises TimeoutError if nobody waits any more."""
        self._driver = connection.connection.driver_connection
        self.check()

    def check(self) -> None:
        """Raise TimeoutError if nobody waits any more: what was done must not be committed."""
        if self.left:
            raise TimeoutError("its caller no longer waits for it")

    @contextmanager
    def holding(self, connection: sa.Connection) -> Iterator[None]:
        """The same until it is given back: from then on it may be somebody else's."""
        self.hold(connection)
        try:
            yield
        finally:
            self._driver = None

    async def end(
        self, call: asyncio.Future[Any], cancel: Callable[[], Any], leave: Callable[[], Any]
    ) -> None:
        """Wait for the call no longer: `cancel` its statement, else cut its connection off, else
        `leave` it behind."""
        self.left = True
        cancel()
        done, _ = await asyncio.wait({call}, timeout=CANCEL_S)
        if not done:
            self.cut()
            done, _ = await asyncio.wait({call}, timeout=CUT_S)
        if not done:
            leave()
        elif not call.cancelled():
            call.exception()  # or asyncio would log that nobody looked at it

    def cancel(self) -> None:
        """Ask the server to cancel the statement, if the driver is used from threads; blocking."""
        driver = self._driver
        with suppress(Exception):  # what can't be cancelled is cut off
            if hasattr(driver, "cancel_safe"):
                driver.cancel_safe(timeout=CANCEL_S)
            else:
                driver.cancel()

    def cut(self) -> None:
        """Cut the connection off, from any thread, so that its call fails at once."""
        driver = self._driver
        with suppress(Exception):  # it may be closed already
            if hasattr(driver, "terminate"):  # asyncpg
                driver.terminate()
            elif driver is not None:
                with socket.socket(fileno=os.dup(driver.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Close what was cut off, if the driver is used on this loop."""
        with suppress(Exception):
            await self._driver.close()


async def await_within(
    limit_s: float,
    call: asyncio.Future[T],
    end: Callable[[], Awaitable[None]],
    distrust: Distrust | None,
) -> T:
    """Await a call for so long, or until the caller is cancelled; then `end` it.

    Raises StoreUnavailable if there is no result.
    """
    try:
        done, _ = await asyncio.wait({call}, timeout=limit_s)
    except asyncio.CancelledError:
        await end()
        raise
    if not done:
        if distrust is not None:
            distrust.begin()
        await end()
    if call.cancelled() or not call.done():
        raise StoreUnavailable(problem=f"no answer within {limit_s:g} s")
    return call.result()


class Distrust:
    """Replaces the connections of a pool that are older than the last one that was silent, or than
    the last error that a session may have from when it began, such as that it is read-only."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._since = 0.0
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "checkout", self._checked_out)
        event.listen(engine, "close", self._closing)
        event.listen(engine, "handle_error", self._failed)

    def begin(self) -> None:
        """Trust no connection that is open now."""
        self._since = time.monotonic()

    def _connected(self, connection: Any, record: Any) -> None:
        record.info[_BORN] = time.monotonic()

    def _checked_out(self, connection: Any, record: Any, proxy: Any) -> None:
        if self._distrusts(record):
            raise InvalidatePoolError()

    def _failed(self, context: sa.engine.ExceptionContext) -> None:
        options = context.connection.get_execution_options() if context.connection else {}
        if context.engine is not self._engine or options.get(THEIRS):
            return  # an error in the application's own SQL, of which there may be many
        diagnostics = diagnose(context.original_exception)
        if diagnostics is not None and diagnostics.is_of_session:
            self.begin()

    def _closing(self, connection: Any, record: Any) -> None:
        # asyncpg would wait for a farewell that never comes.
        driver: Any = getattr(connection, "driver_connection", None)
        if self._distrusts(record) and hasattr(driver, "terminate"):
            driver.terminate()

    def _distrusts(self, record: Any) -> bool:
        return bool(self._since) and record.info.get(_BORN, 0.0) <= self._since


class ThreadRunner:
    """Runs work on `engine`; what waits is written in the order in which it came."""

    _reads: ClassVar[dict[str, Any]] = {}  # options of a connection that only reads
    _one_writer = False  # whether the database has but one, so that handlers write in its turn

    def __init__(self, engine: sa.Engine, owns: bool = True, theirs: Any = None) -> None:
        """`owns`: whether to dispose of the engine at the end. `theirs`: the application's
        `translation`."""
        self._engine = engine
        self._owns = owns
        self._theirs = theirs
        self._writer = SerialExecutor("logto-writer")
        self._reader = SerialExecutor("logto-reader")
        # Whoever accepts waits for no worker where several can write.
        self._acceptor = self._writer if self._one_writer else SerialExecutor("logto-acceptor")
        self._distrust = None if self._one_writer else Distrust(engine)
        self._left: list[Thread] = []

    @property
    def room(self) -> int:
        """How many handlers may be in a transaction at once."""
        return IN_TURN if self._one_writer else pool_limit(self._engine.pool)

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for what the database says, and
        WriterBusy where that would wait for who waits for it."""
        if HAS_WRITER.get():
            raise WriterBusy()
        return await self._within(RUN_S, self._writer, partial(self._write, work))

    async def run_large(self, work: Callable[[Store], T]) -> T:
        """The same: all work has a thread."""
        return await self.run(work)

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run each statement as a transaction of its own, within a limit.

        With one writer this is `run`: it waits in line, and a file isn't silent.
        """
        if self._one_writer:
            return await self.run(work)
        add = partial(self._look, lambda connection: work(Store(connection)), ACCEPTS)
        return await self._within(limit_s, self._acceptor, add)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing, and without waiting for who writes."""
        return await self.look(lambda connection: work(Store(connection)), READ_S)

    async def look(self, work: Callable[[sa.Connection], T], limit_s: float) -> T:
        """The same with the connection itself, within a limit."""
        return await self._within(limit_s, self._reader, partial(self._look, work, self._reads))

    async def within(self, session: Any, work: Callable[[Store], T]) -> T:
        """Run within the transaction of an application's Session or Connection, on this thread.

        Raises SettingInvalid, StoreUnavailable, RowRejected.
        """
        is_usable = isinstance(session, sync_types())
        if not is_usable:
            raise no_session(session, "a Session or a Connection")
        connection = session if isinstance(session, sa.Connection) else session.connection()
        with translate_errors(self._engine), our_schema(self._engine, connection):
            return work(Store(connection))

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """The kinds of transaction that a handler, `awaited` or not, can ask for by annotation.

        What is awaited can't have one: it would stop the event loop as long as the database takes.
        """
        return () if awaited else sync_types()

    async def handle(
        self, wish: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with the transaction that was wished for, and let `finish` end in the same one.

        Who is cancelled, or holds the one writer too long, is left behind, without its
        transaction. Raises TimeLimitExceeded.
        """
        called = DetachedCall[None](has_writer=self._one_writer)
        handle = partial(self._handle, called, wish, call, finish)
        lane = self._writer if self._one_writer else SerialExecutor("logto-keeper")
        try:
            await lane.run(handle)
        except asyncio.CancelledError:
            called.leave()
            raise
        finally:
            if lane is not self._writer:
                lane.close(wait_s=0)

    async def close(self) -> None:
        """Give back threads and connections; a thread that is stuck is left behind."""
        self._writer.close(CLOSE_S)
        self._reader.close(CLOSE_S)
        if self._acceptor is not self._writer:
            self._acceptor.close(CLOSE_S)
        if self._owns:
            self._engine.dispose()

    async def _within(self, limit_s: float, lane: SerialExecutor, call: Callable[[Held], T]) -> T:
        """Call on a lane and await the result, for so long where a server may fall silent. If the
        caller is cancelled, the call is ended, and what it wrote is rolled back.

        Raises StoreUnavailable, RowRejected.
        """
        held = Held()
        if self._distrust is None:
            try:
                return await lane.run(partial(call, held))
            except asyncio.CancelledError:
                held.left = True
                raise
        self._left = [thread for thread in self._left if thread.is_alive()]
        if len(self._left) >= MOST_LEFT:
            raise StoreUnavailable(problem=f"{MOST_LEFT} calls are still waiting for an answer")
        called = asyncio.ensure_future(lane.run(partial(call, held)))

        def cancel() -> None:
            Thread(target=held.cancel, name="logto-canceller", daemon=True).start()

        def leave() -> None:
            called.cancel()
            if thread := lane.leave():
                self._left.append(thread)

        end = partial(held.end, called, cancel, leave)
        return await await_within(limit_s, called, end, self._distrust)

    def _write(self, work: Callable[[Store], T], held: Held) -> T:
        # The transaction begins with the first statement: planning holds back nobody.
        try:
            with self._connect(held) as connection:
                store = Store(connection)
                store.limit_waits(LOCK_S, STATEMENT_S)
                result = work(store)
                held.check()
                connection.commit()
            self._trust_commit()
        except TimedOut:
            raise
        except StoreUnavailable:
            self._begin_anew()
            raise
        return result

    def _handle(
        self,
        called: DetachedCall[None],
        wish: type,
        call: Callable[[Any], Any],
        finish: Callable[[Store], None],
    ) -> None:
        with self._engine.connect() as connection:
            try:
                to_close = self._call_and_finish(connection, called, wish, call, finish)
                connection.commit()
            except BaseException:
                with suppress(sa.exc.SQLAlchemyError):
                    connection.rollback()
                connection.invalidate()  # not all that it did ends with its transaction
                raise
            if to_close:
                connection.invalidate()
        self._trust_commit()

    def _call_and_finish(
        self,
        connection: sa.Connection,
        called: DetachedCall[None],
        wish: type,
        call: Callable[[Any], Any],
        finish: Callable[[Store], None],
    ) -> bool:
        """Return whether the connection is to be closed, because nobody else should have it."""
        traces = Traces(connection)
        with handler_savepoint(connection), lend(connection, self._theirs):
            session = make_session(wish, connection)
            if not called.wait(partial(call, session), LONGEST_S if self._one_writer else None):
                self._stop(connection)
                connection.invalidate()
                raise TimeLimitExceeded(seconds=LONGEST_S)
            finish_session(session)
        to_close = traces.put_back()
        finish(Store(connection))
        return to_close

    def _look(self, work: Callable[[sa.Connection], T], options: dict[str, Any], held: Held) -> T:
        with self._connect(held) as connection:
            return work(connection.execution_options(**options))

    @contextmanager
    def _connect(self, held: Held) -> Iterator[sa.Connection]:
        with (
            translate_errors(self._engine),
            self._engine.connect() as connection,
            held.holding(connection),
        ):
            yield connection

    def _trust_commit(self) -> None:
        """Raise StoreUnavailable when what was just committed may be lost."""

    def _begin_anew(self) -> None:
        """Let go of connections that may remember why the database couldn't be used."""

    def _stop(self, connection: sa.Connection) -> None:
        """End what is done on a connection, from any thread, and let nothing more be done.

        psycopg crashes when it is closed while it sends something: its lock is waited for.
        """
        driver: Any = connection.connection.driver_connection
        lock = getattr(driver, "lock", None)
        while lock and not lock.acquire(timeout=CANCEL_EVERY_S):
            with suppress(Exception):  # what can't be cancelled ends by itself
                driver.cancel_safe(timeout=CANCEL_WAIT_S)
        try:
            driver.close()
        finally:
            if lock:
                lock.release()
