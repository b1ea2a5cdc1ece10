"""Time limits for a database that doesn't answer, and which connections to distrust."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError

from logto_webhooks.database.diagnostics import diagnose
from logto_webhooks.database.sessions import THEIRS
from logto_webhooks.database.store import LOCK_S, STATEMENT_S, Store

# Accepting: each statement is a transaction, so that no silent connection leaves one open.
ACCEPTS: Final[dict[str, Any]] = {"isolation_level": "AUTOCOMMIT", "logto_accepts": True}
RUN_S: Final = 10.0  # a transaction of ours, which is meant to take a second
READ_S: Final = 15.0
CANCEL_S: Final = 0.5  # for the server to confirm that it cancelled
CUT_S: Final = 0.5  # for what was cut off to end
CLOSE_S: Final = 1.0
MOST_LEFT: Final = 8  # calls that may be left behind at once
_BORN: Final = "logto_connected_at"


def limited(store: Store) -> Store:
    """Limit the waits of a transaction of ours that begins: for a lock, and for a statement."""
    store.limit_waits(LOCK_S, STATEMENT_S)
    return store


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

    def release(self) -> None:
        """Note that it is given back: from now on it may be somebody else's."""
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
