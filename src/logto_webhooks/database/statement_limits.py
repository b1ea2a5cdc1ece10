"""Limit how long statements take that others wait for: in a server, and in SQLite."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Condition, Thread
from typing import Any, Final

import sqlalchemy as sa

from logto_webhooks.event_loop import start_thread

# An option of a connection of SQLite whose transaction is tried again if an interrupted statement
# loses it. Its value is a Losses.
LOSSES: Final = "logto_losses"
# Only until the transaction ends, because the connection may be the application's.
_LIMIT_WAITS: Final = sa.select(
    sa.func.set_config("lock_timeout", sa.bindparam("lock", type_=sa.Text), sa.true()),
    sa.func.set_config("statement_timeout", sa.bindparam("statement", type_=sa.Text), sa.true()),
)
_SELECT_WAITS: Final = sa.select(
    sa.func.current_setting("lock_timeout"), sa.func.current_setting("statement_timeout")
)


class TransactionLost(Exception):
    """SQLite rolled back the whole transaction, because a statement that writes was interrupted."""

    def __init__(self, rows: Sequence[Any]) -> None:
        """`rows` took too long, as far as that is known. They are to be left out when the
        transaction is tried again."""
        super().__init__("rows of the application took too long")
        self.rows = tuple(rows)


class CommitRefused(TransactionLost):
    """SQLite refused the commit, because a deferred foreign key isn't fulfilled."""

    def __init__(self) -> None:
        super().__init__(())


class Losses:
    """How often a transaction was lost, and the rows because of which it was."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: list[Any] = []
        self.checks_keys = False  # whether deferred foreign keys are checked before the commit
        self.is_last_try = False  # in which no rows of the application are written

    def add(self, lost: TransactionLost) -> None:
        """Note that it was lost."""
        self.count += 1
        self.rows += lost.rows
        self.checks_keys |= isinstance(lost, CommitRefused)


def limit_waits(connection: sa.Connection, lock: str, statement: str) -> None:
    """Limit the transaction's waits for locks, and its statements, in PostgreSQL's notation."""
    connection.execute(_LIMIT_WAITS, {"lock": lock, "statement": statement}).close()


def read_waits(connection: sa.Connection) -> tuple[str, str]:
    """Return these limits."""
    lock, statement = connection.execute(_SELECT_WAITS).one()
    return lock, statement


class Watch:
    """What the Interrupter knows of a connection that it watches."""

    def __init__(self, driver: sqlite3.Connection) -> None:
        self.driver = driver
        self.is_over = False
        self.has_interrupted = False


class Interrupter:
    """Interrupts statements of SQLite that take too long. One thread does so for all connections.
    It starts at first use, so that a server may fork before."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._due: dict[Watch, float] = {}
        self._wakes_at = math.inf
        self._thread: Thread | None = None

    @contextmanager
    def watching(self, connection: sa.Connection, seconds: float) -> Iterator[Watch]:
        """Interrupt what the connection does in the block after this time."""
        watch = Watch(_driver_of(connection))
        try:
            self.restart(watch, seconds)
            yield watch
        finally:
            with self._changed:  # nothing is interrupted after that
                watch.is_over = True
                self._due.pop(watch, None)

    def restart(self, watch: Watch, seconds: float) -> None:
        """Let the time begin anew, unless the watch is over. Raises StoreUnavailable if the system
        has no more threads."""
        due = time.monotonic() + seconds
        with self._changed:
            if watch.is_over:
                return
            if self._thread is None or not self._thread.is_alive():
                self._wakes_at = due
                self._thread = Thread(target=self._run, name="logto-interrupter", daemon=True)
                start_thread(self._thread)  # which waits until this is over
            self._due[watch] = due
            if due < self._wakes_at:  # mostly, it wakes earlier, and then sees this
                self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for watch in [watch for watch, due in self._due.items() if due <= now]:
                    del self._due[watch]
                    watch.has_interrupted = True
                    with suppress(sqlite3.Error):
                        watch.driver.interrupt()
                self._wakes_at = min(self._due.values(), default=math.inf)
                wait_s = None if self._wakes_at == math.inf else self._wakes_at - now
                self._changed.wait(wait_s)


def has_transaction(connection: sa.Connection) -> bool:
    """Whether a connection of SQLite still has its transaction."""
    return _driver_of(connection).in_transaction


def _driver_of(connection: sa.Connection) -> sqlite3.Connection:
    driver = connection.connection.dbapi_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


INTERRUPTER: Final = Interrupter()
