"""Write the application's rows that follow from the mirror, in the transaction that changes it.

A batch of rows is written in one savepoint. If the database refuses it, it is halved until the
culprit is alone; that stays a conflict and holds back nothing else.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final, Literal

import sqlalchemy as sa
from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.database.errors import place_of, translate_errors
from logto_webhooks.database.mapped_rows import (
    RowState,
    StateStore,
    decode_id,
    encode_id,
    lock_free_records,
)
from logto_webhooks.database.sessions import INTERNAL
from logto_webhooks.errors import RowRejected, StoreUnavailable, TimedOut
from logto_webhooks.mapping.declare import End, EntityMapping, MemberMapping, MemberRow
from logto_webhooks.mapping.links import LinkFinder, NoLink, describe_raised
from logto_webhooks.mapping.mirror import find_deleted, read_rows
from logto_webhooks.records.record import Key, membership

MOST_SWAPPED: Final = 50  # rows whose unique values go round, which are written together
_KEY: Final = "logto_key"
# Data type mismatch, cannot coerce, undefined function (no operator for these types).
_WRONG_TYPE: Final = ("42804", "42846", "42883")
_SHORT_LOCK_MS: Final = 50
_SEARCH_S: Final = 1.0  # for the rows that wait for a lock, among others
_LOCKED: Final = "its row is locked"
_NOT_KEPT: Final = "the database didn't keep the new row: a trigger or a rule may have skipped it"

Action = Literal["insert", "update", "delete", "nothing"]


class PlannedRow(Struct, frozen=True, kw_only=True):
    """What is to be done with one record's row. `links` says that an existing row is taken over."""

    logto_id: str
    action: Action
    links: bool = False
    primary_key: tuple[Any, ...] = ()
    values: dict[str, Any] = {}
    state: RowState


