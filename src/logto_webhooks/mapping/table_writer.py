"""Write planned rows of one of the application's tables, in the mirror's transaction.

A batch of rows is written in one savepoint. If the database refuses it, it is halved until the
culprit is alone; that stays a conflict and holds back nothing else.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final, Literal

import sqlalchemy as sa
from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.canonical_json import is_equal
from logto_webhooks.database.errors import place_of, translate_errors
from logto_webhooks.database.mapped_rows import (
    RowState,
    StateStore,
    encode_id,
)
from logto_webhooks.database.sessions import INTERNAL
from logto_webhooks.errors import RowRejected, StoreUnavailable, TimedOut
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.declare_pairs import PairMapping
from logto_webhooks.mapping.sources import find_misfit

# Data type mismatch, cannot coerce, undefined function (no operator for these types).
_WRONG_TYPE: Final = ("42804", "42846", "42883")
_SHORT_LOCK_MS: Final = 50
_SEARCH_S: Final = 1.0  # for the rows that wait for a lock, among others
LOCKED: Final = "its row is locked"
# The database skips both.
SKIPPED: Final = "its row is locked, or row-level security doesn't let it be changed"
_MISFIT: Final = "a value doesn't fit its column"
_DATA_ERROR: Final = "SQLSTATE 22000"  # as asyncpg calls what it can't send
NOT_KEPT: Final = "the database didn't keep the new row: a trigger or a rule may have skipped it"


Action = Literal["insert", "update", "delete", "nothing"]


class PlannedRow(Struct, frozen=True, kw_only=True):
    """What is to be done with one record's row. `links` says that an existing row is taken over,
    `deletes` that a row of a deleted record is deleted or unlinked. `replaces` is the primary key
    of a former row, which is deleted with it."""

    logto_id: str
    action: Action
    links: bool = False
    deletes: bool = False
    primary_key: tuple[Any, ...] = ()
    values: dict[str, Any] = {}
    replaces: tuple[Any, ...] = ()
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


class TableWriter:
    """Writes planned rows of one table; what the database refuses is written alone."""

    def __init__(
        self, connection: sa.Connection, mapping: EntityMapping | PairMapping, schemas: Any
    ) -> None:
        """`schemas` is the `schema_translate_map` of the application's engine."""
        self.name = mapping.name
        self._connection = connection
        self._schemas = schemas
        self.table = mapping.table
        self._primary_key = mapping.primary_key
        self._states = StateStore(connection, mapping.name, mapping.kind)
        self.results: list[tuple[PlannedRow, RowState]] = []  # what was planned, and what became
        self._planned: dict[str, PlannedRow] = {}
        self._search_until: float | None = None
        self._usual_lock: str | None = None  # while a shorter one is set

    def find_states(self, ids: Sequence[str]) -> dict[str, RowState]:
        """Return the stored states of rows."""
        return self._states.find(ids)

    def _run(self, statement: Any, values: Any = None) -> sa.CursorResult[Any]:
        """Run a statement on the application's table."""
        options = {"schema_translate_map": self._schemas}
        return self._connection.execute(statement, values, execution_options=options)

    def _run_rows(self, statement: Any, rows: Sequence[dict[str, Any]]) -> None:
        """Run a statement for each row. psycopg logs each failure of several rows at once."""
        self._run(statement, rows[0] if len(rows) == 1 else rows)

    def attempt(self, write: Callable[[Sequence[str]], None], ids: Sequence[str]) -> None:
        """Write the rows of records in a savepoint.

        If the table can't be used, such as during the application's own migration, all these rows
        are owed. Any other error is of one row: it is found by halving.
        """
        if not ids:
            return
        done = len(self.results)
        try:
            with translate_row_errors(self._connection), self._connection.begin_nested():
                write(ids)
            return
        except Exception as error:
            del self.results[done:]
            if not isinstance(error, StoreUnavailable) and len(ids) > 1:
                middle = len(ids) // 2
                self.attempt(write, ids[:middle])
                self.attempt(write, ids[middle:])
                return
            state = "owed" if isinstance(error, StoreUnavailable) else "conflict"
            stored = self._states.find(ids)
            states = [stored.get(id_) or RowState(logto_id=id_) for id_ in ids]
            problem = self._explain(error, self._planned.get(ids[0]))
            plans = [refuse(row_state, state, problem) for row_state in states]
            self._states.save([plan.state for plan in plans], stored)
            self.results += [(plan, plan.state) for plan in plans]

    def _list_after(
        self, after: tuple[Any, ...], limit: int, *columns: sa.ColumnElement[Any]
    ) -> Sequence[sa.Row[Any]]:
        """Select the primary keys and the columns of the next rows."""
        place = self._primary_key
        query = sa.select(*place, *columns).order_by(*place).limit(limit)
        if after:
            types = [column.type for column in place]
            query = query.where(sa.tuple_(*place) > sa.tuple_(*after, types=types))
        return self._run(query).all()

    def _write_in_time(self, plans: Sequence[PlannedRow]) -> dict[str, RowState]:
        """Write rows. If the application has locked something that they need, search for these
        rows only for a short time; the others stay owed, too."""
        self._search_until = None
        states = self._refuse_referred(plans)
        states |= self._write_halves([plan for plan in plans if plan.logto_id not in states])
        if self._usual_lock is not None:
            self._limit_locks(self._usual_lock)
            self._usual_lock = None
        return states

    def _refuse_referred(self, plans: Sequence[PlannedRow]) -> dict[str, RowState]:
        """Refuse to delete rows that others refer to. Unless the application says otherwise, SQLite
        doesn't enforce foreign keys."""
        deletions = [plan for plan in plans if plan.deleted_key]
        if not deletions or self._connection.dialect.name != "sqlite":
            return {}
        states: dict[str, RowState] = {}
        for table, column, place in _list_references(self._connection, self.table):
            by_value = {plan.deleted_key[place]: plan for plan in deletions}
            query = sa.select(column).where(column.in_(list(by_value))).distinct()
            for value in self._connection.scalars(query):
                if plan := by_value.get(value):
                    problem = f"rows of {table} refer to it"
                    states[plan.logto_id] = block(plan.state, "conflict", problem)
        return states

    def _search_locked(self) -> None:
        self._search_until = time.monotonic() + _SEARCH_S
        if self._connection.dialect.name == "postgresql":
            setting = sa.select(sa.func.current_setting("lock_timeout"))
            self._usual_lock = self._connection.scalar(setting)
            self._limit_locks(f"{_SHORT_LOCK_MS}ms")

    def _limit_locks(self, limit: str) -> None:
        self._connection.execute(sa.select(sa.func.set_config("lock_timeout", limit, sa.true())))

    def _write_halves(self, plans: Sequence[PlannedRow]) -> dict[str, RowState]:
        if not plans:
            return {}
        if self._search_until is not None and time.monotonic() > self._search_until:
            return {plan.logto_id: block(plan.state, "owed", LOCKED) for plan in plans}
        try:
            self._write_all(plans)
        except (RowRejected, TimedOut) as error:
            if isinstance(error, TimedOut) and self._search_until is None:
                self._search_locked()
            if len(plans) > 1:
                middle = len(plans) // 2
                first = self._write_halves(plans[:middle])
                return first | self._write_halves(plans[middle:])
            return self._settle_refusal(plans[0], error)
        return {plan.logto_id: plan.state for plan in plans}

    def _write_all(self, plans: Sequence[PlannedRow]) -> None:
        with translate_row_errors(self._connection), self._connection.begin_nested():
            self._execute(plans)
            check_constraints(self._connection)

    def _execute(self, plans: Sequence[PlannedRow]) -> None:
        self._delete([plan.deleted_key for plan in plans if plan.deleted_key])
        self._update([plan for plan in plans if plan.action == "update"])
        inserts: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for plan in plans:
            if plan.action == "insert":
                inserts.setdefault(tuple(sorted(plan.values)), []).append(plan.values)
        for rows in inserts.values():
            self._run_rows(sa.insert(self.table), rows)

    def _delete(self, keys: Sequence[tuple[Any, ...]]) -> None:
        if keys:
            where, values = self._match_keys(keys)
            self._run_rows(sa.delete(self.table).where(where), values)

    def _update(self, plans: Sequence[PlannedRow]) -> None:
        groups: dict[tuple[str, ...], list[PlannedRow]] = {}
        for plan in plans:
            if plan.values:
                groups.setdefault(tuple(sorted(plan.values)), []).append(plan)
        for names, group in groups.items():
            where, values = self._match_keys([plan.primary_key for plan in group])
            sets = {
                name: sa.bindparam(f"new_{i}", type_=self.table.c[name].type)
                for i, name in enumerate(names)
            }
            rows = [
                row | {f"new_{i}": plan.values[name] for i, name in enumerate(names)}
                for row, plan in zip(values, group, strict=True)
            ]
            self._run_rows(sa.update(self.table).where(where).values(sets), rows)

    def _match_keys(
        self, keys: Sequence[tuple[Any, ...]]
    ) -> tuple[sa.ColumnElement[bool], list[dict[str, Any]]]:
        columns = self._primary_key
        where = sa.and_(
            *(
                column == sa.bindparam(f"pk_{i}", type_=column.type)
                for i, column in enumerate(columns)
            )
        )
        return where, [{f"pk_{i}": value for i, value in enumerate(key)} for key in keys]

    def _find_differing(self, values: dict[str, Any], own: sa.RowMapping) -> dict[str, Any]:
        """Return the values that differ from those of a row."""
        return {
            name: value
            for name, value in values.items()
            if name not in own or not _is_equal(own[name], value, self.table.c[name].type)
        }

    def _id_after(self, own: sa.RowMapping, changed: dict[str, Any]) -> str:
        """Return the primary key of a row after a change, which can contain mapped columns."""
        return encode_id(changed.get(column.key, own[column]) for column in self._primary_key)

    def _key_of(self, row: sa.RowMapping) -> tuple[Any, ...]:
        return tuple(row[column] for column in self._primary_key)

    def _settle_refusal(self, plan: PlannedRow, error: Exception) -> dict[str, RowState]:
        """Return the state of a row that was refused."""
        if isinstance(error, TimedOut):
            return {plan.logto_id: block(plan.state, "owed", LOCKED)}
        return {plan.logto_id: block(plan.state, "conflict", self._explain(error, plan))}

    def _explain(self, error: Exception, plan: PlannedRow | None) -> str:
        """Say why the database refused a row."""
        problem = describe_error(error, self._connection)
        if plan is None or not problem.startswith((_MISFIT, _DATA_ERROR)):
            return problem
        return find_misfit(self.table, plan.values) or problem


