"""Write the application's rows of memberships that follow from the mirror."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.database.mapped_rows import (
    RowState,
    decode_id,
    encode_id,
)
from logto_webhooks.mapping.declare import End, EntityMapping, MemberMapping, MemberRow
from logto_webhooks.mapping.deletions import DeletionGuard, Deletions, Stop, find_read_away
from logto_webhooks.mapping.entity_writer import EntityWriter
from logto_webhooks.mapping.links import describe_raised
from logto_webhooks.mapping.mirror import read_rows
from logto_webhooks.mapping.table_writer import (
    NOT_KEPT,
    PlannedRow,
    TableWriter,
    block,
    refuse,
)
from logto_webhooks.records.record import Key, membership


class MemberWriter(TableWriter):
    """Writes the rows of one mapping of memberships."""

    def __init__(
        self,
        connection: sa.Connection,
        mapping: MemberMapping,
        entities: Collection[EntityMapping],
        schemas: Any,
        deletions: Deletions | None = None,
    ) -> None:
        super().__init__(connection, mapping, schemas)
        self._guard = DeletionGuard(connection, mapping.name, self._states, deletions)
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

    def delete(self, stops: Mapping[Key, Stop], ids: Collection[str]) -> None:
        """Delete the rows of memberships that are over, unless something stops the deletion of
        their user or organization. Raises StoreUnavailable."""
        stored = self._states.find(ids)
        stopped, counted = self._stop_deletions(stops, stored)
        refused = [
            refuse(stored[id_], stop.state, stop.reason, stop.blocked_by)
            for id_, stop in stopped.items()
        ]
        self._states.save([plan.state for plan in refused], stored)
        self.results += [(plan, plan.state) for plan in refused]
        states = {id_: state for id_, state in stored.items() if id_ not in stopped}
        keys = {
            id_: decode_id(state.row_id, self._primary_key)
            for id_, state in states.items()
            if state.row_id is not None
        }
        # The application may have deleted the row, and a database can use its primary key again.
        named = self._name_rows(list(keys.values()))
        plans = [
            PlannedRow(
                logto_id=id_,
                action="delete",
                primary_key=key,
                state=RowState(logto_id=id_, row_id=states[id_].row_id),
            )
            for id_, key in keys.items()
            if named.get(key, id_) in (id_, None)
        ]
        written = self._write_in_time(plans)
        self._states.save([state for state in written.values() if state.state != "ok"], states)
        self.results += [(plan, written[plan.logto_id]) for plan in plans]
        gone = [id_ for id_ in states if id_ not in written or written[id_].state == "ok"]
        # These are remembered, because too many of them at once are held.
        noted = [id_ for id_ in gone if id_ in counted]
        self._states.save([RowState(logto_id=id_) for id_ in noted], states)
        self._guard.note(noted)
        self._states.forget([id_ for id_ in gone if id_ not in counted])

    def _stop_deletions(
        self, stops: Mapping[Key, Stop], stored: Mapping[str, RowState]
    ) -> tuple[dict[str, Stop], set[str]]:
        """Return which of the memberships' rows aren't deleted now, and those that the guard
        counted."""
        stopped = {}
        with_row = [id_ for id_, state in stored.items() if state.row_id is not None]
        for id_ in with_row:
            ends = Key("membership", id_).organization_and_user
            if found := next((stops[end] for end in ends if end in stops), None):
                stopped[id_] = found
        alone = [id_ for id_ in with_row if id_ not in stopped]
        away = find_read_away(self._connection, alone) if alone else set()
        if away:
            stopped |= self._guard.decide(sorted(away), stored, ())
        return stopped, away

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
                states[plan.logto_id] = block(state, "conflict", NOT_KEPT)
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
                waits = block(state, "waiting", problem, blocker(end))
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
            return refuse(RowState(logto_id=pair.id), "conflict", describe_raised(error))
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
            values = EntityWriter(self._connection, mapping, self._schemas).find_keys(ids)
            by_end.append(values)
            missing = [id_ for id_ in ids if id_ not in values]
            for id_, row in read_rows(self._connection, end.kind, missing).items():
                if not (mapping.create and _is_wanted(mapping, row)):
                    excluded.add(Key(end.kind, id_))
        resolved: dict[Key, tuple[Any, ...] | Key] = {}
        for pair in members:
            keys = [self._end_of(pair, end) for end, _ in self._ends]
            if not excluded.isdisjoint(keys):
                continue
            ends = list(zip(keys, by_end, strict=True))
            absent = [key for key, values in ends if key.id not in values]
            filled = tuple(values.get(key.id) for key, values in ends)
            resolved[pair] = absent[0] if absent else filled
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
