"""Write planned rows of one of the application's tables, in the mirror's transaction.

A batch of rows is written in one savepoint. If the database refuses it, it is divided until the
culprit is alone; that stays a conflict and holds back nothing else. A row that takes too long is
owed, and written in a transaction of its own: everybody else's rows and deliveries would wait.
"""

from __future__ import annotations

import enum
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final, Literal, TypeVar
from uuid import UUID

import sqlalchemy as sa
from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.canonical_json import is_equal
from logto_webhooks.database.errors import diagnose, place_of, translate_errors
from logto_webhooks.database.mapped_rows import (
    ALONE,
    RowState,
    StateStore,
    can_be_decoded,
    encode_id,
)
from logto_webhooks.database.sessions import INTERNAL, OF_APPLICATION
from logto_webhooks.database.statement_limits import TransactionLost
from logto_webhooks.errors import RowRejected, StoreUnavailable, TimedOut
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.declare_pairs import PairMapping
from logto_webhooks.mapping.deletions import DeletionGuard
from logto_webhooks.mapping.ends import Former
from logto_webhooks.mapping.functions import NOT_CALLED, NotCalled, NotEvaluated, TooSlow
from logto_webhooks.mapping.primary_keys import describe_null, describe_unknown, make_conditions
from logto_webhooks.mapping.references import Reference, find_referring, list_references
from logto_webhooks.mapping.row_limits import RowLimits, find_refusal
from logto_webhooks.mapping.sources import describe_raised, find_misfit, implementation_of

T = TypeVar("T")

# Data type mismatch, cannot coerce, undefined function (no operator for these types).
_WRONG_TYPE: Final = ("42804", "42846", "42883")
# By statement_timeout, and by our Interrupter.
_CANCELED: Final = ("57014", "SQLITE_INTERRUPT")
_PARTS: Final = 8  # of a batch that is searched, and rows that are written at once if care is taken
_QUICK_S: Final = 0.05  # rows that take less are followed by twice as many
LOCKED: Final = "its row is locked"
_UNTRIED: Final = "other rows that were to be written with it are locked or take too long"
WRITING: Final = (
    "writing its row takes longer than {}, so it is tried alone: an index on a foreign key that "
    "refers to it may be missing, or a trigger is slow"
)
WRITING_LONG: Final = WRITING.partition("{")[0]  # what such reasons begin with
READING: Final = (
    "reading the table for its row takes longer than {}, so it is tried alone: an index on the "
    "column of `key` or `link` may be missing"
)
_TOGETHER: Final = (
    "the functions of its record's mappings take too long together, so it is tried alone"
)
# The database skips both.
SKIPPED: Final = "its row is locked, or row-level security doesn't let it be changed"
_MISFIT: Final = "a value doesn't fit its column"
_DATA_ERROR: Final = "SQLSTATE 22000"  # as asyncpg calls what it can't send
NOT_CHANGED: Final = (
    "the database didn't make the change: a trigger, a rule or row-level security may have skipped "
    "it"
)
_SINGLE: Final = 2.0**-23  # how precise a REAL is
_SINGLE_BITS: Final = 24
_DOUBLE_BITS: Final = 53
NO_KEY: Final = "a deferred foreign key isn't fulfilled"
NOT_UNIQUE: Final = "several rows have its primary key, which isn't unique in the database"
NOT_KEPT: Final = "the database didn't keep the new row: a trigger or a rule may have skipped it"


Action = Literal["insert", "update", "delete", "nothing"]


class PlannedRow(Struct, frozen=True, kw_only=True):
    """What is to be done with one record's row. `links` says that an existing row is taken over,
    `deletes` that a row of a deleted record is deleted or unlinked. `replaces` is the primary key
    of a former row, which is deleted with it. `at_least` are those of the values that are written
    even if the others are refused; None if all must be."""

    logto_id: str
    action: Action
    links: bool = False
    deletes: bool = False
    primary_key: tuple[Any, ...] = ()
    values: dict[str, Any] = {}
    replaces: tuple[Any, ...] = ()
    at_least: dict[str, Any] | None = None
    state: RowState

    @property
    def waits_for_end(self) -> bool:
        """Whether it is to be inserted once its user, organization or member has a row."""
        blocker = self.state.blocked_by
        is_end = blocker is not None and blocker.startswith(("user:", "organization:", "member:"))
        return is_end and self.state.state == "waiting"

    @property
    def deleted_key(self) -> tuple[Any, ...]:
        """The primary key of the row that is deleted; () if none is."""
        return self.primary_key if self.action == "delete" else self.replaces