class TableWriter:
    """Writes planned rows of one table; what the database refuses is written alone."""

    def __init__(
        self, connection: sa.Connection, mapping: EntityMapping | MemberMapping, schemas: Any
    ) -> None:
        """`schemas` is the `schema_translate_map` of the application's engine."""
        self.name = mapping.name
        self._connection = connection
        self._schemas = schemas
        self._table = mapping.table
        self._primary_key = mapping.primary_key
        self._states = StateStore(connection, mapping.name, mapping.kind)
        self.results: list[tuple[PlannedRow, RowState]] = []  # what was planned, and what became
        self._search_until: float | None = None
        self._usual_lock: str | None = None  # while a shorter one is set

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
            with _translate_errors(self._connection), self._connection.begin_nested():
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
            problem = _describe(error, self._connection)
            plans = [_refuse(each, state, problem) for each in states]
            self._states.save([plan.state for plan in plans], stored)
            self.results += [(plan, plan.state) for plan in plans]

    def list_rows(
        self, after: tuple[Any, ...], limit: int
    ) -> list[tuple[tuple[Any, ...], str | None]]:
        """List the next rows: their primary keys, and the ids of their records, if there are."""
        raise NotImplementedError

    def _list_after(
        self, after: tuple[Any, ...], limit: int, *columns: sa.ColumnElement[Any]
    ) -> Sequence[sa.Row[Any]]:
        """Select the primary keys and the columns of the next rows."""
        place = self._primary_key
        query = sa.select(*place, *columns).order_by(*place).limit(limit)
        if after:
            query = query.where(sa.tuple_(*place) > sa.tuple_(*after))
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
        deletions = [plan for plan in plans if plan.action == "delete"]
        if not deletions or self._connection.dialect.name != "sqlite":
            return {}
        states: dict[str, RowState] = {}
        for table, column, place in _list_references(self._connection, self._table):
            by_value = {plan.primary_key[place]: plan for plan in deletions}
            query = sa.select(column).where(column.in_(list(by_value))).distinct()
            for value in self._connection.scalars(query):
                if plan := by_value.get(value):
                    problem = f"rows of {table} refer to it"
                    states[plan.logto_id] = _blocked(plan.state, "conflict", problem)
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
            return {plan.logto_id: _blocked(plan.state, "owed", _LOCKED) for plan in plans}
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
        with _translate_errors(self._connection), self._connection.begin_nested():
            self._execute(plans)
            check_constraints(self._connection)

    def _execute(self, plans: Sequence[PlannedRow]) -> None:
        self._delete([plan for plan in plans if plan.action == "delete"])
        self._update([plan for plan in plans if plan.action == "update"])
        inserts: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for plan in plans:
            if plan.action == "insert":
                inserts.setdefault(tuple(sorted(plan.values)), []).append(plan.values)
        for rows in inserts.values():
            self._run_rows(sa.insert(self._table), rows)

    def _delete(self, plans: Sequence[PlannedRow]) -> None:
        if plans:
            where, values = self._match_keys(plans)
            self._run_rows(sa.delete(self._table).where(where), values)

    def _update(self, plans: Sequence[PlannedRow]) -> None:
        groups: dict[tuple[str, ...], list[PlannedRow]] = {}
        for plan in plans:
            groups.setdefault(tuple(sorted(plan.values)), []).append(plan)
        for names, group in groups.items():
            where, values = self._match_keys(group)
            sets = {
                name: sa.bindparam(f"new_{i}", type_=self._table.c[name].type)
                for i, name in enumerate(names)
            }
            rows = [
                row | {f"new_{i}": plan.values[name] for i, name in enumerate(names)}
                for row, plan in zip(values, group, strict=True)
            ]
            self._run_rows(sa.update(self._table).where(where).values(sets), rows)

    def _match_keys(
        self, plans: Sequence[PlannedRow]
    ) -> tuple[sa.ColumnElement[bool], list[dict[str, Any]]]:
        columns = self._primary_key
        where = sa.and_(
            *(
                column == sa.bindparam(f"pk_{i}", type_=column.type)
                for i, column in enumerate(columns)
            )
        )
        return where, [
            {f"pk_{i}": value for i, value in enumerate(plan.primary_key)} for plan in plans
        ]

    def _find_differing(self, values: dict[str, Any], own: sa.RowMapping) -> dict[str, Any]:
        """Return the values that differ from those of a row."""
        return {
            name: value
            for name, value in values.items()
            if name not in own or not _is_equal(own[name], value)
        }

    def _id_after(self, own: sa.RowMapping, changed: dict[str, Any]) -> str:
        """Return the primary key of a row after a change, which can contain mapped columns."""
        return encode_id(changed.get(column.key, own[column]) for column in self._primary_key)

    def _key_of(self, row: sa.RowMapping) -> tuple[Any, ...]:
        return tuple(row[column] for column in self._primary_key)

    def _settle_refusal(self, plan: PlannedRow, error: Exception) -> dict[str, RowState]:
        """Return the state of a row that was refused."""
        if isinstance(error, TimedOut):
            return {plan.logto_id: _blocked(plan.state, "owed", _LOCKED)}
        problem = _describe(error, self._connection)
        return {plan.logto_id: _blocked(plan.state, "conflict", problem)}


