"""Write the application's rows of memberships, and of users' and members' roles, that follow from
the mirror."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.database.mapped_rows import (
    BY_WHERE,
    RowState,
    decode_id,
    encode_id,
)
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.declare_pairs import End, PairMapping, RoleEnd
from logto_webhooks.mapping.deletions import (
    DeletionGuard,
    Stop,
    find_read_away,
)
from logto_webhooks.mapping.ends import EndValues, LogtoIds, NoValue, OwnParents, OwnRoles
from logto_webhooks.mapping.entity_writer import EntityWriter
from logto_webhooks.mapping.links import describe_raised
from logto_webhooks.mapping.mirror import Pair, read_pairs
from logto_webhooks.mapping.primary_keys import make_conditions
from logto_webhooks.mapping.table_writer import (
    NOT_KEPT,
    PlannedRow,
    TableWriter,
    block,
    find_new_rows,
    refuse,
)
from logto_webhooks.records.record import Key

# Records that are written with the one that they waited for. Others are tried again, as all that
# waits: a transaction must end in time.
MOST_WAITING: Final = 10_000
Values = tuple[Any, ...]  # of the columns of a row's ends


class PairWriter(TableWriter):
    """Writes the rows of one mapping of memberships or of roles.

    Its methods get the ids of records: of memberships, or of the users who have roles. A record can
    have several rows, one for each role, each with its own state.
    """

    def __init__(
        self,
        connection: sa.Connection,
        mapping: PairMapping,
        parents: Collection[EntityMapping | PairMapping],
        schemas: Any,
        run: ApplyRun | None = None,
    ) -> None:
        """`parents` are the mappings of the tables that this one can refer to."""
        super().__init__(connection, mapping, schemas)
        self._guard = DeletionGuard(mapping.name, self._states, run)
        self._earlier = run
        self.kind = mapping.kind
        self.is_of_members = mapping.pair == "member"
        self._mapping = mapping
        self._ends = [(end, self._make_values(end, parents)) for end in mapping.ends]
        self._pairs: dict[str, list[Pair]] = {}  # by record, as read before
        self._unwanted: dict[str, list[Pair]] = {}  # those that `where` excludes
        self.came: set[str] = set()  # records that have a row, or another one, since now

    def _make_values(self, end: End, parents: Collection[EntityMapping | PairMapping]) -> EndValues:
        if isinstance(end, RoleEnd):
            return LogtoIds(end.column) if end.match is None else OwnRoles(end, self._run)
        mapping = next((parent for parent in parents if parent.table is end.refers_to), None)
        if mapping is None:
            return LogtoIds(end.column)
        if isinstance(mapping, EntityMapping):
            return OwnParents(end, EntityWriter(self._connection, mapping, self._schemas))
        return OwnParents(end, PairWriter(self._connection, mapping, parents, self._schemas))

    def refers_to(self, parent: TableWriter) -> bool:
        """Whether rows hold primary keys of another mapping's rows."""
        return any(end.refers_to is parent.table for end in self._mapping.ends)

    def find_waiting(self, blockers: Collection[str]) -> set[str]:
        """Return the records whose rows wait for these users, organizations and members."""
        return set(self._states.find_blocked(blockers, MOST_WAITING)) if blockers else set()

    def find_present(self, ids: Collection[str]) -> list[str]:
        """Return those of the records that have pairs, in order. Excluded ones are counted."""
        present = {pair.record_id for pair in self._read(ids)}
        return sorted(present.union(self._unwanted.keys() & ids))

    def find_extra(
        self, after: tuple[Any, ...], limit: int
    ) -> tuple[list[str], tuple[Any, ...] | None]:
        """Find rows, after a primary key, of pairs that the mirror doesn't have; return the last
        primary key, too. A row whose ends aren't all Logto's is the application's own."""
        columns = [end.column for end, _ in self._ends]
        rows = self._list_after(after, limit, *columns)
        if not rows:
            return [], None
        named = [ids for ids in self._name(rows).values() if None not in ids]
        records = {record for ids in named if (record := self._record_of(ids)) is not None}
        present = {
            tuple(end.id_in(pair.row) for end, _ in self._ends) for pair in self._read(records)
        }
        extra = sorted(":".join(map(str, ids)) for ids in named if ids not in present)
        return extra, tuple(rows[-1][: len(self._primary_key)])

    def find_over(self, ids: Collection[str], departures: Collection[str]) -> set[str]:
        """Return those of the records, and of those that waited for these `departures`, that may
        have rows of pairs that are over."""
        waiting = self.find_waiting(departures)
        if len(waiting) >= MOST_WAITING:
            self._states.release(departures)
        records = waiting.union(ids)
        present = {pair.id for pair in self._read(records)}
        if self.is_of_members:
            return records - present
        stored = self._find_stored(records) if records else {}
        return {state.record_id or i for i, state in stored.items() if i not in present}

    def remove(self, stops: Mapping[Key, Stop], ids: Collection[str]) -> None:
        """Delete the rows of the records' pairs that are over, unless something stops the deletion
        of their user or organization. Raises StoreUnavailable."""
        present = {pair.id for pair in self._read(ids)}
        stored = {i: state for i, state in self._find_stored(ids).items() if i not in present}
        stopped, counted = self._stop_deletions(stops, stored)
        refused = [
            refuse(stored[id_], stop.state, stop.reason, stop.blocked_by)
            for id_, stop in stopped.items()
        ]
        self._states.save([plan.state for plan in refused], stored)
        self.results += [(plan, plan.state) for plan in refused]
        states = {
            id_: replace(state, state="ok", reason=None, blocked_by=None)
            for id_, state in stored.items()
            if id_ not in stopped
        }
        plans = [
            PlannedRow(logto_id=id_, action="delete", primary_key=key, state=states[id_])
            for id_, key in self._find_written(states.values()).items()
        ]
        written = self._write_in_time(plans)
        self._states.save([state for state in written.values() if state.state != "ok"], stored)
        self.results += [(plan, written[plan.logto_id]) for plan in plans]
        gone = [id_ for id_ in states if id_ not in written or written[id_].state == "ok"]
        # These are remembered, because too many of them at once are held.
        noted = [id_ for id_ in gone if id_ in counted]
        self._states.save([RowState(logto_id=id_) for id_ in noted], stored)
        self._guard.note(noted)
        self._states.forget([id_ for id_ in gone if id_ not in counted])

    def _stop_deletions(
        self, stops: Mapping[Key, Stop], stored: Mapping[str, RowState]
    ) -> tuple[dict[str, Stop], set[str]]:
        """Return which of the pairs' rows aren't deleted now, and those that the guard counted: it
        counts memberships alone. What a role permits ends at once, and comes back by itself."""
        stopped = {}
        with_row = {id_: state for id_, state in stored.items() if state.row_id is not None}
        for id_, state in with_row.items():
            ends = Key(self.kind, state.record_id or id_).ends
            if stop := next((stops[end] for end in ends if end in stops), None):
                stopped[id_] = stop
        alone = [id_ for id_ in with_row if id_ not in stopped] if self.is_of_members else []
        away = find_read_away(self._connection, alone) if alone else set()
        if away:
            stopped |= self._guard.decide(sorted(away), stored, ())
        return stopped, away

    def write(self, ids: Collection[str]) -> None:
        """Write the rows of the records' pairs. Raises StoreUnavailable."""
        pairs = self._read(ids)
        stored = self._states.find([pair.id for pair in pairs])
        plans = self._plan(pairs, stored)
        written = self._write_in_time([plan for plan in plans if plan.action != "nothing"])
        states = {p.logto_id: p.state for p in plans if p.action == "nothing"} | written
        for plan in plans:
            state, before = states[plan.logto_id], plan.replaces or plan.primary_key
            if state.state != "ok" and before:  # the row is as it was
                states[plan.logto_id] = replace(state, row_id=encode_id(before))
        inserted = [
            plan
            for plan in plans
            if plan.action == "insert" and states[plan.logto_id].state == "ok"
        ]
        keys = self._find_own([self._values_of(plan.values) for plan in inserted])
        for plan in inserted:
            state, row = states[plan.logto_id], keys.get(self._values_of(plan.values))
            if row is None:
                states[plan.logto_id] = block(state, "conflict", NOT_KEPT)
            else:
                states[plan.logto_id] = replace(state, row_id=encode_id(self._key_of(row)))
        self._states.save(states.values(), stored)
        self.results += [(plan, states[plan.logto_id]) for plan in plans]
        self._tell_excluded(ids, pairs, states)
        new = find_new_rows(states, stored, {plan.logto_id: plan for plan in plans})
        self.came.update(states[id_].record_id or id_ for id_ in new)
        excluded = stored.keys() - states.keys()
        self._states.forget([id_ for id_ in excluded if stored[id_].row_id is None])

    def _tell_excluded(
        self, ids: Collection[str], pairs: Sequence[Pair], states: Mapping[str, RowState]
    ) -> None:
        """Tell which pairs get no row. This isn't stored: excluded pairs shall cost nothing."""
        without = [pair for pair in pairs if pair.id not in states]
        without += [pair for id_ in ids for pair in self._unwanted.get(id_, ())]
        for pair in without:
            plan = refuse(self._new_state(pair), "excluded", BY_WHERE)
            self.results.append((plan, plan.state))

    def _read(self, ids: Collection[str]) -> list[Pair]:
        """Read the records' pairs that are present, except roles that the mapping excludes."""
        if new := sorted(set(ids) - self._pairs.keys()):
            self._pairs |= {id_: [] for id_ in new}
            for pair in read_pairs(self._connection, self._mapping.pair, new):
                kept = self._pairs if self._is_wanted(pair) else self._unwanted
                kept.setdefault(pair.record_id, []).append(pair)
        return [pair for id_ in sorted(ids) for pair in self._pairs[id_]]

    def _is_wanted(self, pair: Pair) -> bool:
        """Whether `where` selects the role. If it raises, its row is a conflict."""
        try:
            return self._mapping.where is None or self._mapping.where(pair.row)
        except Exception:
            return True

    def _find_stored(self, ids: Collection[str]) -> dict[str, RowState]:
        """Find the states of all pairs of records."""
        return self._states.find_of_records(ids, several=not self.is_of_members)

    def _new_state(self, pair: Pair) -> RowState:
        record_id = None if pair.id == pair.record_id else pair.record_id
        return RowState(logto_id=pair.id, record_id=record_id)

    def _plan(self, pairs: Sequence[Pair], stored: Mapping[str, RowState]) -> list[PlannedRow]:
        values = self._find_values(pairs)
        filled = {id_: ends for id_, ends in values.items() if not isinstance(ends, NoValue)}
        own_rows = self._find_own(list(filled.values()))
        plans = []
        for pair in pairs:
            ends = values[pair.id]
            if not isinstance(ends, NoValue):
                plans.append(self._plan_row(pair, ends, own_rows.get(ends), stored.get(pair.id)))
            elif ends.state != "excluded":
                state = stored.get(pair.id) or self._new_state(pair)
                plans.append(refuse(state, ends.state, ends.reason, ends.blocked_by))
        return self._replace_former(plans, stored)

    def _plan_row(
        self, pair: Pair, ends: Values, own: sa.RowMapping | None, stored: RowState | None
    ) -> PlannedRow:
        new = self._new_state(pair)
        try:
            if self._mapping.where is not None:
                self._mapping.where(pair.row)
            values = {name: read(pair.row) for name, read in self._mapping.columns.items()}
        except Exception as error:  # the application's function
            return refuse(stored or new, "conflict", describe_raised(error))
        if own is None:
            keys = {end.column.key: value for (end, _), value in zip(self._ends, ends, strict=True)}
            return PlannedRow(
                logto_id=pair.id,
                action="insert",
                values={**self._mapping.create_defaults, **values, **keys},
                state=new,
            )
        differing = self._find_differing(values, own)
        return PlannedRow(
            logto_id=pair.id,
            action="update" if differing else "nothing",
            primary_key=self._key_of(own),
            values=differing,
            state=replace(new, row_id=self._id_after(own, differing)),
        )

    def _replace_former(
        self, plans: Sequence[PlannedRow], stored: Mapping[str, RowState]
    ) -> list[PlannedRow]:
        """Delete the former rows of pairs that get another one, such as those of renamed roles,
        unless they are the rows of others now."""
        kept = {encode_id(plan.primary_key) for plan in plans if plan.primary_key}
        moved = {
            plan.logto_id: state
            for plan in plans
            if plan.state.state == "ok"
            and (state := stored.get(plan.logto_id)) is not None
            and state.row_id not in kept | {None}
        }
        former = self._find_written(moved.values()) if moved else {}
        return [
            replace(plan, action="update", replaces=former[plan.logto_id])
            if plan.logto_id in former and plan.action == "nothing"
            else replace(plan, replaces=former.get(plan.logto_id, ()))
            for plan in plans
        ]

    def _find_written(self, states: Collection[RowState]) -> dict[str, tuple[Any, ...]]:
        """Return the primary keys of rows that were written for pairs. The application may have
        deleted such a row, and a database can use its primary key again."""
        keys = {
            state.logto_id: decode_id(state.row_id, self._primary_key)
            for state in states
            if state.row_id is not None
        }
        records = {state.logto_id: state.record_id or state.logto_id for state in states}
        named = self._name_rows(list(keys.values()))
        return {
            id_: key
            for id_, key in keys.items()
            if key in named and self._record_of(named[key]) in (records[id_], None)
        }

    def _record_of(self, ids: Sequence[str | None]) -> str | None:
        """Return the record of a row by the ids of its ends; None if one isn't Logto's."""
        owners = ids if self.is_of_members else ids[:-1]
        return None if None in owners else ":".join(map(str, owners))

    def _name_rows(
        self, keys: Sequence[tuple[Any, ...]]
    ) -> dict[tuple[Any, ...], tuple[str | None, ...]]:
        """Return the ids of the ends of rows."""
        place = self._primary_key
        query = sa.select(*place, *(end.column for end, _ in self._ends))
        rows: list[sa.Row[Any]] = []
        for are_some in make_conditions(place, keys):
            rows += self._run(query.where(are_some)).all()
        return self._name(rows)

    def _name(self, rows: Sequence[sa.Row[Any]]) -> dict[tuple[Any, ...], tuple[str | None, ...]]:
        """Return the ids of the ends of rows, which follow their primary keys; None for an end that
        isn't Logto's."""
        count = len(self._primary_key)
        ids_of_ends = []
        for place, (_, values) in enumerate(self._ends, start=count):
            own = {row[place] for row in rows if row[place] is not None}
            ids_of_ends.append(values.find_ids(own) if own else {})
        return {
            tuple(row[:count]): tuple(
                ids.get(value) for ids, value in zip(ids_of_ends, row[count:], strict=True)
            )
            for row in rows
        }

    def _find_values(self, pairs: Sequence[Pair]) -> dict[str, Values | NoValue]:
        """Return what the columns of each pair's ends hold, or why one of them has no value."""
        ids = {pair.id: [end.id_in(pair.row) for end, _ in self._ends] for pair in pairs}
        by_end = [
            values.find_values({ends[place] for ends in ids.values()}) if ids else {}
            for place, (_, values) in enumerate(self._ends)
        ]
        resolved: dict[str, Values | NoValue] = {}
        for pair_id, ends in ids.items():
            values = tuple(by_id[id_] for by_id, id_ in zip(by_end, ends, strict=True))
            missing = [value for value in values if isinstance(value, NoValue)]
            missing.sort(key=self._comes_last)
            resolved[pair_id] = missing[0] if missing else values
        return resolved

    def _comes_last(self, value: NoValue) -> int:
        """Order the reasons why a row can't be written: in a rehearsal, its parents that would have
        got a row by now are no reason."""
        if value.state == "excluded":
            return 0
        return 2 if self._earlier is not None and self._earlier.has_parent(value.blocked_by) else 1

    def _values_of(self, values: Mapping[Any, Any]) -> Values:
        return tuple(values[end.column.key] for end, _ in self._ends)

    def _find_own(self, ends: Sequence[Values]) -> dict[Values, sa.RowMapping]:
        """Find the own rows that have these values in the columns of their ends."""
        if not ends:
            return {}
        columns = [end.column for end, _ in self._ends]
        names = {column.key for column in (*columns, *self._primary_key)}
        read = [c for c in self.table.c if c.key in names | self._mapping.columns.keys()]
        query = sa.select(*read).where(
            *(column.in_({values[i] for values in ends}) for i, column in enumerate(columns))
        )
        rows = self._run(query).mappings()
        return {tuple(row[column] for column in columns): row for row in rows}

    def find_keys(self, ids: Sequence[str]) -> dict[str, Any]:
        """Return the primary keys of memberships' rows, which have one column."""
        values = self._find_values(self._read(ids))
        filled = {id_: ends for id_, ends in values.items() if not isinstance(ends, NoValue)}
        own_rows = self._find_own(list(filled.values()))
        return {
            id_: self._key_of(own_rows[ends])[0] for id_, ends in filled.items() if ends in own_rows
        }

    def find_logto_ids(self, primary_keys: Sequence[Any]) -> dict[Any, str]:
        """Return the ids of the memberships of rows whose primary key has one column."""
        named = self._name_rows([(key,) for key in primary_keys])
        records = {key: self._record_of(ids) for (key,), ids in named.items()}
        return {key: record for key, record in records.items() if record is not None}

    def find_excluded(self, ids: Sequence[str]) -> set[str]:
        """Return those of the memberships whose user or organization gets no row."""
        values = self._find_values(self._read(ids))
        return {
            id_
            for id_, ends in values.items()
            if isinstance(ends, NoValue) and ends.state == "excluded"
        }