def check_constraints(connection: sa.Connection) -> None:
    """Check deferred constraints now, while the savepoint can still be rolled back. In a session of
    the application, they may not be fulfilled yet, and it decides when to check them."""
    in_session = INTERNAL in connection.get_execution_options()
    if connection.dialect.name == "postgresql" and not in_session:
        connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")


def _list_references(
    connection: sa.Connection, parent: sa.Table
) -> Iterator[tuple[str, sa.ColumnClause[Any], int]]:
    """Yield the columns of SQLite's tables that refer to a column of the primary key, with the
    place of that."""
    places = {column.name: place for place, column in enumerate(parent.primary_key)}
    names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")
    for table in names.scalars().all():
        keys = sa.text("SELECT * FROM pragma_foreign_key_list(:name)")
        for key in connection.execute(keys, {"name": table}).mappings():
            referred = key["to"] or next(iter(places))
            if key["table"].lower() == parent.name.lower() and referred in places:
                own: sa.ColumnClause[Any] = sa.column(key["from"])
                sa.table(table, own)
                yield table, own, places[referred]


def block(state: RowState, new: Any, reason: str, blocked_by: str | None = None) -> RowState:
    """Return the state of a row that can't be written now."""
    return replace(state, state=new, reason=reason, blocked_by=blocked_by)


