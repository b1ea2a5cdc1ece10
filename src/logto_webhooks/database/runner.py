"""Run transactions: the interfaces, and what both runners do when a database doesn't answer."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError

from logto_webhooks.database.errors import diagnose
from logto_webhooks.database.store import Store
from logto_webhooks.errors import StoreUnavailable

T = TypeVar("T")
# Accepting: each statement is a transaction, so that no silent connection leaves one open.
ACCEPTS: Final[dict[str, Any]] = {"isolation_level": "AUTOCOMMIT", "logto_accepts": True}
RUN_S: Final = 10.0  # a transaction of ours, which is meant to take a second
READ_S: Final = 15.0
CANCEL_S: Final = 0.5  # for the server to confirm that it cancelled
CUT_S: Final = 0.5  # for what was cut off to end
CLOSE_S: Final = 1.0
_BORN: Final = "logto_connected_at"
THEIRS: Final = "logto_theirs"  # an option of a connection while a handler has it


class TransactionRunner(Protocol):
    """Runs functions of a Store, each in one transaction."""

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for what the database says."""

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
            raise TimeoutError("nobody waits for it any more")

    @contextmanager
    def holding(self, connection: sa.Connection) -> Iterator[None]:
        """The same until it is given back: from then on it may be somebody else's."""
        self.hold(connection)
        try:
            yield
        finally:
            self._driver = None

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


def _is_of_handler(connection: sa.Connection | None) -> bool:
    return connection is not None and bool(connection.get_execution_options().get(THEIRS))


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
        if context.engine is not self._engine or _is_of_handler(context.connection):
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
