"""How long the application's rows may take in one transaction, because others wait for it.

On PostgreSQL, these are deliveries about the same records. On SQLite, which has one writer, it is
everybody, and a statement that is interrupted loses the whole transaction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import sqlalchemy as sa

from logto_webhooks.database.mapped_rows import RowState
from logto_webhooks.database.runner import WRITER_S
from logto_webhooks.database.sessions import INTERNAL
from logto_webhooks.database.statement_limits import (
    INTERRUPTER,
    LOSSES,
    Losses,
    TransactionLost,
    Watch,
    has_transaction,
    limit_waits,
    read_waits,
)
from logto_webhooks.database.store import STATEMENT_S
from logto_webhooks.errors import RowRejected, TimedOut
from logto_webhooks.mapping import functions
from logto_webhooks.mapping.functions import FunctionCaller
from logto_webhooks.records.record import Key

T = TypeVar("T")
SHORT_LOCK_MS: Final = 50
SHORT_STATEMENT_MS: Final = 300
SEARCH_S: Final = 1.5  # for the rows that wait for a lock, or take long, among others
MOST_FAILURES: Final = 6
LONG_S: Final = 1.5  # rows that take so long make the next transactions careful
CAREFUL_S: Final = 60.0
# For a statement in a transaction of one record: less than what a new mapping waits for that.
ONE_RECORD_S: Final = 45.0

SERVER_S: Final = 9.0  # for all statements on own rows in a transaction, less than RUN_S
FILE_S: Final = WRITER_S  # the same with one writer
LEAST_S: Final = 0.2
FEW_CULPRITS: Final = 8

Culprit = tuple[str, RowState]  # a mapping's name, and a row of it with the state that it gets


def find_refusal(error: BaseException | None) -> RowRejected | None:
    """Find why a row was refused, if an error hides it: that of a savepoint that is gone."""
    while error is not None and not isinstance(error, RowRejected):
        error = error.__cause__ or error.__context__
    return error


class Caution:
    """Remembers for some time that a row took long, as others then probably do."""

    def __init__(self) -> None:
        self._until = 0.0

    def renew(self) -> None:
        """Be careful from now on."""
        self._until = time.monotonic() + CAREFUL_S

    @property
    def is_due(self) -> bool:
        """Whether to be careful."""
        return time.monotonic() < self._until


class RowLimits:
    """The time limits of the application's rows in one transaction.

    Usually, rows may take as long as any statement, and on SQLite as long as a handler. When one
    has taken too long, or was locked, all others get short limits, and those that aren't written
    soon are owed. With caution, the limits are short from the beginning. If the transaction is for
    a record that is written alone, each row may take as long as the runner allows. Reading always
    may: it isn't done row by row. All of it together must end before the runner gives up.
    """

    def __init__(
        self, connection: sa.Connection, caution: Caution | None = None, *, is_alone: bool = False
    ) -> None:
        """`caution` is the process's."""
        options = connection.get_execution_options()
        self._connection = connection
        self._caution = caution or Caution()
        self._is_server = connection.dialect.name == "postgresql"
        losses: Losses | None = options.get(LOSSES)
        self._interrupts = losses is not None
        self.is_retry = losses is not None and losses.count > 0
        self.is_last_try = losses is not None and losses.is_last_try
        self.checks_keys = losses is not None and losses.checks_keys
        # Those that made SQLite roll back the whole transaction when it was tried before.
        self.culprits: Sequence[Culprit] = () if losses is None else losses.rows
        self.is_alone = is_alone
        self.only_record: Key | None = None  # if the transaction is for a single one
        has_time = is_alone and self._is_server
        self._functions = FunctionCaller(functions.ALONE_S if has_time else functions.SHARED_S)
        self._is_ours = self._interrupts or (self._is_server and not options.get(INTERNAL))
        self.are_short = self._is_ours and not is_alone and self._caution.is_due
        self._is_writing = False
        # Until then, statements on the application's tables must be done.
        self._ends_by = time.monotonic() + (FILE_S if self._interrupts else SERVER_S)
        self.is_over = False  # whether they aren't
        self._ends_at: float | None = None
        self._failures = 0  # one after the other
        self._watch: Watch | None = None
        self.lost: TransactionLost | None = None

    @property
    def is_search(self) -> bool:
        """Whether rows are written one by one, to find what made SQLite roll back the transaction:
        many that take long would take too long together."""
        few = len(self.culprits) < FEW_CULPRITS
        return self.is_retry and (few or all(row.state == "conflict" for _, row in self.culprits))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the limits to the block: all that is done in a savepoint."""
        if not self._interrupts:
            yield
            return
        with INTERRUPTER.watching(self._connection, WRITER_S) as self._watch:
            yield

    def begin_rows(self) -> None:
        """Note that rows are written from now on."""
        if self._ends_at is None and (self.are_short or self.is_alone):
            self._ends_at = time.monotonic() + (ONE_RECORD_S if self.is_alone else SEARCH_S)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Limit and note how long the rows take that are written in the block, a savepoint."""
        usual = self._set_short()
        self._is_writing = True
        began = time.monotonic()
        try:
            yield
        finally:
            self._is_writing = False
            self._restart()
            if time.monotonic() - began > LONG_S:
                self._caution.renew()
        # If the block fails, its savepoint is rolled back, and that restores the server's limits.
        if usual is not None:
            limit_waits(self._connection, *usual)

    def begin_statement(self) -> None:
        """Limit a statement on the application's tables. Raises TimedOut if such statements have
        taken too long in this transaction."""
        if not self._is_ours or (self.is_alone and self._is_server):
            return
        left_s = self._ends_by - time.monotonic()
        if left_s <= LEAST_S:
            self.is_over = True
            self._caution.renew()
            raise TimedOut(problem="reading and writing the application's rows takes too long")
        self._restart(left_s)
        if self._is_server and left_s < STATEMENT_S and not (self._is_writing and self.are_short):
            limit_waits(self._connection, read_waits(self._connection)[0], f"{left_s * 1000:.0f}ms")

    def call(
        self, mapping: str, function: Callable[[Any], T], rows: Mapping[str, Any]
    ) -> dict[str, T | Exception]:
        """Call a function of a mapping as FunctionCaller does: it has a limit of its own."""
        results = self._functions.call(mapping, function, rows)
        self._restart()
        return results

    def _restart(self, most_s: float = WRITER_S) -> None:
        """Let the time of a statement begin anew (SQLite)."""
        if self._watch is not None:
            is_short = self._is_writing and self.are_short
            seconds = SHORT_STATEMENT_MS / 1000 if is_short else WRITER_S
            INTERRUPTER.restart(self._watch, min(seconds, most_s))

    def note_failure(self) -> None:
        """Note that rows couldn't be written, perhaps because the table can't be used."""
        self._failures += 1

    def note_time_out(self) -> None:
        """Note that rows have timed out."""
        self._failures += 1
        self._caution.renew()
        if self._is_ours and not self.is_alone:
            self.are_short = True
            self.begin_rows()

    def note_written(self) -> None:
        """Note that rows could be written, so it isn't all of them that fail."""
        self._failures = 0

    @property
    def are_over(self) -> bool:
        """Whether nothing more is tried in this transaction: the time is over, or the whole table
        seems to be locked, or can't be used."""
        if self.is_over or self._failures >= MOST_FAILURES:
            return True
        return self._ends_at is not None and time.monotonic() > self._ends_at

    @property
    def can_go_on(self) -> bool:
        """Whether anything can still be written in the transaction."""
        if self._connection.invalidated:
            return False
        return not self._interrupts or has_transaction(self._connection)

    def is_transaction_lost(self, error: Exception) -> bool:
        """Return whether SQLite has rolled back the transaction because a row took too long or was
        refused (`ON CONFLICT ROLLBACK`). Raises the error if nothing can be written for another
        reason."""
        if self._connection.invalidated:
            raise error
        if self.can_go_on:
            return False
        if find_refusal(error) is not None:
            return True
        if self._watch is None or not self._watch.has_interrupted:
            raise error
        self._caution.renew()
        return True

    def describe(self, *, reading: bool = False) -> str:
        """Say how long writing a row, or `reading` for it, may take."""
        if self.are_short and not reading:
            return f"{SHORT_STATEMENT_MS}ms"
        return read_waits(self._connection)[1] if self._is_server else f"{WRITER_S:g}s"

    def _set_short(self) -> tuple[str, str] | None:
        """Set the server's short limits, if they are to be short. Return the usual ones."""
        if not (self._is_server and self.are_short):
            return None
        usual = read_waits(self._connection)
        limit_waits(self._connection, f"{SHORT_LOCK_MS}ms", f"{SHORT_STATEMENT_MS}ms")
        return usual
