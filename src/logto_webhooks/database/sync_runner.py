"""Run transactions on a synchronous engine, in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from logto_webhooks.database.detached_call import HAS_WRITER, DetachedCall
from logto_webhooks.database.errors import translate_errors
from logto_webhooks.database.serial_executor import SerialExecutor
from logto_webhooks.database.session_state import Traces
from logto_webhooks.database.sessions import (
    SYNC,
    app_schema,
    finish_session,
    handler_savepoint,
    make_session,
    no_session,
    our_schema,
    pool_limit,
)
from logto_webhooks.database.store import Store
from logto_webhooks.database.time_limits import (
    ACCEPTS,
    CANCEL_S,
    CUT_S,
    MOST_LEFT,
    READ_S,
    RUN_S,
    Distrust,
    Held,
    limited,
)
from logto_webhooks.errors import StoreUnavailable, TimedOut, TimeLimitExceeded, WriterBusy

T = TypeVar("T")
LONGEST_S: Final = 2.0  # that a handler may hold the one writer: accepting waits meanwhile
IN_TURN: Final = 1  # handler in its line: who accepts waits for no more, nor does one's time
CLOSE_S: Final = 1.0


class ThreadRunner:
    """Runs work on `engine`; what waits is written in the order in which it came."""

    def __init__(
        self,
        engine: sa.Engine,
        bind: Callable[[sa.Connection], Store],
        reads: dict[str, bool],
        committed: Callable[[], None],
        failed: Callable[[], None],
        stop: Callable[[sa.Connection], None],
        owns: bool = True,
        one_writer: bool = False,
        theirs: Any = None,
    ) -> None:
        """`committed` is called after each commit, and raises when that can't be trusted;
        `failed` when the database can't be used. `stop` ends what is done on a connection, from
        any thread, and lets nothing more be done. `owns`: whether to dispose of the engine at the
        end. `one_writer`: whether the database has but one, so that handlers write in its turn.
        `theirs`: the application's `translation`."""
        self._engine = engine
        self._bind = bind
        self._reads = reads
        self._owns = owns
        self._committed = committed
        self._failed = failed
        self._stop = stop
        self._one_writer = one_writer
        self._theirs = theirs
        self._writer = SerialExecutor("logto-writer")
        self._reader = SerialExecutor("logto-reader")
        # Whoever accepts waits for no worker where several can write.
        self._acceptor = self._writer if one_writer else SerialExecutor("logto-acceptor")
        self._distrust = None if one_writer else Distrust(engine)
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

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run each statement as a transaction of its own, within a limit.

        With one writer this is `run`: it waits in line, and a file isn't silent.
        """
        if self._one_writer:
            return await self.run(work)
        return await self._within(limit_s, self._acceptor, partial(self._accept, work))

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing, and without waiting for who writes."""
        return await self.look(lambda connection: work(self._bind(connection)), READ_S)

    async def look(self, work: Callable[[sa.Connection], T], limit_s: float) -> T:
        """The same with the connection itself, within a limit."""
        return await self._within(limit_s, self._reader, partial(self._read, work))

    async def within(self, session: Any, work: Callable[[Store], T]) -> T:
        """Run within the transaction of an application's Session or Connection, on this thread.

        Raises SettingInvalid, StoreUnavailable, RowRejected.
        """
        if not isinstance(session, Session | sa.Connection):
            raise no_session(session, "a Session or a Connection")
        connection = session if isinstance(session, sa.Connection) else session.connection()
        with translate_errors(self._engine), our_schema(self._engine, connection):
            return work(self._bind(connection))

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """The kinds of transaction that a handler, `awaited` or not, can ask for by annotation.

        What is awaited can't have one: it would stop the event loop as long as the database takes.
        """
        return () if awaited else SYNC

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
            raise StoreUnavailable(problem=f"{MOST_LEFT} calls still wait for an answer")
        called = asyncio.ensure_future(lane.run(partial(call, held)))
        try:
            done, _ = await asyncio.wait({called}, timeout=limit_s)
        except asyncio.CancelledError:
            await self._end(called, lane, held)
            raise
        if not done:
            self._distrust.begin()
            await self._end(called, lane, held)
        if called.cancelled() or not called.done():
            raise StoreUnavailable(problem=f"no answer within {limit_s:g} s")
        return called.result()

    async def _end(self, called: asyncio.Future[Any], lane: SerialExecutor, held: Held) -> None:
        """Cancel the statement, else cut its connection off, or leave its thread behind."""
        held.left = True
        Thread(target=held.cancel, name="logto-canceller", daemon=True).start()
        done, _ = await asyncio.wait({called}, timeout=CANCEL_S)
        if not done:
            held.cut()
            done, _ = await asyncio.wait({called}, timeout=CUT_S)
        if not done:
            called.cancel()
            if thread := lane.leave():
                self._left.append(thread)
        elif not called.cancelled():
            called.exception()  # or asyncio would log that nobody looked at it

    def _write(self, work: Callable[[Store], T], held: Held) -> T:
        # The transaction begins with the first statement: planning holds back nobody.
        try:
            with translate_errors(self._engine), self._engine.connect() as connection:
                held.hold(connection)
                try:
                    result = work(limited(self._bind(connection)))
                    held.check()
                    connection.commit()
                finally:
                    held.release()
            self._committed()
        except TimedOut:
            raise
        except StoreUnavailable:
            self._failed()
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
        self._committed()

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
        with handler_savepoint(connection), app_schema(connection, self._theirs):
            given = make_session(wish, connection)
            if not called.waited(partial(call, given), LONGEST_S if self._one_writer else None):
                self._take_back(connection)
                raise TimeLimitExceeded(seconds=LONGEST_S)
            finish_session(given)
        to_close = traces.put_back()
        finish(self._bind(connection))
        return to_close

    def _take_back(self, connection: sa.Connection) -> None:
        """End the transaction of a handler that may still run."""
        self._stop(connection)
        connection.invalidate()

    def _accept(self, work: Callable[[Store], T], held: Held) -> T:
        with translate_errors(self._engine), self._engine.connect() as connection:
            held.hold(connection)
            try:
                return work(self._bind(connection.execution_options(**ACCEPTS)))
            finally:
                held.release()

    def _read(self, work: Callable[[sa.Connection], T], held: Held) -> T:
        with translate_errors(self._engine), self._engine.connect() as connection:
            held.hold(connection)
            try:
                return work(connection.execution_options(**self._reads))
            finally:
                held.release()