class EntityWriter(TableWriter):
    """Writes the rows of one mapping of users or organizations."""

    def __init__(self, connection: sa.Connection, mapping: EntityMapping, schemas: Any) -> None:
        super().__init__(connection, mapping, schemas)
        self.kind = mapping.kind
        self._mapping = mapping
        self._planned: dict[str, PlannedRow] = {}
        self.changed: set[str] = set()  # records whose row came, went or changed its primary key

    def write(self, ids: Collection[str]) -> None:
        """Write the rows of records, and of those that waited for what they had.

        Raises StoreUnavailable if the database can't be used.
        """
        seen: set[str] = set()
        waiting = set(ids)
        while waiting:
            seen |= waiting
            freed = self._write(sorted(waiting))
            blocked = set(self._states.find_blocked(freed)) - seen if freed else set()
            waiting = self._lock(blocked)
            seen |= blocked

    def _lock(self, ids: Collection[str]) -> set[str]:
        """Lock more records, so that nobody writes them meanwhile. Return those that could be
        locked; the others are owed."""
        if not ids:
            return set()
        kind = self._mapping.kind
        locked = {
            key.id for key in lock_free_records(self._connection, [Key(kind, i) for i in ids])
        }
        if busy := set(ids) - locked:
            stored = self._states.find(busy)
            problem = "another transaction changes its record"
            owed = [_blocked(state, "owed", problem) for state in stored.values()]
            self._states.save(owed, stored)
        return locked

    def _write(self, ids: Sequence[str]) -> set[str]:
        """Write rows; return the primary keys of those that gave up a value."""
        stored = self._states.find(ids)
        plans = self._plan(ids, stored)
        self._planned = {plan.logto_id: plan for plan in plans}
        to_write = [plan for plan in plans if plan.action != "nothing"]
        taken = self._find_taken(to_write)
        written = self._write_in_time([plan for plan in to_write if plan.logto_id not in taken])
        written |= self._write_taken([plan for plan in to_write if plan.logto_id in taken], taken)
        states = {plan.logto_id: plan.state for plan in plans if plan.action == "nothing"} | written
        self._name_inserted(states)
        self._states.save(states.values(), stored)
        self.results += [(self._planned[i], state) for i, state in states.items()]
        done = [self._planned[i] for i, state in states.items() if state.state == "ok"]
        self.changed.update(p.logto_id for p in done if p.action in ("insert", "delete"))
        return {encode_id(p.primary_key) for p in done if p.action in ("update", "delete")}

    def _plan(self, ids: Sequence[str], states: Mapping[str, RowState]) -> list[PlannedRow]:
        rows = read_rows(self._connection, self._mapping.kind, ids)
        own_rows, locked = self._lock_own(ids)
        unlinked = [i for i, row in rows.items() if i not in own_rows and row.deleted_at is None]
        linked = self._find_links({i: rows[i] for i in unlinked})
        gone = [i for i, row in rows.items() if row.deleted_at is not None and i in own_rows]
        told = find_deleted(self._connection, self._mapping.kind, gone) if gone else set()
        plans = []
        for logto_id, row in rows.items():
            state = states.get(logto_id) or RowState(logto_id=logto_id)
            if logto_id in locked:
                plans.append(_refuse(state, "owed", _LOCKED))
                continue
            if logto_id in gone and logto_id not in told and self._mapping.when_deleted == "delete":
                # A Logto that lacks users, such as one restored from a dump, deletes no rows here.
                problem = "Logto has no such record, but no delivery says that it was deleted"
                plans.append(_refuse(state, "waiting", problem))
                continue
            own = own_rows.get(logto_id)
            plan = self._plan_row(logto_id, row, own, linked.get(logto_id), state)
            plans.append(plan or self._plan_nothing(state, own))
        return plans

    def _plan_nothing(self, state: RowState, own: sa.RowMapping | None) -> PlannedRow:
        """Nothing is to be written, so nothing is waited for."""
        row_id = state.row_id if own is None else encode_id(self._key_of(own))
        settled = RowState(logto_id=state.logto_id, row_id=row_id)
        return PlannedRow(logto_id=state.logto_id, action="nothing", state=settled)

    def _plan_row(
        self, logto_id: str, row: Any, own: sa.RowMapping | None, link: Any, state: RowState
    ) -> PlannedRow | None:
        mapping = self._mapping
        if row.deleted_at is not None:
            return None if own is None else self._plan_deletion(logto_id, own, state)
        try:
            if not mapping.where(row):
                return None
            values = {name: read(row) for name, read in mapping.columns.items()}
            fill = {name: read(row) for name, read in mapping.fill.items()}
        except Exception as error:  # the application's function
            return _refuse(state, "conflict", describe_raised(error))
        if isinstance(link, NoLink):
            return _refuse(state, link.state, link.reason)
        if own is None and link is not None:
            own = link
            values |= self._key_values(logto_id, own)
        if own is not None:
            fill = {name: value for name, value in fill.items() if own[name] is None}
            differing = self._find_differing(values | fill, own)
            key = self._key_of(own)
            now_ok = RowState(logto_id=logto_id, row_id=self._id_after(own, differing))
            action: Action = "update" if differing else "nothing"
            return PlannedRow(
                logto_id=logto_id,
                action=action,
                links=link is not None,
                primary_key=key,
                values=differing,
                state=now_ok,
            )
        if not mapping.create:
            return None
        values = {**mapping.create_defaults, **fill, **values, **self._key_values(logto_id, None)}
        missing = [
            name
            for name, value in values.items()
            if value is None and not self._table.c[name].nullable
        ]
        if missing:
            problem = f"{missing[0]} is NOT NULL, but Logto has no value"
            return _refuse(state, "waiting", problem)
        ok = RowState(logto_id=logto_id)
        return PlannedRow(logto_id=logto_id, action="insert", values=values, state=ok)

    def _plan_deletion(
        self, logto_id: str, own: sa.RowMapping, state: RowState
    ) -> PlannedRow | None:
        action, key = self._mapping.when_deleted, self._key_of(own)
        after = RowState(logto_id=logto_id, row_id=encode_id(key))
        if action == "keep":
            return None
        if action == "delete":  # its primary key may be used again
            gone = RowState(logto_id=logto_id)
            return PlannedRow(logto_id=logto_id, action="delete", primary_key=key, state=gone)
        values = self._key_values(None, own) if action == "unlink" else dict(action)
        differing = self._find_differing(values, own)
        if not differing:
            return None
        return PlannedRow(
            logto_id=logto_id, action="update", primary_key=key, values=differing, state=after
        )

    def _lock_own(self, ids: Sequence[str]) -> tuple[dict[str, sa.RowMapping], set[str]]:
        """Lock the rows that have the keys of records. Return them by key, and the keys of those
        that somebody else has locked."""
        query = self._select_own(ids).with_for_update(skip_locked=True, key_share=True)
        rows = {row[_KEY]: row for row in self._run(query).mappings()}
        missing = [id_ for id_ in ids if id_ not in rows]
        return rows, set(self._find_own(missing)) if missing else set()

    def _find_own(self, ids: Sequence[str]) -> dict[str, sa.RowMapping]:
        return {row[_KEY]: row for row in self._run(self._select_own(ids)).mappings()}

    def _select_own(self, ids: Sequence[str]) -> sa.Select[Any]:
        text = self._mapping.key.text
        return sa.select(*self._read_columns(), text.label(_KEY)).where(text.in_(ids))

    def _find_links(self, rows: dict[str, Any]) -> dict[str, sa.RowMapping | NoLink]:
        link = self._mapping.link
        if link is None or not rows:
            return {}
        columns = self._read_columns()
        return LinkFinder(self._connection, self._mapping, link, columns, self._run).find(rows)

    def _settle_refusal(self, plan: PlannedRow, error: Exception) -> dict[str, RowState]:
        """Try once more together with the rows that have the values it wants."""
        if not isinstance(error, RowRejected):
            return super()._settle_refusal(plan, error)
        holder = self._find_holder(plan)
        ring = self._find_ring(plan) if holder is not None else []
        if len(ring) > 1:
            try:
                self._write_ring(ring)
            except (RowRejected, TimedOut):
                pass
            else:
                self._planned |= {swapped.logto_id: swapped for swapped in ring}
                return {swapped.logto_id: swapped.state for swapped in ring}
        problem = _describe(error, self._connection)
        return {plan.logto_id: _blocked(plan.state, "conflict", problem, holder)}

    def _find_taken(self, plans: Sequence[PlannedRow]) -> dict[str, tuple[str, str]]:
        """Find the rows that want a unique value of another row. Return the primary key of that
        row, and the column."""
        taken: dict[str, tuple[str, str]] = {}
        for column in self._mapping.unique_columns:
            wanted = {
                value: plan
                for plan in plans
                if isinstance(value := plan.values.get(column.key), Hashable) and value is not None
            }
            if not wanted:
                continue
            query = sa.select(*self._primary_key, column).where(column.in_(list(wanted)))
            for row in self._run(query):
                key, value = tuple(row)[:-1], row[-1]
                plan = wanted.get(value)
                if plan is not None and key != plan.primary_key:
                    taken.setdefault(plan.logto_id, (encode_id(key), column.name))
        return taken

    def _write_taken(
        self, plans: Sequence[PlannedRow], taken: Mapping[str, tuple[str, str]]
    ) -> dict[str, RowState]:
        """Write rows whose unique value another row had, one by one, because that may give it up. A
        row that isn't a record's won't, so that is a conflict at once."""
        holders = {taken[plan.logto_id][0] for plan in plans}
        owners = self._states.find_owners(holders) if holders else {}
        states: dict[str, RowState] = {}
        for plan in plans:
            holder, column = taken[plan.logto_id]
            if owners.get(holder):
                states |= self._write_in_time([plan])
            else:
                problem = f"another row has the value of {column}"
                states[plan.logto_id] = _blocked(plan.state, "conflict", problem, holder)
        return states

    def _find_holder(self, plan: PlannedRow) -> str | None:
        """The primary key of another row that has a unique value which this one wants."""
        for column in self._mapping.unique_columns:
            value = plan.values.get(column.key)
            if value is None:
                continue
            query = sa.select(*self._primary_key).where(column == value)
            row = self._run(query).first()
            if row is not None and tuple(row) != plan.primary_key:
                return encode_id(tuple(row))
        return None

    def _find_ring(self, plan: PlannedRow) -> list[PlannedRow]:
        """Follow who has what the other wants: several that swap unique values are only right
        together."""
        ring = [plan]
        while len(ring) < MOST_SWAPPED:
            holder = self._find_holder(ring[-1])
            if holder is None:
                return ring
            if any(holder == encode_id(each.primary_key) for each in ring):
                return ring
            owners = self._states.find_owners([holder]).get(holder, set())
            locked = sorted(self._lock(owners))
            plans = self._plan(locked, self._states.find(locked))
            plans = [each for each in plans if each.action != "nothing"]
            if len(plans) != 1:
                return [plan]
            ring += plans
        return [plan]

    def _write_ring(self, ring: Sequence[PlannedRow]) -> None:
        """Free the unique values first, by null or by a placeholder, then set them."""
        with _translate_errors(self._connection), self._connection.begin_nested():
            for plan in ring:
                freed = {
                    column.key: None if column.nullable else _placeholder(column, plan.logto_id)
                    for column in self._mapping.unique_columns
                    if column.key in plan.values and plan.action == "update"
                }
                if freed:
                    self._update([replace(plan, values=freed)])
            self._execute(ring)

    def _name_inserted(self, states: dict[str, RowState]) -> None:
        """Read the primary keys that the database made."""
        new = [
            i
            for i, state in states.items()
            if state.state == "ok" and self._planned[i].action == "insert"
        ]
        rows = self._find_own(new) if new else {}
        for logto_id in new:
            state, row = states[logto_id], rows.get(logto_id)
            if row is None:
                states[logto_id] = _blocked(state, "conflict", _NOT_KEPT)
            else:
                states[logto_id] = replace(state, row_id=encode_id(self._key_of(row)))

    def _read_columns(self) -> list[sa.Column[Any]]:
        mapping = self._mapping
        names = {*mapping.columns, *mapping.fill, mapping.key.column.key}
        if isinstance(mapping.when_deleted, dict):
            names |= mapping.when_deleted.keys()
        names |= {column.key for column in self._primary_key}
        return [column for column in self._table.c if column.key in names]

    def _key_values(self, logto_id: str | None, own: sa.RowMapping | None) -> dict[str, Any]:
        """The value of the key's column; of a JSON document, only the key's path changes."""
        key = self._mapping.key
        if not key.path:
            return {key.column.key: logto_id}
        document = dict((own[key.column] if own is not None else None) or {})
        inner = document
        for name in key.path[:-1]:
            inner[name] = dict(inner.get(name) or {})
            inner = inner[name]
        if logto_id is None:
            inner.pop(key.path[-1], None)
        else:
            inner[key.path[-1]] = logto_id
        return {key.column.key: document}

    def plan(self, ids: Sequence[str]) -> list[PlannedRow]:
        """Plan what is to be done with records' rows."""
        return self._plan(ids, self._states.find(ids))

    def list_rows(
        self, after: tuple[Any, ...], limit: int
    ) -> list[tuple[tuple[Any, ...], str | None]]:
        """List the next rows, with the ids of their users or organizations."""
        rows = self._list_after(after, limit, self._mapping.key.text)
        return [(tuple(row[:-1]), row[-1]) for row in rows]

    def find_logto_ids(self, primary_keys: Sequence[Any]) -> dict[Any, str]:
        """Return the ids of the records of rows whose primary key has one column."""
        [column] = self._primary_key
        query = sa.select(column, self._mapping.key.text.label(_KEY))
        rows = self._run(query.where(column.in_(primary_keys))).mappings()
        return {row[column]: row[_KEY] for row in rows if row[_KEY] is not None}

    def find_keys(self, ids: Sequence[str]) -> dict[str, Any]:
        """Return the primary keys of records' rows, which have one column."""
        return {id_: self._key_of(row)[0] for id_, row in self._find_own(ids).items()}

    def find_unsettled(self, ids: Collection[str]) -> list[str]:
        """List those of the records whose rows wait, conflict or are owed."""
        return [id_ for id_, state in self._states.find(ids).items() if state.state != "ok"]


