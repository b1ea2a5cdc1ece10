"""Write the application's rows of users and organizations that follow from the mirror."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.database.dialect import among
from logto_webhooks.database.mapped_rows import (
    BY_WHERE,
    CHANGING,
    FORGETTING,
    LINKING,
    NOT_CREATED,
    RowState,
    decode_id,
    encode_id,
    lock_free_records,
)
from logto_webhooks.errors import RowRejected, StoreUnavailable, TimedOut
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.declare import EntityMapping, UniqueColumn
from logto_webhooks.mapping.deletions import (
    TOO_MANY,
    DeletionGuard,
    Stop,
    find_unconfirmed,
)
from logto_webhooks.mapping.links import LinkFinder, NoLink, describe_raised
from logto_webhooks.mapping.mirror import find_present, has_uncompared, read_rows
from logto_webhooks.mapping.primary_keys import make_conditions
from logto_webhooks.mapping.table_writer import (
    NOT_KEPT,
    SKIPPED,
    Action,
    PlannedRow,
    TableWriter,
    block,
    find_new_rows,
    refuse,
    translate_row_errors,
)
from logto_webhooks.records.record import Key

MOST_SWAPPED: Final = 50  # rows whose unique values go round, which are written together
KEY: Final = "logto_key"
TAKEN: Final = "another row has the value of {}"


class EntityWriter(TableWriter):
    """Writes the rows of one mapping of users or organizations."""

    def __init__(
        self,
        connection: sa.Connection,
        mapping: EntityMapping,
        schemas: Any,
        run: ApplyRun | None = None,
        applied_to: str | None = None,
    ) -> None:
        """`applied_to` is that of the registered mapping."""
        super().__init__(connection, mapping, schemas)
        self._guard = DeletionGuard(mapping.name, self._states, run)
        self._is_over_all = run is not None
        self._rehearsal = run if run is not None and run.rehearses else None
        self._is_compared = applied_to in (None, LINKING)
        self._is_forgetting = applied_to == FORGETTING
        self.kind = mapping.kind
        self._mapping = mapping
        self._unique = mapping.list_unique(connection.dialect.name)
        self.came: set[str] = set()  # records that have a row, or another one, since now

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
            owed = [block(state, "owed", CHANGING) for state in stored.values()]
            self._states.save(owed, stored)
        return locked

    def _write(self, ids: Sequence[str]) -> set[str]:
        """Write rows; return the primary keys of those that gave up a value."""
        stored = self._states.find(ids)
        plans = self._plan(ids, stored)
        self._planned = {plan.logto_id: plan for plan in plans}
        to_write = [plan for plan in plans if plan.action != "nothing"]
        claimed = self._find_claimed(to_write)
        to_write = [plan for plan in to_write if plan.logto_id not in claimed]
        taken = self._find_taken(to_write)
        written = self._write_in_time([plan for plan in to_write if plan.logto_id not in taken])
        written |= self._write_taken([plan for plan in to_write if plan.logto_id in taken], taken)
        states = {plan.logto_id: plan.state for plan in plans if plan.action == "nothing"} | written
        states |= claimed
        self._name_inserted(states)
        self._states.save(states.values(), stored)
        self.results += [(self._planned[i], state) for i, state in states.items()]
        done = [self._planned[i] for i, state in states.items() if state.state == "ok"]
        self.came |= find_new_rows(states, stored, self._planned)
        if self._rehearsal is not None:
            self._claim(done, self._rehearsal)
        self._guard.note([plan.logto_id for plan in done if plan.deletes])
        return {encode_id(p.primary_key) for p in done if p.action in ("update", "delete")}

    def _plan(self, ids: Sequence[str], states: Mapping[str, RowState]) -> list[PlannedRow]:
        rows = read_rows(self._connection, self._mapping.kind, ids)
        own_rows, locked = self._lock_own(ids)
        unlinked = [i for i, row in rows.items() if i not in own_rows and row.deleted_at is None]
        wanted = {i: rows[i] for i in unlinked if self._is_wanted(rows[i])}
        linked = self._find_links(wanted)
        linked |= self._find_former(
            {i: row for i, row in wanted.items() if i not in linked and i in states}, states
        )
        gone = [i for i, row in rows.items() if row.deleted_at is not None and i in own_rows]
        stopped = self._stop_deletions(gone, states)
        plans = []
        for logto_id, row in rows.items():
            state = states.get(logto_id) or RowState(logto_id=logto_id)
            if logto_id in locked:
                plans.append(refuse(state, "owed", SKIPPED))
                continue
            if stop := stopped.get(logto_id):
                plans.append(refuse(state, stop.state, stop.reason, stop.blocked_by))
                continue
            own = own_rows.get(logto_id)
            plans.append(self._plan_row(logto_id, row, own, linked.get(logto_id), state))
        return plans

    def find_stopped(self, ids: Collection[str]) -> dict[str, Stop]:
        """Return which of the records were deleted, but have rows that are not to be deleted
        now."""
        rows = read_rows(self._connection, self._mapping.kind, ids) if ids else {}
        gone = [id_ for id_, row in rows.items() if row.deleted_at is not None]
        if not gone:
            return {}
        try:
            with translate_row_errors(self._connection), self._connection.begin_nested():
                there = self._find_own(gone)
        except StoreUnavailable:  # they will be owed
            return {}
        return self._stop_deletions(there, self._states.find(there))

    def find_held(self, ids: Collection[str]) -> dict[str, Stop]:
        """Return which of the records have rows whose deletion is held."""
        states = self._states.find(ids) if ids else {}
        return {
            id_: Stop("held", TOO_MANY) for id_, state in states.items() if state.state == "held"
        }

    def _stop_deletions(
        self, gone: Collection[str], stored: Mapping[str, RowState]
    ) -> dict[str, Stop]:
        if not gone or self._mapping.when_deleted not in ("delete", "unlink"):
            return {}
        unconfirmed = find_unconfirmed(self._connection, self._mapping.kind, gone)
        return self._guard.decide(sorted(gone), stored, unconfirmed)

    def _plan_nothing(
        self, state: RowState, own: sa.RowMapping | None, excluded: str | None = None
    ) -> PlannedRow:
        """Nothing is to be written, so nothing is waited for. If the record is excluded, say by
        what."""
        row_id = state.row_id if own is None else encode_id(self._key_of(own))
        settled = RowState(logto_id=state.logto_id, row_id=row_id)
        if excluded is not None:
            settled = replace(settled, state="excluded", reason=excluded)
        return PlannedRow(logto_id=state.logto_id, action="nothing", state=settled)

    def _plan_row(
        self, logto_id: str, row: Any, own: sa.RowMapping | None, link: Any, state: RowState
    ) -> PlannedRow:
        mapping = self._mapping
        if row.deleted_at is not None:
            deletion = None if own is None else self._plan_deletion(logto_id, own, state)
            return deletion or self._plan_nothing(state, own)
        try:
            if not mapping.where(row):
                return self._plan_nothing(state, own, BY_WHERE)
            values = {name: read(row) for name, read in mapping.columns.items()}
            fill = {name: read(row) for name, read in mapping.fill.items()}
        except Exception as error:  # the application's function
            return refuse(state, "conflict", describe_raised(error))
        if isinstance(link, NoLink):
            return refuse(state, link.state, link.reason, link.blocked_by)
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
            return self._plan_nothing(state, own, NOT_CREATED)
        values = {**mapping.create_defaults, **fill, **values, **self._key_values(logto_id, None)}
        missing = [
            name
            for name, value in values.items()
            if value is None and not self.table.c[name].nullable
        ]
        if missing:
            problem = f"{missing[0]} is NOT NULL, but Logto has no value"
            return refuse(state, "waiting", problem)
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
            return PlannedRow(
                logto_id=logto_id, action="delete", deletes=True, primary_key=key, state=gone
            )
        values = self._key_values(None, own) if action == "unlink" else dict(action)
        differing = self._find_differing(values, own)
        if not differing:
            return None
        return PlannedRow(
            logto_id=logto_id,
            action="update",
            deletes=action == "unlink",
            primary_key=key,
            values=differing,
            state=after,
        )

    def _lock_own(self, ids: Sequence[str]) -> tuple[dict[str, sa.RowMapping], set[str]]:
        """Lock the rows that have the keys of records. Return them by key, and the keys of those
        that somebody else has locked."""
        query = self._own.with_for_update(skip_locked=True, key_share=True)
        rows = {row[KEY]: row for row in self._run(query, {"ids": list(ids)}).mappings()}
        missing = [id_ for id_ in ids if id_ not in rows]
        return rows, set(self._find_own(missing)) if missing else set()

    def _find_own(self, ids: Sequence[str]) -> dict[str, sa.RowMapping]:
        return {row[KEY]: row for row in self._run(self._own, {"ids": list(ids)}).mappings()}

    @property
    def _own(self) -> sa.Select[Any]:
        """Select the rows that have the keys `ids`."""
        text = self._mapping.key.text
        is_text = isinstance(text.type, sa.String)  # not a type of the application's own
        is_one = among(text, "ids") if is_text else text.in_(sa.bindparam("ids", expanding=True))
        return sa.select(*self._read_columns(), text.label(KEY)).where(is_one)

    def _find_links(self, rows: dict[str, Any]) -> dict[str, sa.RowMapping | NoLink]:
        link = self._mapping.link
        if link is None or not rows:
            return {}
        run = self._rehearsal
        finder = LinkFinder(
            self._connection,
            self._mapping,
            link,
            self._read_columns(),
            self._run,
            None if run is None else run.find_rows(self.name),
            partial(self._compares, rows),
        )
        return finder.find(rows)

    def _find_former(
        self, rows: Mapping[str, Any], states: Mapping[str, RowState]
    ) -> dict[str, sa.RowMapping | NoLink]:
        """Find the rows that records had before they were unlinked, and lock them. The application
        may have given such a row to somebody else, or emptied it, and a database can use its
        primary key again: so it must have no key, no other record, and the same texts."""
        before = {i: row_id for i in rows if (row_id := states[i].row_id) is not None}
        if self._mapping.when_deleted != "unlink" or not before:
            return {}
        owners = self._states.find_owners(before.values())
        keys = {
            decode_id(row_id, self._primary_key): id_
            for id_, row_id in before.items()
            if owners.get(row_id) == {id_}
        }
        query = sa.select(*self._read_columns()).where(self._mapping.key.text.is_(None))
        queries = [query.where(are_some) for are_some in make_conditions(self._primary_key, keys)]
        found = {
            keys[self._key_of(row)]: row for query in queries for row in self._run(query).mappings()
        }
        same = {id_: row for id_, row in found.items() if self._has_same_texts(rows[id_], row)}
        if not same:
            return {}
        locking = [query.with_for_update(skip_locked=True, key_share=True) for query in queries]
        locked = {
            keys[self._key_of(row)]: row for query in locking for row in self._run(query).mappings()
        }
        return {id_: locked.get(id_) or NoLink(SKIPPED, "owed", before[id_]) for id_ in same}

    def _has_same_texts(self, row: Any, own: sa.RowMapping) -> bool:
        """Whether all texts that a mapping keeps equal are equal, and there is one."""
        try:
            values = {name: read(row) for name, read in self._mapping.columns.items()}
        except Exception:  # the application's function
            return False
        texts = {name: value for name, value in values.items() if isinstance(value, str) and value}
        return bool(texts) and not self._find_differing(texts, own)

    def _compares(self, ids: Collection[str]) -> bool:
        """Whether other records may want the same existing rows, but haven't been compared yet."""
        if self._is_compared or self._is_over_all:  # which links in a second pass
            return not self._is_compared
        if self._is_forgetting:  # what was compared before doesn't count
            return True
        return has_uncompared(self._connection, self.name, self._mapping.kind, ids)

    def _is_wanted(self, row: Any) -> bool:
        """Whether the mapping is for a record. If that can't be told, no row is linked."""
        try:
            return self._mapping.where(row)
        except Exception:  # the application's function
            return False

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
        problem = self._explain(error, plan)
        return {plan.logto_id: block(plan.state, "conflict", problem, holder)}

    def _find_taken(self, plans: Sequence[PlannedRow]) -> dict[str, tuple[str, UniqueColumn]]:
        """Find the rows that want a unique value of another row. Return the primary key of that
        row, and the column."""
        taken: dict[str, tuple[str, UniqueColumn]] = {}
        for unique in self._unique:
            column = unique.column
            wanted = {
                value: plan
                for plan in plans
                if isinstance(value := plan.values.get(column.key), Hashable) and value is not None
            }
            if not wanted:
                continue
            query = sa.select(*self._primary_key, column).where(column.in_(list(wanted)))
            if unique.condition is not None:
                query = query.where(unique.condition)
            for row in self._run(query):
                key, value = tuple(row)[:-1], row[-1]
                plan = wanted.get(value)
                if plan is not None and key != plan.primary_key:
                    taken.setdefault(plan.logto_id, (encode_id(key), unique))
        return taken

    @property
    def _surely_unique(self) -> list[sa.Column[Any]]:
        return [unique.column for unique in self._unique if unique.is_sure]

    def _find_claimed(self, plans: Sequence[PlannedRow]) -> dict[str, RowState]:
        """Refuse rows whose unique value another row would have, if this weren't a rehearsal."""
        if self._rehearsal is None:
            return {}
        return {
            plan.logto_id: block(plan.state, "conflict", TAKEN.format(column.name))
            for column in self._surely_unique
            for plan in plans
            if column.key in plan.values
            and self._rehearsal.is_claimed(
                f"{self.name}.{column.key}", plan.values[column.key], plan.logto_id
            )
        }

    def _claim(self, plans: Sequence[PlannedRow], run: ApplyRun) -> None:
        for column in self._surely_unique:
            for plan in plans:
                if column.key in plan.values:
                    name = f"{self.name}.{column.key}"
                    run.claim(name, plan.values[column.key], plan.logto_id)

    def _write_taken(
        self, plans: Sequence[PlannedRow], taken: Mapping[str, tuple[str, UniqueColumn]]
    ) -> dict[str, RowState]:
        """Write rows whose unique value another row had, one by one, because that may give it up. A
        row that isn't a record's won't, so that is a conflict at once if the value is surely
        unique."""
        holders = {taken[plan.logto_id][0] for plan in plans}
        owners = self._states.find_owners(holders) if holders else {}
        states: dict[str, RowState] = {}
        for plan in plans:
            holder, unique = taken[plan.logto_id]
            if owners.get(holder) or not unique.is_sure:
                states |= self._write_in_time([plan])
            else:
                problem = TAKEN.format(unique.column.name)
                states[plan.logto_id] = block(plan.state, "conflict", problem, holder)
        return states

    def _find_holder(self, plan: PlannedRow) -> str | None:
        """The primary key of another row that has a unique value which this one wants."""
        for unique in self._unique:
            value = plan.values.get(unique.column.key)
            if value is None:
                continue
            query = sa.select(*self._primary_key).where(unique.column == value)
            if unique.condition is not None:
                query = query.where(unique.condition)
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
            if any(holder == encode_id(swapped.primary_key) for swapped in ring):
                return ring
            owners = self._states.find_owners([holder]).get(holder, set())
            locked = sorted(self._lock(owners))
            plans = self._plan(locked, self._states.find(locked))
            plans = [changing for changing in plans if changing.action != "nothing"]
            if len(plans) != 1:
                return [plan]
            ring += plans
        return [plan]

    def _write_ring(self, ring: Sequence[PlannedRow]) -> None:
        """Free the unique values first, by null or by a placeholder, then set them."""
        with translate_row_errors(self._connection), self._connection.begin_nested():
            for plan in ring:
                freed = {
                    column.key: None if column.nullable else _placeholder(column, plan.logto_id)
                    for column in (unique.column for unique in self._unique)
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
                states[logto_id] = block(state, "conflict", NOT_KEPT)
            else:
                states[logto_id] = replace(state, row_id=encode_id(self._key_of(row)))

    def _read_columns(self) -> list[sa.Column[Any]]:
        mapping = self._mapping
        names = {*mapping.columns, *mapping.fill, mapping.key.column.key}
        if isinstance(mapping.when_deleted, dict):
            names |= mapping.when_deleted.keys()
        names |= {column.key for column in self._primary_key}
        return [column for column in self.table.c if column.key in names]

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

    def find_extra(
        self, after: tuple[Any, ...], limit: int
    ) -> tuple[list[str], tuple[Any, ...] | None]:
        """Find rows, after a primary key, whose records the mirror doesn't have; return the last
        primary key, too."""
        rows = self._list_after(after, limit, self._mapping.key.text)
        ids = {row[-1] for row in rows if row[-1] is not None}
        extra = sorted(ids - find_present(self._connection, self.kind, ids))
        return extra, tuple(rows[-1][:-1]) if rows else None

    def find_logto_ids(self, primary_keys: Sequence[Any]) -> dict[Any, str]:
        """Return the ids of the records of rows whose primary key has one column."""
        [column] = self._primary_key
        query = sa.select(column, self._mapping.key.text.label(KEY))
        rows = self._run(query.where(column.in_(primary_keys))).mappings()
        return {row[column]: row[KEY] for row in rows if row[KEY] is not None}

    def find_keys(self, ids: Sequence[str]) -> dict[str, Any]:
        """Return the primary keys of records' rows, which have one column."""
        return {id_: self._key_of(row)[0] for id_, row in self._find_own(ids).items()}

    def find_excluded(self, ids: Sequence[str]) -> set[str]:
        """Return those of the records without a row that get none: `where` excludes them, or no
        rows are created. One for which `where` raises has a conflict."""

        def is_excluded(row: Any) -> bool:
            try:
                return not (self._mapping.create and self._mapping.where(row))
            except Exception:
                return not self._mapping.create

        rows = read_rows(self._connection, self.kind, ids)
        return {id_ for id_, row in rows.items() if is_excluded(row)}

    def find_unsettled(self, ids: Collection[str]) -> list[str]:
        """List those of the records whose rows wait, conflict or are owed."""
        return [id_ for id_, state in self._states.find(ids).items() if not state.is_settled]


def _placeholder(column: sa.Column[Any], logto_id: str) -> Any:
    if isinstance(column.type, sa.Integer):
        return -abs(hash(logto_id)) % 2**31
    return f"~{logto_id}"
