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
    encode_id,
)
from logto_webhooks.database.records import OTHER_END
from logto_webhooks.errors import RowRejected
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.declare_pairs import End, PairMapping, RoleEnd
from logto_webhooks.mapping.deletions import (
    Stop,
    find_read_away,
    find_unread,
)
from logto_webhooks.mapping.ends import (
    EndValues,
    Former,
    LogtoIds,
    NoValue,
    OwnParents,
    OwnRoles,
)
from logto_webhooks.mapping.entity_writer import EntityWriter
from logto_webhooks.mapping.mirror import Pair, read_pairs
from logto_webhooks.mapping.pair_rows import PairRows, Values
from logto_webhooks.mapping.primary_keys import describe_null, make_conditions
from logto_webhooks.mapping.row_limits import RowLimits
from logto_webhooks.mapping.table_writer import (
    NOT_KEPT,
    PlannedRow,
    TableWriter,
    find_new_rows,
    refuse,
)
from logto_webhooks.records.record import Key

# Records that are written with the one that they waited for. Others are tried again, as all that
# waits: a transaction must end in time.
MOST_WAITING: Final = 10_000


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
        limits: RowLimits | None = None,
    ) -> None:
        """`parents` are the mappings of the tables that this one can refer to."""
        super().__init__(connection, mapping, schemas, run, limits)
        self.kind = mapping.kind
        self.is_of_members = mapping.pair == "member"
        # The kinds whose deletions no mapping counts: their rows stay, or there are none.
        self._unguarded = set(OTHER_END) - {
            parent.kind
            for parent in parents
            if isinstance(parent, EntityMapping) and parent.when_deleted in ("delete", "unlink")
        }
        self._mapping = mapping
        ends = [(end, self._make_values(end, parents)) for end in mapping.ends]
        self._rows = PairRows(mapping, ends, self._run, connection.dialect, run)
        self._pairs: dict[str, list[Pair]] = {}  # by record, as read before
        self._unwanted: dict[str, list[Pair]] = {}  # those that `where` excludes
        self._failed: dict[str, Exception] = {}  # of pairs for which `where` has no result
        self._inserted_ends: dict[str, str] = {}  # those of new rows, as text
        self.came: set[str] = set()  # records that have a row, or another one, since now

    def _make_values(self, end: End, parents: Collection[EntityMapping | PairMapping]) -> EndValues:
        if isinstance(end, RoleEnd):
            return LogtoIds(end.column) if end.match is None else OwnRoles(end, self._run)
        referred = end.find_referred([parent.table for parent in parents])
        if referred is None:
            return LogtoIds(end.column)
        mapping = next(parent for parent in parents if parent.table is referred.table)
        if isinstance(mapping, EntityMapping):
            writer = EntityWriter(self._connection, mapping, self._schemas, limits=self._limits)
            return OwnParents(end, writer, referred)
        members = PairWriter(self._connection, mapping, parents, self._schemas, limits=self._limits)
        return OwnParents(end, members, referred)

    def refers_to(self, parent: TableWriter) -> bool:
        """Whether rows refer to another mapping's rows."""
        return any(end.find_referred([parent.table]) is not None for end in self._mapping.ends)

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
        rows = self._list_after(after, limit, *self._rows.columns, where=self._mapping.of_class)
        if not rows:
            return [], None
        count = len(self._primary_key)
        named = self._rows.name_ends({tuple(row[count:]) for row in rows}).values()
        complete = [ids for ids in named if None not in ids]
        records = {record for ids in complete if (record := self._rows.record_of(ids)) is not None}
        present = {
            tuple(end.id_in(pair.row) for end in self._mapping.ends) for pair in self._read(records)
        }
        extra = sorted(":".join(map(str, ids)) for ids in complete if ids not in present)
        return extra, tuple(rows[-1][:count])

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
        known = self._find_stored(ids)
        present = {pair.id: pair for pair in self._read(ids)}
        stored = {id_: state for id_, state in known.items() if id_ not in present}
        # They take the rows of those that are over, instead of new ones.
        without_row = [
            pair for id_, pair in present.items() if id_ not in known or known[id_].row_id is None
        ]
        put_off = self._put_off({*stored, *ids}, stored)
        self._settle(put_off, stored)
        later = {plan.logto_id for plan in put_off}
        over = {i: s for i, s in stored.items() if later.isdisjoint((i, s.record_id))}
        stopped, counted = self._stop_deletions(stops, over)
        stops_of_rows = [
            refuse(stored[id_], stop.state, stop.reason, stop.blocked_by)
            for id_, stop in stopped.items()
        ]
        self._settle(stops_of_rows, stored)
        ending = [state for id_, state in over.items() if id_ not in stopped]
        gone = self._delete_rows(ending, without_row, stored)
        # These are remembered, because too many of them at once are held.
        noted = gone & counted
        self._states.save([RowState(logto_id=id_) for id_ in noted], stored)
        self._guard.note(noted)
        self._states.forget(gone - counted)

    def _delete_rows(
        self, over: Sequence[RowState], new: Sequence[Pair], stored: Mapping[str, RowState]
    ) -> set[str]:
        """Delete the rows of pairs that are over, unless `new` pairs want them. Return the pairs
        that have none any more."""
        rows = self._rows.find_written(over, over=True)
        over = [replace(state, state="ok", reason=None, blocked_by=None) for state in over]
        # The application may have deleted the row, and inserted it again with other values.
        others = [s for s in over if s.logto_id not in rows and s.row_id is not None]
        rows |= self._rows.find_by_states(others)
        kept = set() if self.is_of_members else set(self._rows.find_values(new).values())
        rows = {i: row for i, row in rows.items() if self._rows.ends_in(row) not in kept}
        several = {id_ for id_, row in rows.items() if self._rows.are_several(row)}
        reason = self._rows.describe_several()
        told = [refuse(stored[id_], "conflict", reason) for id_ in sorted(several)]
        self._settle(told, stored)
        plans = [
            PlannedRow(
                logto_id=state.logto_id,
                action="delete",
                primary_key=self._key_of(rows[state.logto_id]),
                state=state,
            )
            for state in over
            if state.logto_id in rows.keys() - several
        ]
        written = self._write_in_time(plans)
        self._save([state for state in written.values() if state.state != "ok"], stored)
        self.results += [(plan, written[plan.logto_id]) for plan in plans]
        stay = several.union(i for i, state in written.items() if state.state != "ok")
        return {state.logto_id for state in over} - stay

    def _stop_deletions(
        self, stops: Mapping[Key, Stop], stored: Mapping[str, RowState]
    ) -> tuple[dict[str, Stop], set[str]]:
        """Return which of the pairs' rows aren't deleted now, and those that the guard counted: it
        counts memberships alone. What a role permits ends at once, and comes back by itself."""
        stopped = {}
        with_row = {id_: state for id_, state in stored.items() if state.row_id is not None}
        keys = {id_: Key(self.kind, state.record_id or id_) for id_, state in with_row.items()}
        # A user's roles need no answer: when the user is restored, the mirror has them again.
        memberships = {key for key in keys.values() if key.kind == "membership"}
        unread = find_unread(self._connection, memberships) if memberships else {}
        for id_, key in keys.items():
            of_end = next((stops[end] for end in key.ends if end in stops), None)
            if stop := of_end or unread.get(key):
                stopped[id_] = stop
        alone = [id_ for id_ in with_row if id_ not in stopped] if self.is_of_members else []
        away = find_read_away(self._connection, alone, self._unguarded) if alone else set()
        if away:
            stopped |= self._guard.decide(sorted(away), stored, ())
        return stopped, away

    def write(self, ids: Collection[str]) -> None:
        """Write the rows of the records' pairs. Raises StoreUnavailable."""
        pairs = self._read(ids)
        # A record has a state beside those of its roles if reading the table takes too long.
        row_ids = {*ids, *(pair.id for pair in pairs)}
        stored = self._states.find(row_ids)
        plans = self._put_off(row_ids, stored)
        later = {plan.logto_id for plan in plans}
        now = [pair for pair in pairs if later.isdisjoint((pair.id, pair.record_id))]
        plans += self._plan(now, stored)
        written = self._write_in_time([plan for plan in plans if plan.action != "nothing"])
        states = {p.logto_id: p.state for p in plans if p.action == "nothing"} | written
        for plan in plans:
            state, before = states[plan.logto_id], plan.replaces or plan.primary_key
            if state.state != "ok" and before:  # the row is as it was
                ends = encode_id(self._rows.ends_of[before])
                states[plan.logto_id] = replace(state, row_id=encode_id(before), ends=ends)
            elif state.state == "ok" and plan.action == "insert":
                row_id, ends = self._inserted[plan.logto_id], self._inserted_ends[plan.logto_id]
                states[plan.logto_id] = replace(state, row_id=row_id, ends=ends)
        self._save(states.values(), stored)
        self.results += [(plan, states[plan.logto_id]) for plan in plans]
        self._tell_excluded(ids, pairs, states)
        new = find_new_rows(states, stored, {plan.logto_id: plan for plan in plans})
        self.came.update(states[id_].record_id or id_ for id_ in new)
        excluded = stored.keys() - states.keys()
        self._states.forget([id_ for id_ in excluded if stored[id_].row_id is None])

    def _note_inserted(self, plans: Sequence[PlannedRow]) -> None:
        ends = {plan.logto_id: self._rows.values_of(plan.values) for plan in plans}
        rows = self._rows.find(list(ends.values()))
        if any(values not in rows for values in ends.values()):
            raise RowRejected(problem=NOT_KEPT)
        if not self._rows.repeated.isdisjoint(ends.values()):
            raise RowRejected(problem=self._rows.describe_several())
        self._note_keys({id_: self._key_of(rows[values]) for id_, values in ends.items()})
        self._inserted_ends |= {
            id_: encode_id(self._rows.ends_in(rows[values])) for id_, values in ends.items()
        }

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
            pairs = read_pairs(self._connection, self._mapping.pair, new)
            where = self._mapping.where
            wanted = {} if where is None else self._call(where, {p.id: p.row for p in pairs})
            self._pairs |= {id_: [] for id_ in new}
            for pair in pairs:
                is_wanted = wanted.get(pair.id, True)
                if isinstance(is_wanted, Exception):
                    self._failed[pair.id] = is_wanted
                kept = self._pairs if is_wanted else self._unwanted
                kept.setdefault(pair.record_id, []).append(pair)
        return [pair for id_ in sorted(ids) for pair in self._pairs[id_]]

    def _find_stored(self, ids: Collection[str]) -> dict[str, RowState]:
        """Find the states of all pairs of records."""
        return self._states.find_of_records(ids, several=not self.is_of_members)

    def _new_state(self, pair: Pair) -> RowState:
        record_id = None if pair.id == pair.record_id else pair.record_id
        return RowState(logto_id=pair.id, record_id=record_id, role=getattr(pair.row, "name", None))

    def _plan(self, pairs: Sequence[Pair], stored: Mapping[str, RowState]) -> list[PlannedRow]:
        values = self._rows.find_values(pairs)
        filled = {id_: ends for id_, ends in values.items() if not isinstance(ends, NoValue)}
        own = self._rows.find_of(values)
        former = self._find_former(filled, own, stored)
        order = self._follow(own, former)
        ready = filled.keys() - self._failed
        rows = {pair.id: pair.row for pair in pairs if pair.id in ready}
        evaluated = self._call(self._mapping.evaluate, rows) | self._failed
        plans = []
        for pair in sorted(pairs, key=lambda pair: order.get(pair.id, 0)):
            ends = values[pair.id]
            state = stored.get(pair.id) or self._new_state(pair)
            if isinstance(ends, NoValue):
                if ends.state != "excluded":
                    plans.append(refuse(state, ends.state, ends.reason, ends.blocked_by))
                continue
            row, before = own.get(pair.id), former.get(pair.id)
            if before is not None and (problem := self._find_problem(before)):
                plans.append(refuse(state, "conflict", problem))
            elif row is not None and (problem := self._find_problem(row)):
                known = state if before is not None else self._note_row(state, row, {})
                plans.append(refuse(known, "conflict", problem))
            else:
                plans.append(self._plan_row(pair, ends, evaluated[pair.id], row, before, state))
        return plans

    def _follow(
        self, own: dict[str, sa.RowMapping], former: dict[str, sa.RowMapping]
    ) -> dict[str, int]:
        """Let each pair keep its row if it wants the ends of another pair, which gets others, too:
        take that row out of `own`, and return the pair's place, after the other one. Pairs in a
        ring take each other's rows."""
        leaving = {self._key_of(row): id_ for id_, row in former.items()}
        waits_for = {
            id_: other
            for id_, row in own.items()
            if (other := leaving.get(self._key_of(row), id_)) != id_
        }
        order: dict[str, int] = {}
        for id_ in waits_for:
            chain = [id_]
            while (following := waits_for.get(chain[-1], "")) and following not in chain:
                chain.append(following)
            if not following:  # else it is a ring
                order[id_] = len(chain) - 1
        for id_ in order:
            del own[id_]
        for id_ in waits_for.keys() - order.keys():
            former.pop(id_, None)
        return order

    def _find_problem(self, own: sa.RowMapping) -> str | None:
        """Say why a row can't be written."""
        if self._rows.are_several(own):
            return self._rows.describe_several()
        return describe_null(self._primary_key) if None in self._key_of(own) else None

    def _plan_row(
        self,
        pair: Pair,
        ends: Values,
        values: dict[str, Any] | Exception,
        own: sa.RowMapping | None,
        former: sa.RowMapping | None,
        state: RowState,
    ) -> PlannedRow:
        """Plan what to do with a pair's row. If it gets other ends, such as those of a renamed
        role, the `former` row changes, because others may refer to it; if somebody has inserted
        such a row, that is taken, and the former one deleted."""
        new = self._new_state(pair)
        if isinstance(values, Exception):
            return self._refuse_unevaluated(state, values)
        keys = dict(zip((column.key for column in self._rows.columns), ends, strict=True))
        row = own or former
        if row is None:
            return PlannedRow(
                logto_id=pair.id,
                action="insert",
                values={**self._mapping.create_defaults, **values, **keys},
                state=new,
            )
        moved = {name: value for name, value in keys.items() if own is None and row[name] != value}
        replaces = () if own is None or former is None else self._key_of(former)
        differing = moved | self._find_differing(values, row)
        return PlannedRow(
            logto_id=pair.id,
            action="update" if differing or replaces else "nothing",
            primary_key=self._key_of(row),
            values=differing,
            replaces=replaces,
            state=self._note_row(new, row, differing),
        )

    def _note_row(
        self, state: RowState, own: sa.RowMapping, changed: Mapping[str, Any]
    ) -> RowState:
        """Return a state with the primary key and the ends of a row after a change."""
        ends = encode_id(changed.get(column.key, own[column]) for column in self._rows.columns)
        return replace(state, row_id=self._id_after(own, changed), ends=ends)

    def _find_former(
        self,
        values: Mapping[str, Values],
        own: Mapping[str, sa.RowMapping],
        stored: Mapping[str, RowState],
    ) -> dict[str, sa.RowMapping]:
        """Find the rows of pairs that are to have other ends."""
        known = {i: s for i in values if (s := stored.get(i)) is not None and s.row_id is not None}
        moved = {
            id_: state
            for id_, state in known.items()
            if id_ not in own or state.ends != encode_id(values[id_])
        }
        # Each row is left by one pair, and by none if a pair has it and stays.
        taken = {self._key_of(own[id_]) for id_ in known.keys() - moved.keys()}
        former: dict[str, sa.RowMapping] = {}
        for id_, row in self._rows.find_written(moved.values()).items() if moved else ():
            key = self._key_of(row)
            if key not in taken and (id_ not in own or key != self._key_of(own[id_])):
                taken.add(key)
                former[id_] = row
        return former

    def _match_keys(
        self, keys: Sequence[tuple[Any, ...]]
    ) -> tuple[sa.ColumnElement[bool], list[dict[str, Any]]]:
        """Match rows with the ends that they had when they were read: the application may have
        given them to others since."""
        where, rows = super()._match_keys(keys)
        are_same = [
            column.is_not_distinct_from(sa.bindparam(f"logto_webhooks_end_{i}", type_=column.type))
            for i, column in enumerate(self._rows.columns)
        ]
        ends = [
            {f"logto_webhooks_end_{i}": value for i, value in enumerate(self._rows.ends_of[key])}
            for key in keys
        ]
        return sa.and_(where, *are_same), [a | b for a, b in zip(rows, ends, strict=True)]

    def find_keys(self, ids: Sequence[str], column: sa.Column[Any]) -> dict[str, Any]:
        """Return the primary keys of memberships' rows, which have one `column`."""
        own_rows = self._rows.find_of(self._rows.find_values(self._read(ids)))
        return {
            id_: row[column] for id_, row in own_rows.items() if not self._rows.are_several(row)
        }

    def find_logto_ids(self, keys: Sequence[Any], column: sa.Column[Any]) -> dict[Any, str]:
        """Return the ids of the memberships of rows whose primary key has one `column`."""
        ends: dict[Any, Values] = {}
        for are_some in make_conditions([column], [(key,) for key in keys]):
            query = sa.select(column, *self._rows.columns)
            query = query.where(are_some, *self._mapping.of_class)
            ends |= {row[0]: tuple(row[1:]) for row in self._run(query)}
        named = self._rows.name_ends(set(ends.values()))
        records = {own: self._rows.record_of(named[values]) for own, values in ends.items()}
        return {own: record for own, record in records.items() if record is not None}

    def find_former(self, ends: Collection[Former], column: sa.Column[Any]) -> set[Former]:
        """Return which values of the primary key still mean these memberships: no row has them, or
        the one that was written."""
        there = self._find_values_there(column, ends)
        written = self._rows.find_written(self._states.find({id_ for _, id_ in ends}).values())
        return {
            (value, id_)
            for value, id_ in ends
            if value not in there or (id_ in written and written[id_][column] == value)
        }

    def find_excluded(self, ids: Sequence[str]) -> set[str]:
        """Return those of the memberships whose user or organization gets no row."""
        values = self._rows.find_values(self._read(ids))
        return {
            id_
            for id_, ends in values.items()
            if isinstance(ends, NoValue) and ends.state == "excluded"
        }
