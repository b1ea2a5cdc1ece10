"""The thread host: a synchronous engine, one thread that writes and one that reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from logto_webhooks.adapters.hosts.failures import translated
from logto_webhooks.adapters.hosts.sessions import (
    SYNC,
    end_sync,
    no_session,
    still_ours,
    sync_wish,
    translated_as,
    untranslated,
)
from logto_webhooks.core.ports import Store
from logto_webhooks.errors import StoreUnavailable, TimeLimitExceeded

T = TypeVar("T")
LONGEST_S: Final = 2.0  # that a handler may hold the writer: accepting waits meanwhile


class ThreadHost:
    """Runs work on `engine`; what waits is written in the order in which it came.

    Threads start on first use, so that a server may fork before.
    """

    def __init__(
        self,
        engine: sa.Engine,
        bind: Callable[[sa.Connection], Store],
        reads: dict[str, bool],
        committed: Callable[[], None],
        failed: Callable[[], None],
        owns: bool = True,
    ) -> None:
        """`committed` is called after each commit, and raises when that can't be trusted;
        `failed` when the database can't be used. `owns`: whether to dispose of the engine at the
        end."""
        self._engine = engine
        self._bind = bind
        self._reads = reads
        self._owns = owns
        self._committed = committed
        self._failed = failed
        self._threads()

    def _threads(self) -> None:
        self._writer = ThreadPoolExecutor(1, "logto-writer")
        self._reader = ThreadPoolExecutor(1, "logto-reader")

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for what the database says."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writer, self._write, work)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing, and without waiting for who writes."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reader, self._read, work)

    async def within(self, session: Any, work: Callable[[Store], T]) -> T:
        """Run within the transaction of an application's Session or Connection, on this thread.

        Raises SettingInvalid, StoreUnavailable, RowRejected.
        """
        if not isinstance(session, Session | sa.Connection):
            raise no_session(session, "a Session or a Connection")
        connection = session if isinstance(session, sa.Connection) else session.connection()
        with translated(), translated_as(self._engine, connection):
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

        Raises TimeLimitExceeded if it held the writer so long that who accepts had to wait.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, self._handle, wish, call, finish)

    async def close(self) -> None:
        """Give back threads and connections; it can be used again, as in an application that is
        started twice."""
        self._writer.shutdown()
        self._reader.shutdown()
        self._threads()
        if self._owns:
            self._engine.dispose()

    def _write(self, work: Callable[[Store], T]) -> T:
        # The transaction begins with the first statement: planning holds back nobody.
        try:
            with translated(), self._engine.connect() as connection:
                result = work(self._bind(connection))
                connection.commit()
            self._committed()
        except StoreUnavailable:
            self._failed()
            raise
        return result

    def _handle(
        self, wish: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        with self._engine.begin() as connection:
            begun, started = connection.get_transaction(), time.monotonic()
            with untranslated(connection):
                given = sync_wish(wish, connection)
                call(given)
                end_sync(given)
            if time.monotonic() - started > LONGEST_S:
                raise TimeLimitExceeded(seconds=LONGEST_S)
            still_ours(connection, begun)
            finish(self._bind(connection))
        self._committed()

    def _read(self, work: Callable[[Store], T]) -> T:
        with translated(), self._engine.connect() as connection:
            return work(self._bind(connection.execution_options(**self._reads)))