class MemberWriter(TableWriter):
    """Writes the rows of one mapping of memberships."""

    def __init__(
        self,
        connection: sa.Connection,
        mapping: MemberMapping,
        entities: Collection[EntityMapping],
        schemas: Any,
    ) -> None:
        super().__init__(connection, mapping, schemas)
        self._mapping = mapping
        self._ends = [
            (end, next((e for e in entities if e.table is end.refers_to), None))
            for end in (mapping.organization, mapping.user)
        ]

    def find_waiting(self, blockers: Collection[str]) -> list[Key]:
        """List the memberships that wait for these users and organizations."""
        return [Key("membership", id_) for id_ in self._states.find_blocked(blockers)]

    def plan(self, members: dict[Key, MemberRow]) -> list[PlannedRow]:
        """Plan what is to be done with the rows of memberships that are present."""
        return self._plan(members, self._states.find([pair.id for pair in members]))

    def list_rows(
        self, after: tuple[Any, ...], limit: int
    ) -> list[tuple[tuple[Any, ...], str | None]]:
        """List the next rows, with the ids of their memberships. A row of an organization or a user
        that isn't Logto's has none."""
        return list(self._name(self._list_after(after, limit, *self._end_columns)).items())

    def _name_rows(self, keys: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], str | None]:
        """Return the memberships of rows; None for a row of an end that isn't Logto's."""
        if not keys:
            return {}
        place = self._primary_key
        is_it = sa.or_(
            *(
                sa.and_(*(column == value for column, value in zip(place, key, strict=True)))
                for key in keys
            )
        )
        return self._name(self._run(sa.select(*place, *self._end_columns).where(is_it)).all())

    @property
    def _end_columns(self) -> tuple[sa.Column[Any], sa.Column[Any]]:
        return self._mapping.organization.column, self._mapping.user.column

    def _name(self, rows: Sequence[sa.Row[Any]]) -> dict[tuple[Any, ...], str | None]:
        """Return the memberships of rows, by their primary keys, which the ends follow."""
        ids_of_ends = []
        for place, (_, mapping) in zip((-2, -1), self._ends, strict=True):
            values = {row[place] for row in rows if row[place] is not None}
            if mapping is None:
                ids_of_ends.append({value: value for value in values})
            else:
                writer = EntityWriter(self._connection, mapping, self._schemas)
                ids_of_ends.append(writer.find_logto_ids(sorted(values, key=str)))
        named: dict[tuple[Any, ...], str | None] = {}
        for row in rows:
            ends = [ids.get(row[place]) for place, ids in zip((-2, -1), ids_of_ends, strict=True)]
            organization, user = ends
            named[tuple(row[:-2])] = (
                membership(organization, user).id if organization and user else None
            )
        return named

    def delete(self, ids: Collection[str]) -> None:
        """Delete the rows of memberships that are over. Raises StoreUnavailable."""
        states = self._states.find(ids)
        keys = {
            id_: decode_id(state.row_id, self._primary_key)
            for id_, state in states.items()
            if state.row_id is not None
        }
        # The application may have deleted the row, and a database can use its primary key again.
        named = self._name_rows(list(keys.values()))
        plans = [
            PlannedRow(logto_id=id_, action="delete", primary_key=key, state=states[id_])
            for id_, key in keys.items()
            if named.get(key, id_) in (id_, None)
        ]
        written = self._write_in_time(plans)
        self._states.save([state for state in written.values() if state.state != "ok"], states)
        self.results += [(plan, written[plan.logto_id]) for plan in plans]
        gone = [id_ for id_ in states if id_ not in written or written[id_].state == "ok"]
        self._states.forget(gone)

    def write(self, members: dict[Key, MemberRow], ids: Collection[str]) -> None:
        """Write the rows of those of the memberships, which are present, that have these ids.
        Raises StoreUnavailable."""
        members = {pair: row for pair, row in members.items() if pair.id in ids}
        stored = self._states.find([pair.id for pair in members])
        plans = self._plan(members, stored)
        written = self._write_in_time([plan for plan in plans if plan.action != "nothing"])
        states = {p.logto_id: p.state for p in plans if p.action == "nothing"} | written
        inserted = [
            plan
            for plan in plans
            if plan.action == "insert" and states[plan.logto_id].state == "ok"
        ]
        keys = self._find_own([self._values_of_ends(plan.values) for plan in inserted])
        for plan in inserted:
            state, row = states[plan.logto_id], keys.get(self._values_of_ends(plan.values))
            if row is None:
                states[plan.logto_id] = _blocked(state, "conflict", _NOT_KEPT)
            else:
                states[plan.logto_id] = replace(state, row_id=encode_id(self._key_of(row)))
        self._states.save(states.values(), stored)
        self.results += [(plan, states[plan.logto_id]) for plan in plans]

    def _plan(
        self, members: dict[Key, MemberRow], states: Mapping[str, RowState]
    ) -> list[PlannedRow]:
        ends = self._resolve_ends(members)
        known = {pair: values for pair, values in ends.items() if not isinstance(values, Key)}
        own_rows = self._find_own(list(known.values()))
        plans = []
        for pair, row in members.items():
            state = states.get(pair.id) or RowState(logto_id=pair.id)
            end = ends.get(pair)
            if isinstance(end, Key):
                problem = f"the {end.kind} has no row yet"
                waits = _blocked(state, "waiting", problem, blocker(end))
                plans.append(PlannedRow(logto_id=pair.id, action="nothing", state=waits))
            elif end is not None:
                plans.append(self._plan_row(pair, row, end, own_rows.get(end)))
        return plans

    def _plan_row(
        self, pair: Key, row: MemberRow, ends: tuple[Any, ...], own: sa.RowMapping | None
    ) -> PlannedRow:
        try:
            values = {name: read(row) for name, read in self._mapping.columns.items()}
        except Exception as error:  # the application's function
            return _refuse(RowState(logto_id=pair.id), "conflict", describe_raised(error))
        if own is None:
            columns = (self._mapping.organization.column, self._mapping.user.column)
            keys = {column.key: value for column, value in zip(columns, ends, strict=True)}
            return PlannedRow(
                logto_id=pair.id,
                action="insert",
                values={**self._mapping.create_defaults, **values, **keys},
                state=RowState(logto_id=pair.id),
            )
        differing = self._find_differing(values, own)
        key = self._key_of(own)
        return PlannedRow(
            logto_id=pair.id,
            action="update" if differing else "nothing",
            primary_key=key,
            values=differing,
            state=RowState(logto_id=pair.id, row_id=self._id_after(own, differing)),
        )

    def _resolve_ends(self, members: Collection[Key]) -> dict[Key, tuple[Any, ...] | Key]:
        """Return what the columns of each membership's ends hold, or the end that has no row yet.

        A membership of an end that its mapping excludes isn't returned.
        """
        by_end: list[dict[str, Any]] = []
        excluded: set[Key] = set()
        for end, mapping in self._ends:
            ids = sorted({self._end_of(pair, end).id for pair in members})
            if mapping is None:
                by_end.append({id_: id_ for id_ in ids})
                continue
            found = EntityWriter(self._connection, mapping, self._schemas).find_keys(ids)
            by_end.append(found)
            missing = [id_ for id_ in ids if id_ not in found]
            for id_, row in read_rows(self._connection, end.kind, missing).items():
                if not (mapping.create and _is_wanted(mapping, row)):
                    excluded.add(Key(end.kind, id_))
        resolved: dict[Key, tuple[Any, ...] | Key] = {}
        for pair in members:
            keys = [self._end_of(pair, end) for end, _ in self._ends]
            if not excluded.isdisjoint(keys):
                continue
            absent = [key for key, found in zip(keys, by_end, strict=True) if key.id not in found]
            values = [found.get(key.id) for key, found in zip(keys, by_end, strict=True)]
            resolved[pair] = absent[0] if absent else tuple(values)
        return resolved

    @staticmethod
    def _end_of(pair: Key, end: End) -> Key:
        organization, user = pair.organization_and_user
        return organization if end.kind == "organization" else user

    def _values_of_ends(self, values: dict[str, Any]) -> tuple[Any, ...]:
        ends = (self._mapping.organization, self._mapping.user)
        return tuple(values[end.column.key] for end in ends)

    def _find_own(self, ends: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], sa.RowMapping]:
        if not ends:
            return {}
        organization, user = self._mapping.organization.column, self._mapping.user.column
        names = {column.key for column in (organization, user, *self._primary_key)}
        columns = [c for c in self._table.c if c.key in names | self._mapping.columns.keys()]
        query = sa.select(*columns).where(
            organization.in_({values[0] for values in ends}),
            user.in_({values[1] for values in ends}),
        )
        rows = self._run(query).mappings()
        return {(row[organization], row[user]): row for row in rows}