def _is_equal(own: Any, value: Any, column_type: Any) -> bool:
    """Whether a value from the database is what was written: a database gives some back in another
    form. A boolean column gives back `True` for 1, for example, but JSON doesn't."""
    if isinstance(own, dict) or isinstance(_implementation_of(column_type), sa.JSON):
        return is_equal(own, value)
    if isinstance(own, enum.Enum) and not isinstance(value, enum.Enum):
        return value in (own.name, own.value)
    if isinstance(own, Decimal) and isinstance(value, float):
        return own == Decimal(str(value))
    if isinstance(own, datetime) and isinstance(value, datetime):
        return _to_utc(own) == _to_utc(value)
    if isinstance(own, date) and isinstance(value, datetime):
        return own == value.date()
    return bool(own == value)


def _implementation_of(column_type: Any) -> Any:
    """Return the type that an application's own type is made of."""
    while isinstance(column_type, sa.types.TypeDecorator):
        column_type = column_type.impl_instance
    return column_type


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
            plans[id_].action == "insert"
            or plans[id_].links
            or id_ not in stored
            or stored[id_].row_id != state.row_id
        )
    }


def refuse(state: RowState, new: Any, reason: str, blocked_by: str | None = None) -> PlannedRow:
    """Plan to write nothing, and say why."""
    stopped = block(state, new, reason, blocked_by)
    return PlannedRow(logto_id=state.logto_id, action="nothing", state=stopped)


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
        if not is_unsendable and sqlstate not in _WRONG_TYPE:
            raise
        raise RowRejected(problem=_MISFIT) from error
