"""Find the application's rows of memberships and roles by what the columns of their ends hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from logto_webhooks.database.mapped_rows import RowState, decode_ids, encode_id
from logto_webhooks.mapping.apply_run import ApplyRun
from logto_webhooks.mapping.declare_pairs import End, PairMapping, RoleEnd
from logto_webhooks.mapping.ends import EndValues, Former, NoValue
from logto_webhooks.mapping.mirror import Pair
from logto_webhooks.mapping.primary_keys import (
    AT_ONCE,
    describe_several,
    make_conditions,
    may_be_reused,
)
from logto_webhooks.records.record import Key

Values = tuple[Any, ...]  # of the columns of a row's ends


class PairRows:
    """Finds the rows of one mapping of memberships or of roles, and remembers what it has read."""

    def __init__(
        self,
        mapping: PairMapping,
        ends: Sequence[tuple[End, EndValues]],
        run: Callable[[Any], sa.CursorResult[Any]],
        dialect: sa.Dialect,
        earlier: ApplyRun | None,
    ) -> None:
        """`ends` are the mapping's, with what finds their values; `run` executes a query on the
        application's tables; `earlier` is the rehearsal that this is a part of."""
        self._mapping = mapping
        self._ends = ends
        self._run = run
        self._dialect = dialect
        self._earlier = earlier
        self._primary_key = mapping.primary_key
        self.columns = tuple(end.column for end in mapping.ends)
        self.ends_of: dict[Values, Values] = {}  # of rows that were read, by primary key
        self.repeated: set[Values] = set()  # the ends that several rows have

    def find_values(self, pairs: Sequence[Pair]) -> dict[str, Values | NoValue]:
        """Return what the columns of each pair's ends hold, or why one of them has no value."""
        return self._resolve(
            {pair.id: [end.id_in(pair.row) for end, _ in self._ends] for pair in pairs}
        )

    def _resolve(self, ids: Mapping[str, Sequence[str]]) -> dict[str, Values | NoValue]:
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

    def name_ends(self, ends: Collection[Values]) -> dict[Values, tuple[str | None, ...]]:
        """Return the ids for what the columns of ends hold; None for an end that isn't Logto's."""
        by_end: list[dict[Any, str]] = []
        for place, (_, values) in enumerate(self._ends):
            own = {row[place] for row in ends if row[place] is not None}
            by_end.append(values.find_ids(own) if own else {})
        return {
            row: tuple(ids.get(value) for ids, value in zip(by_end, row, strict=True))
            for row in ends
        }

    def record_of(self, ids: Sequence[str | None]) -> str | None:
        """Return the record of a row by the ids of its ends; None if one isn't Logto's."""
        owners = ids if self._mapping.pair == "member" else ids[:-1]
        return None if None in owners else ":".join(map(str, owners))

    def find_of(self, values: Mapping[str, Values | NoValue]) -> dict[str, sa.RowMapping]:
        """Find the own row of each pair by what its ends hold, if all of them have a value."""
        filled = {i: ends for i, ends in values.items() if not isinstance(ends, NoValue)}
        own_rows = self.find(list(filled.values()))
        return {i: own_rows[ends] for i, ends in filled.items() if ends in own_rows}

    def find(self, ends: Sequence[Values]) -> dict[Values, sa.RowMapping]:
        """Find the own rows that have these values in the columns of their ends."""
        if not ends:
            return {}
        own_rows: dict[Values, sa.RowMapping] = {}
        for start in range(0, len(ends), AT_ONCE):
            some = ends[start : start + AT_ONCE]
            have_some = [
                column.in_({values[i] for values in some}) for i, column in enumerate(self.columns)
            ]
            for row in self._read(*have_some):
                values = self.ends_in(row)
                known = own_rows.setdefault(values, row)
                if self._key_of(known) != self._key_of(row):
                    self.repeated.add(values)
        return own_rows

    def _read(self, *where: sa.ColumnElement[bool]) -> Sequence[sa.RowMapping]:
        """Read own rows of the mapped class, and remember their ends."""
        names = {column.key for column in (*self.columns, *self._primary_key)}
        read = [c for c in self._mapping.table.c if c.key in names | self._mapping.columns.keys()]
        query = sa.select(*read).where(*where, *self._mapping.of_class)
        rows = self._run(query).mappings().all()
        self.ends_of |= {self._key_of(row): self.ends_in(row) for row in rows}
        return rows

    def find_by_states(self, states: Collection[RowState]) -> dict[str, sa.RowMapping]:
        """Find the rows of pairs by what their ends hold now, whoever has written them."""
        ids = {state.logto_id: self._ids_of(state) for state in states}
        known = {i: [end for end in ends if end is not None] for i, ends in ids.items()}
        complete = {i: ends for i, ends in known.items() if len(ends) == len(self._ends)}
        return self.find_of(self._resolve(complete))

    def find_written(
        self, states: Collection[RowState], *, over: bool = False
    ) -> dict[str, sa.RowMapping]:
        """Find the rows of pairs that have the ends with which they were written, and that are of
        nobody else now. The application may have given a row to others; and a database can use
        a primary key again, so that tells nothing. `over`: whether the pairs are over."""
        ends_of = {s.logto_id: s.ends for s in states if s.ends is not None}
        decoded = decode_ids(ends_of.values(), self.columns, self._dialect)
        own_rows = self.find(list(decoded.values()))
        # As they were read: a type of the application's own may give back other objects.
        by_ends = {encode_id(ends): (ends, row) for ends, row in own_rows.items()}
        there = {id_: by_ends[text] for id_, text in ends_of.items() if text in by_ends}
        ends_before = {id_: ends for id_, (ends, _) in there.items()}
        of_others = self._find_given_away(ends_before, states) if there else ()
        written = {id_: row for id_, (_, row) in there.items() if id_ not in of_others}
        others = [state for state in states if state.logto_id not in there]
        if may_be_reused(self._primary_key, self._dialect):
            # Another row that isn't anybody's, such as an invitation, may have the primary key. But
            # if its deletion was refused, the row was there, and we may have deleted its user's.
            others = [state for state in others if over and not state.is_settled]
        return written | self._find_emptied(others)

    def _find_emptied(self, states: Collection[RowState]) -> dict[str, sa.RowMapping]:
        """Find the rows of pairs by their primary keys, in which ON DELETE SET NULL has emptied an
        end, because its row is gone, and the others are as they were."""
        known = {s.row_id: s for s in states if s.row_id is not None and s.ends is not None}
        keys = decode_ids(known, self._primary_key, self._dialect).values()
        emptied = [
            (state, row)
            for are_some in make_conditions(self._primary_key, keys)
            for row in self._read(are_some)
            if (state := known.get(encode_id(self._key_of(row)))) is not None
            and None in self.ends_in(row)
        ]
        before = decode_ids([str(state.ends) for state, _ in emptied], self.columns, self._dialect)
        named = self.name_ends(set(before.values()))
        return {
            state.logto_id: row
            for state, row in emptied
            if (ends := before.get(str(state.ends))) is not None
            and all(
                own == was or (own is None and name is None and _can_be_emptied(column))
                for own, was, name, column in zip(
                    self.ends_in(row), ends, named[ends], self.columns, strict=True
                )
            )
        }

    def _find_given_away(
        self, ends_before: Mapping[str, Values], states: Collection[RowState]
    ) -> set[str]:
        """Return those of the pairs whose ends' rows, other than of roles, are of others now."""
        named = self.name_ends(set(ends_before.values()))
        wanted = {state.logto_id: self._ids_of(state) for state in states}
        given_away: set[str] = set()
        for place, (end, values) in enumerate(self._ends):
            if isinstance(end, RoleEnd):
                continue
            unnamed: dict[str, Former] = {}
            for id_, ends in ends_before.items():
                name, id_of_end = named[ends][place], str(wanted[id_][place])
                if name is None:
                    unnamed[id_] = (ends[place], id_of_end)
                elif name != id_of_end:
                    given_away.add(id_)
            former = values.find_former(set(unnamed.values())) if unnamed else set()
            given_away.update(id_ for id_, end in unnamed.items() if end not in former)
        return given_away

    def _ids_of(self, state: RowState) -> list[str | None]:
        """Return the ids of the ends of a pair, or the name of a role that is found by it."""
        record_id = state.record_id or state.logto_id
        key = Key(self._mapping.kind, record_id)
        ids: dict[str, str] = {end.kind: end.id for end in key.ends}
        ids |= {"member": record_id, "role": state.logto_id.removeprefix(f"{record_id}:")}
        return [
            state.role if isinstance(end, RoleEnd) and end.by == "name" else ids[end.kind]
            for end, _ in self._ends
        ]

    def values_of(self, values: Mapping[str, Any]) -> Values:
        """Return what the ends' columns have in new values."""
        return tuple(values[column.key] for column in self.columns)

    def ends_in(self, row: sa.RowMapping) -> Values:
        """Return what the ends' columns have in a row."""
        return tuple(row[column] for column in self.columns)

    def _key_of(self, row: sa.RowMapping) -> Values:
        return tuple(row[column] for column in self._primary_key)

    def are_several(self, row: sa.RowMapping) -> bool:
        """Whether several of the rows that were read have the ends of this one."""
        return self.ends_in(row) in self.repeated

    def describe_several(self) -> str:
        """Say what is wrong with a row if several have its ends."""
        names = " and ".join(column.name for column in self.columns)
        return describe_several(names)


def _can_be_emptied(column: sa.Column[Any]) -> bool:
    """Whether a foreign key sets the column to NULL."""
    return any((key.ondelete or "").upper() == "SET NULL" for key in column.foreign_keys)