def blocker(end: Key) -> str:
    """How a state names the user or the organization that it waits for."""
    return f"{end.kind}:{end.id}"


def _is_wanted(mapping: EntityMapping, row: Any) -> bool:
    """Whether a mapping is for a record. One whose function raises has a conflict, and is."""
    try:
        return mapping.where(row)
    except Exception:
        return True


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


def _blocked(state: RowState, new: Any, reason: str, blocked_by: str | None = None) -> RowState:
    return replace(state, state=new, reason=reason, blocked_by=blocked_by)


def _is_equal(own: Any, value: Any) -> bool:
    """Whether a value from the database is what was written: a database gives some back in another
    form."""
    if isinstance(own, enum.Enum) and not isinstance(value, enum.Enum):
        return value in (own.name, own.value)
    if isinstance(own, Decimal) and isinstance(value, float):
        return own == Decimal(str(value))
    if isinstance(own, datetime) and isinstance(value, datetime):
        return _to_utc(own) == _to_utc(value)
    if isinstance(own, date) and isinstance(value, datetime):
        return own == value.date()
    return bool(own == value)


def _to_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _refuse(state: RowState, new: Any, reason: str, blocked_by: str | None = None) -> PlannedRow:
    """Plan to write nothing, and say why."""
    stopped = _blocked(state, new, reason, blocked_by)
    return PlannedRow(logto_id=state.logto_id, action="nothing", state=stopped)


def _describe(error: Exception, connection: sa.Connection) -> str:
    problem: str = getattr(error, "problem", type(error).__name__)
    if problem.endswith("Error") and problem.isidentifier():
        return f"a value doesn't fit its column ({problem})"
    return problem.partition(f" ({place_of(connection.engine.url)})")[0]


@contextmanager
def _translate_errors(connection: sa.Connection) -> Iterator[None]:
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
        raise RowRejected(problem="a value is of a type that doesn't fit its column") from error


def _placeholder(column: sa.Column[Any], logto_id: str) -> Any:
    if isinstance(column.type, sa.Integer):
        return -abs(hash(logto_id)) % 2**31
    return f"~{logto_id}"