class TableWriter(ABC):
    """Writes planned rows of one table; what the database refuses is written alone."""

    def __init__(
        self,
        connection: sa.Connection,
        mapping: EntityMapping | PairMapping,
        schemas: Any,
        run: ApplyRun | None,
        limits: RowLimits | None,
    ) -> None:
        """`schemas` is the `schema_translate_map` of the application's engine; `limits` are those
        of all writers of the transaction."""
        self.name = mapping.name
        self._connection = connection
        self._schemas = schemas
        self.table = mapping.table
        self._primary_key = mapping.primary_key
        self._states = StateStore(connection, mapping.name, mapping.kind)
        self._guard = DeletionGuard(mapping.name, self._states, run)
        self.results: list[tuple[PlannedRow, RowState]] = []  # what was planned, and what became
        self._planned: dict[str, PlannedRow] = {}
        self._inserted: dict[str, str] = {}  # primary keys of new rows, as text
        self._limits = limits or RowLimits(connection)
        self._has_functions = mapping.has_functions
        self._references: list[Reference] | None = None  # to it in SQLite
        self._has_conflict_clause: bool | None = None  # of a constraint; unknown yet

    def _call(
        self, function: Callable[[Any], T], rows: Mapping[str, Any]
    ) -> dict[str, T | Exception]:
        """Call a function of the mapping with rows of the mirror. Return its results, or errors, by
        the ids of the rows."""
        if self._has_functions:
            return self._limits.call(self.name, function, rows)
        return {id_: function(row) for id_, row in rows.items()}

    def _refuse_unevaluated(
        self, state: RowState, error: Exception, wanted: str | None = None
    ) -> PlannedRow:
        """Plan to write nothing, because a function of the mapping raised, or took too long. If it
        raised, nobody else is linked to the row that is `wanted`."""
        if isinstance(error, TooSlow):
            return refuse(state, "owed", str(error), ALONE)
        record = self._limits.only_record
        is_only = record is not None and record.id == (state.record_id or state.logto_id)
        if isinstance(error, NotCalled) and is_only:
            return refuse(state, "owed", _TOGETHER, ALONE)
        if isinstance(error, NotEvaluated):
            return refuse(state, "owed", str(error), ALONE if self._limits.is_alone else None)
        return refuse(state, "conflict", describe_raised(error), wanted)

    def find_states(self, ids: Sequence[str]) -> dict[str, RowState]:
        """Return the stored states of rows."""
        return self._states.find(ids)

    def _run(self, statement: Any, values: Any = None) -> sa.CursorResult[Any]:
        """Run a statement on the application's table."""
        self._limits.begin_statement()
        options = {"schema_translate_map": self._schemas, OF_APPLICATION: True}
        return self._connection.execute(statement, values, execution_options=options)

    def _run_rows(self, statement: Any, rows: Sequence[dict[str, Any]]) -> int | None:
        """Run a statement for each row. Return how many rows it changed, if the driver tells.
        psycopg logs each failure of several rows at once."""
        result = self._run(statement, rows[0] if len(rows) == 1 else rows)
        is_counted = len(rows) == 1 or self._connection.dialect.supports_sane_multi_rowcount
        return result.rowcount if is_counted and result.rowcount >= 0 else None

    def attempt(self, write: Callable[[Sequence[str]], None], ids: Sequence[str]) -> None:
        """Write the rows of records in a savepoint.

        If the table can't be used, such as during the application's own migration, all these rows
        are owed. Any other error is of one row: it is found by halving.
        """
        if not ids:
            return
        if self._limits.is_last_try or self._limits.is_over:
            self._owe_untried(ids)
            return
        done = len(self.results)
        try:
            with (
                translate_row_errors(self._connection),
                self._connection.begin_nested(),
                self._limits.applied(),
            ):
                write(ids)
            return
        except Exception as error:
            if self._limits.is_transaction_lost(error):
                states = [RowState(logto_id=id_) for id_ in ids]
                raise self._lose(states, READING, error) from error
            del self.results[done:]
            if not isinstance(error, StoreUnavailable) and len(ids) > 1:
                middle = len(ids) // 2
                self.attempt(write, ids[:middle])
                self.attempt(write, ids[middle:])
                return
            stored = self._states.find(ids)
            states = [stored.get(id_) or RowState(logto_id=id_) for id_ in ids]
            is_slow = _is_slow(error) or (self._limits.is_over and len(ids) == 1)
            problem = self._explain(error, self._planned.get(ids[0]))
            if is_slow:
                problem = READING.format(self._limits.describe(reading=True))
            if isinstance(error, TimedOut):
                self._limits.note_time_out()
            new = "owed" if isinstance(error, StoreUnavailable) else "conflict"
            by = ALONE if is_slow or (new == "owed" and self._limits.is_alone) else None
            plans = [refuse(state, new, problem, by) for state in states]
            self._settle(plans, stored)

    def save_culprits(self) -> None:
        """In the last try, store which rows were found, whether or not their records are tried."""
        states = {s.logto_id: s for name, s in self._limits.culprits if name == self.name}
        stored = self._states.find(states)
        blocked = [
            block(stored.get(id_) or s, s.state, s.reason or "", s.blocked_by)
            for id_, s in states.items()
        ]
        self._save(blocked, stored)

    def _owe_untried(self, ids: Sequence[str]) -> None:
        """Let rows be written later: too many took too long."""
        stored = self._states.find(ids)
        plans = self._put_off(ids, stored)
        slow = {plan.logto_id for plan in plans}
        plans += [
            refuse(stored.get(id_) or RowState(logto_id=id_), "owed", _UNTRIED)
            for id_ in ids
            if id_ not in slow
        ]
        self._settle(plans, stored)

    def _settle(self, plans: Sequence[PlannedRow], stored: Mapping[str, RowState]) -> None:
        """Store why nothing is done with rows."""
        self._save([plan.state for plan in plans], stored)
        self.results += [(plan, plan.state) for plan in plans]

    def _save(self, states: Iterable[RowState], stored: Mapping[str, RowState]) -> None:
        """Store what became of rows."""
        kept = [self._guard.keep(state, stored.get(state.logto_id)) for state in states]
        self._states.save(kept, stored)

    def _list_after(
        self,
        after: tuple[Any, ...],
        limit: int,
        *columns: sa.ColumnElement[Any],
        where: Sequence[sa.ColumnElement[bool]] = (),
    ) -> Sequence[sa.Row[Any]]:
        """Select the primary keys and the columns of the next rows."""
        place = self._primary_key
        query = sa.select(*place, *columns).where(*where).order_by(*place).limit(limit)
        if after:
            types = [column.type for column in place]
            query = query.where(sa.tuple_(*place) > sa.tuple_(*after, types=types))
        return self._run(query).all()

    def _put_off(self, ids: Collection[str], stored: Mapping[str, RowState]) -> list[PlannedRow]:
        """Plan nothing for rows that take too long, each of which is written when its record is
        alone, and for those that made SQLite roll back this transaction."""
        slow = {}
        if not self._limits.is_alone:
            slow = {id_: state for id_, state in stored.items() if state.is_tried_alone}
        for name, state in self._limits.culprits:
            id_ = state.logto_id
            if name == self.name and id_ in ids:
                before = stored.get(id_) or state
                slow[id_] = block(before, state.state, state.reason or "", state.blocked_by)
        return [
            PlannedRow(logto_id=id_, action="nothing", state=state) for id_, state in slow.items()
        ]

    def _write_in_time(self, plans: Sequence[PlannedRow]) -> dict[str, RowState]:
        """Write rows. If the application has locked something that they need, or some take long,
        search for these only for a short time; rows that aren't tried by then stay owed, too."""
        states = self._refuse_referred(plans)
        plans = [plan for plan in plans if plan.logto_id not in states]
        if plans:
            self._limits.begin_rows()
        if self._limits.is_alone or self._limits.are_short or self._limits.is_retry:
            size = 1 if self._limits.is_alone or self._limits.is_search else _PARTS
            return states | self._write_parts(plans, size)
        return states | self._write_or_divide(plans)

    def _refuse_referred(self, plans: Sequence[PlannedRow]) -> dict[str, RowState]:
        """Refuse to delete rows that others refer to, or to change what they refer to, where SQLite
        doesn't."""
        if self._connection.dialect.name != "sqlite" or not plans:
            return {}
        if self._references is None:
            self._references = list_references(self._connection, self.table)
        groups: dict[tuple[str, ...] | None, list[tuple[tuple[Any, ...], PlannedRow]]] = {}
        for plan in plans:
            if plan.deleted_key:
                groups.setdefault(None, []).append((plan.deleted_key, plan))
            if plan.action == "update" and plan.values:
                changed = tuple(sorted(plan.values))
                groups.setdefault(changed, []).append((plan.primary_key, plan))
        states: dict[str, RowState] = {}
        for columns, group in groups.items():
            keys = [key for key, _ in group]
            problems = find_referring(
                self._connection, self._run, self.table, self._references, keys, columns
            )
            for key, plan in group:
                if key in problems:
                    states[plan.logto_id] = block(plan.state, "conflict", problems[key])
        return states

    def _write_or_divide(self, plans: Sequence[PlannedRow]) -> dict[str, RowState]:
        if not plans:
            return {}
        if self._limits.are_over:
            by = ALONE if self._limits.is_alone else None
            return {plan.logto_id: block(plan.state, "owed", _UNTRIED, by) for plan in plans}
        try:
            self._write_all(plans)
        except (RowRejected, StoreUnavailable) as error:
            if not self._limits.can_go_on:
                raise
            states = self._settle_refusal(plans[0], error) if len(plans) == 1 else {}
            if isinstance(error, TimedOut):
                self._limits.note_time_out()
            elif isinstance(error, StoreUnavailable) and len(plans) == 1:
                self._limits.note_failure()
            return states or self._write_parts(plans, -(-len(plans) // _PARTS))
        self._limits.note_written()
        return {plan.logto_id: plan.state for plan in plans}

    def _write_parts(self, plans: Sequence[PlannedRow], size: int) -> dict[str, RowState]:
        """Write rows part by part, so that what is wrong with one is found, or ends in time."""
        states: dict[str, RowState] = {}
        start = 0
        while start < len(plans):
            began = time.monotonic()
            states |= self._write_or_divide(plans[start : start + size])
            start += size
            is_quick = time.monotonic() - began < _QUICK_S
            if is_quick and self._limits.are_short and not self._limits.is_retry:
                size *= 2
        return states

    def _write_all(self, plans: Sequence[PlannedRow]) -> None:
        with self._savepoint(plans):
            self._execute(plans)

    def _count_broken_keys(self) -> int:
        """Count the table's foreign keys that aren't fulfilled, if SQLite has refused the commit
        because of one: only then does it check those that are deferred."""
        if not self._limits.checks_keys:
            return 0
        query = sa.text("SELECT count(*) FROM pragma_foreign_key_check(:name)")
        return self._connection.scalar(query, {"name": self.table.name}) or 0

    @contextmanager
    def _savepoint(self, plans: Sequence[PlannedRow]) -> Iterator[None]:
        """Write rows within the block. Raises TransactionLost, RowRejected, StoreUnavailable."""
        broken = self._count_broken_keys()
        try:
            with (
                translate_row_errors(self._connection),
                self._connection.begin_nested(),
                translate_row_errors(self._connection),  # before the savepoint's error hides it
                self._limits.timing(),
            ):
                yield
                check_constraints(self._connection)
                if self._count_broken_keys() > broken:
                    raise RowRejected(problem=NO_KEY)
        except Exception as error:
            if self._limits.is_transaction_lost(error):
                # If it can be any of several, they are written one by one next time.
                is_found = len(plans) == 1 or self._limits.is_retry
                states = [plan.state for plan in plans] if is_found else []
                raise self._lose(states, WRITING, error) from error
            raise

    def _lose(self, states: Sequence[RowState], reason: str, error: Exception) -> TransactionLost:
        """Return the error that says because of which rows the transaction is lost: those that were
        found first, because the savepoints around them fail, too."""
        if self._limits.lost is None:
            refusal = find_refusal(error)
            if refusal is None:
                blocked = [block(s, "owed", self._explain_slow(reason), ALONE) for s in states]
            else:
                problem = describe_error(refusal, self._connection)
                blocked = [block(state, "conflict", problem) for state in states]
            self._limits.lost = TransactionLost([(self.name, state) for state in blocked])
        return self._limits.lost

    def _execute(self, plans: Sequence[PlannedRow]) -> None:
        self._delete([plan.deleted_key for plan in plans if plan.deleted_key])
        self._update([plan for plan in plans if plan.action == "update"])
        inserts: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for plan in plans:
            if plan.action == "insert":
                inserts.setdefault(tuple(sorted(plan.values)), []).append(plan.values)
        for rows in inserts.values():
            self._run_rows(self._abort_on_conflict(sa.insert(self.table)), rows)
        if inserts:
            self._note_inserted([plan for plan in plans if plan.action == "insert"])

    @abstractmethod
    def _note_inserted(self, plans: Sequence[PlannedRow]) -> None:
        """Read the primary keys that the database made. Raises RowRejected if a row isn't there, or
        has none."""

    def _note_keys(self, keys: Mapping[str, tuple[Any, ...]]) -> None:
        self._check_keys(keys.values())
        self._inserted |= {id_: encode_id(key) for id_, key in keys.items()}

    def _check_keys(self, keys: Iterable[tuple[Any, ...]]) -> None:
        for key in keys:
            if None in key:
                raise RowRejected(problem=describe_null(self._primary_key))
            if not can_be_decoded(key, self._primary_key, self._connection.dialect):
                raise RowRejected(problem=describe_unknown(key, self._primary_key))

    def _check_count(self, count: int | None, wanted: int) -> None:
        if count is not None and count > wanted:
            raise RowRejected(problem=NOT_UNIQUE)

    def _delete(self, keys: Sequence[tuple[Any, ...]]) -> None:
        if keys:
            where, values = self._match_keys(keys)
            count = self._run_rows(sa.delete(self.table).where(where), values)
            if len(keys) == 1:  # the application may have deleted it
                is_there = sa.select(sa.literal(1)).where(where)
                is_kept = count == 0 and self._run(is_there, values[0]).first() is not None
            else:  # if some weren't deleted, they are deleted one by one
                is_kept = bool(self._find_rows(keys, [])) if count is None else count < len(keys)
            if is_kept:
                raise RowRejected(problem=NOT_CHANGED)
            self._check_count(count, len(keys))

    def _update(self, plans: Sequence[PlannedRow]) -> None:
        groups: dict[tuple[str, ...], list[PlannedRow]] = {}
        for plan in plans:
            if plan.values:
                groups.setdefault(tuple(sorted(plan.values)), []).append(plan)
        for names, group in groups.items():
            where, keys = self._match_keys([plan.primary_key for plan in group])
            # Parameters have the names of their columns, so that Python defaults can read them.
            rows = [
                key | dict(self._make_parameter(*item) for item in plan.values.items())
                for key, plan in zip(keys, group, strict=True)
            ]
            update = sa.update(self.table).where(where).values(self._make_expressions(names))
            count = self._run_rows(self._abort_on_conflict(update), rows)
            # If some weren't changed, they are written one by one.
            is_kept = self._differ(group) if count is None else count < len(group)
            if is_kept:
                raise RowRejected(problem=NOT_CHANGED)
            self._check_count(count, len(group))

    def _abort_on_conflict(self, statement: Any) -> Any:
        """On SQLite, let a constraint refuse a row that says ON CONFLICT REPLACE or IGNORE: others'
        rows would be deleted, or this one not written, and nobody told. Where no constraint says
        so, leave the statement as it is, because triggers would inherit what it says."""
        if self._connection.dialect.name != "sqlite":
            return statement
        if self._has_conflict_clause is None:
            query = sa.text("SELECT sql FROM sqlite_master WHERE lower(name) = lower(:name)")
            sql = self._connection.scalar(query, {"name": self.table.name}) or ""
            self._has_conflict_clause = "ON CONFLICT" in " ".join(sql.upper().split())
        return statement.prefix_with("OR ABORT") if self._has_conflict_clause else statement

    def _make_expressions(self, names: Collection[str]) -> dict[str, sa.ColumnElement[Any]]:
        """Make what columns are set to that aren't replaced by a value."""
        return {}

    def _make_parameter(self, name: str, value: Any) -> tuple[str, Any]:
        """Return the parameter for a column's new value, and its name."""
        return name, value

    def _differ(self, plans: Sequence[PlannedRow]) -> bool:
        """Whether some rows aren't as they were to be. A trigger may have changed them."""
        names = [column.key for column in self._primary_key]
        keys = [
            tuple(
                plan.values.get(name, value)
                for name, value in zip(names, plan.primary_key, strict=True)
            )
            for plan in plans
        ]
        rows = self._find_rows(keys, list(plans[0].values))
        return any(
            (row := rows.get(encode_id(key))) is None or self._find_differing(plan.values, row)
            for key, plan in zip(keys, plans, strict=True)
        )

    def _find_rows(
        self, keys: Sequence[tuple[Any, ...]], names: Sequence[str]
    ) -> dict[str, sa.RowMapping]:
        """Find rows by their primary keys, which are returned as text."""
        columns = {column.key: column for column in self._primary_key}
        columns |= {name: self.table.c[name] for name in names}
        query = sa.select(*columns.values())
        return {
            encode_id(self._key_of(row)): row
            for are_some in make_conditions(self._primary_key, keys)
            for row in self._run(query.where(are_some)).mappings()
        }

    def _find_values_there(self, column: sa.Column[Any], ends: Iterable[Former]) -> set[Any]:
        """Return those values of a column that rows have."""
        values = {value for value, _ in ends}
        return {
            value
            for are_some in make_conditions([column], [(value,) for value in values])
            for value in self._run(sa.select(column).where(are_some)).scalars()
        }

    def _match_keys(
        self, keys: Sequence[tuple[Any, ...]]
    ) -> tuple[sa.ColumnElement[bool], list[dict[str, Any]]]:
        self._check_keys(keys)
        columns = self._primary_key
        where = sa.and_(
            *(
                column == sa.bindparam(f"logto_webhooks_pk_{i}", type_=column.type)
                for i, column in enumerate(columns)
            )
        )
        return where, [
            {f"logto_webhooks_pk_{i}": value for i, value in enumerate(key)} for key in keys
        ]

    def _find_differing(self, values: dict[str, Any], own: sa.RowMapping) -> dict[str, Any]:
        """Return the values that differ from those of a row."""
        return {
            name: value
            for name, value in values.items()
            if name not in own
            or not _is_equal(own[name], value, self.table.c[name].type, self._connection.dialect)
        }

    def _id_after(self, own: sa.RowMapping, changed: Mapping[str, Any]) -> str:
        """Return the primary key of a row after a change, which can contain mapped columns."""
        return encode_id(changed.get(column.key, own[column]) for column in self._primary_key)

    def _key_of(self, row: sa.RowMapping) -> tuple[Any, ...]:
        return tuple(row[column] for column in self._primary_key)

    def _settle_refusal(self, plan: PlannedRow, error: Exception) -> dict[str, RowState]:
        """Return the state of a row that was refused."""
        if isinstance(error, TimedOut):
            if not _is_slow(error):
                return {plan.logto_id: block(plan.state, "owed", LOCKED)}
            reason = self._explain_slow(WRITING)
            return {plan.logto_id: block(plan.state, "owed", reason, ALONE)}
        if isinstance(error, StoreUnavailable):
            return {plan.logto_id: block(plan.state, "owed", self._explain(error, plan))}
        return {plan.logto_id: block(plan.state, "conflict", self._explain(error, plan))}

    def _explain_slow(self, reason: str) -> str:
        return reason.format(self._limits.describe())

    def _explain(self, error: Exception, plan: PlannedRow | None) -> str:
        """Say why the database refused a row."""
        problem = describe_error(error, self._connection)
        if plan is None or not problem.startswith((_MISFIT, _DATA_ERROR)):
            return problem
        return find_misfit(self.table, plan.values) or problem


def _is_slow(error: Exception) -> bool:
    """Whether a statement took too long, not waiting for a lock."""
    cause = getattr(error.__cause__, "orig", None)
    code = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
    return code in _CANCELED


def check_constraints(connection: sa.Connection) -> None:
    """Check deferred constraints now, while the savepoint can still be rolled back. In a session of
    the application, they may not be fulfilled yet, and it decides when to check them."""
    in_session = connection.get_execution_options().get(INTERNAL)
    if connection.dialect.name == "postgresql" and not in_session:
        connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")


def block(state: RowState, new: Any, reason: str, blocked_by: str | None = None) -> RowState:
    """Return the state of a row that can't be written now."""
    return replace(state, state=new, reason=reason, blocked_by=blocked_by)


def _is_equal(own: Any, value: Any, column_type: Any, dialect: sa.Dialect) -> bool:
    """Whether a value from the database is what was written. A type of the application may change
    values as it sends them."""
    return _is_same(own, value, column_type, dialect) or (
        isinstance(column_type, sa.types.TypeDecorator)
        and _is_sent_alike(own, value, column_type, dialect)
    )


def _is_sent_alike(
    own: Any, value: Any, column_type: sa.types.TypeEngine[Any], dialect: sa.Dialect
) -> bool:
    send = column_type.bind_processor(dialect)
    try:
        return send is not None and bool(send(own) == send(value))
    except Exception:  # writing the value will tell
        return False


def _is_same(own: Any, value: Any, column_type: Any, dialect: sa.Dialect) -> bool:
    """Whether values are equal: a database gives some back in another form. A boolean column gives
    back `True` for 1, for example, but JSON doesn't."""
    implementation = implementation_of(column_type)
    if isinstance(implementation, sa.ARRAY):
        if isinstance(own, list | tuple) and isinstance(value, list | tuple | set | frozenset):
            return _has_equal_items(own, value, column_type, dialect)
        implementation = implementation_of(implementation.item_type)
    if isinstance(own, dict) or isinstance(implementation, sa.JSON):
        return is_equal(own, value) or is_equal(own, _to_json_and_back(value, dialect))
    if isinstance(implementation, sa.Uuid):
        return bool(_to_uuid(own) == _to_uuid(value))
    if isinstance(own, enum.Enum) and not isinstance(value, enum.Enum):
        return _is_sent_alike(own, value, implementation, dialect)
    if isinstance(own, Decimal) and isinstance(value, int | float | Decimal):
        return own == Decimal(str(value)) or _is_rounded(own, value, implementation)
    if isinstance(own, datetime) and isinstance(value, datetime):
        own, value = _to_utc(own), _to_utc(value)
        digits = getattr(implementation, "precision", None)
        return bool(own == value or _is_near((own - value).total_seconds(), digits))
    if isinstance(own, date) and isinstance(value, date) and type(own) is not type(value):
        return _to_day(own) == _to_day(value)  # a column has only one of both
    if isinstance(own, float) and _is_number(value):
        return math.isclose(own, value, rel_tol=_SINGLE if _is_single(implementation) else 0.0)
    if isinstance(implementation, sa.CHAR) and isinstance(own, str) and isinstance(value, str):
        return own.rstrip(" ") == value.rstrip(" ")
    if (isinstance(own, str) and _is_number(value)) or (_is_number(own) and isinstance(value, str)):
        return str(own) == str(value)
    return bool(own == value)


def _has_equal_items(own: Any, value: Any, array_type: Any, dialect: sa.Dialect) -> bool:
    if len(own) != len(value):
        return False
    if isinstance(value, set | frozenset):  # was written in any order
        return all(any(_is_equal(one, item, array_type, dialect) for one in own) for item in value)
    pairs = zip(own, value, strict=True)
    return all(_is_equal(one, item, array_type, dialect) for one, item in pairs)


def _to_json_and_back(value: Any, dialect: sa.Dialect) -> Any:
    """Return a value as a JSON column gives it back: a tuple as a list, for example."""
    json_type: sa.types.TypeEngine[Any] = sa.JSON()
    dump = json_type.bind_processor(dialect) or json.dumps
    load = json_type.result_processor(dialect, None) or json.loads
    try:
        return load(dump(value))
    except Exception:  # of the application's serializer: writing the value will tell
        return value


def _to_uuid(value: Any) -> Any:
    try:
        return UUID(str(value))
    except ValueError:
        return value


def _to_day(moment: date) -> date:
    return moment.date() if isinstance(moment, datetime) else moment


def _is_rounded(own: Decimal, value: Any, numeric: Any) -> bool:
    return _is_near(own - Decimal(str(value)), getattr(numeric, "scale", None))


def _is_near(difference: Any, digits: Any) -> bool:
    """Whether a difference is only that a column has so many digits after the point."""
    return isinstance(digits, int) and abs(difference) * 10**digits * 2 <= 1


def _is_single(number: Any) -> bool:
    """Whether a database keeps a number with single precision, as PostgreSQL a FLOAT(24)."""
    is_short = isinstance(number, sa.Float) and (number.precision or _DOUBLE_BITS) <= _SINGLE_BITS
    return isinstance(number, sa.REAL) or is_short


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _to_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def find_new_rows(
    states: Mapping[str, RowState],
    stored: Mapping[str, RowState],
    plans: Mapping[str, PlannedRow],
) -> set[str]:
    """Return the ids of those who have a row, or another one, since their state was stored. SQLite
    can give a new row the primary key of one that the application deleted."""
    return {
        id_
        for id_, state in states.items()
        if state.row_id is not None
        and (
            (state.state == "ok" and (plans[id_].action == "insert" or plans[id_].links))
            or id_ not in stored
            or stored[id_].row_id != state.row_id
        )
    }


def refuse(state: RowState, new: Any, reason: str, blocked_by: str | None = None) -> PlannedRow:
    """Plan to write nothing, and say why."""
    stopped = block(state, new, reason, blocked_by)
    return PlannedRow(logto_id=state.logto_id, action="nothing", state=stopped)


def is_hindered(state: RowState) -> bool:
    """Whether a row wasn't tried only because other rows took the time of its transaction."""
    return state.reason in (_UNTRIED, NOT_CALLED)


def describe_error(error: Exception, connection: sa.Connection) -> str:
    """Say why the database refused a row, without values."""
    problem: str = getattr(error, "problem", type(error).__name__)
    if problem.endswith("Error") and problem.isidentifier():
        return f"{_MISFIT} ({problem})"
    return problem.partition(f" ({place_of(connection.engine.url)})")[0]


@contextmanager
def translate_row_errors(connection: sa.Connection) -> Iterator[None]:
    """As `translate_errors`, but a value that the driver can't send is a fault of its row."""
    try:
        with translate_errors(connection.engine):
            yield
    except TimedOut:
        raise
    except StoreUnavailable as error:
        cause = getattr(error.__cause__, "orig", None)
        sqlstate = getattr(cause, "sqlstate", None)
        is_unsendable = type(cause).__name__ == "ProgrammingError" and not sqlstate
        if is_unsendable or sqlstate in _WRONG_TYPE:
            raise RowRejected(problem=_MISFIT) from error
        diagnostics = None if cause is None else diagnose(cause)
        if diagnostics is None or not diagnostics.is_of_function:
            raise
        problem = f"{diagnostics.describe()}, in a trigger or function of the database"
        raise RowRejected(problem=problem) from error
