"""Find the application's existing rows that belong to records, to link them: once and for all."""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.mapped_rows import StateStore, encode_id
from logto_webhooks.mapping.apply_run import SeenRows
from logto_webhooks.mapping.declare import EntityMapping, Link, OwnValues, Read
from logto_webhooks.mapping.former_rows import find_texts, has_texts, may_be_another
from logto_webhooks.mapping.functions import NotEvaluated
from logto_webhooks.mapping.mirror import find_doubtful, read_rows
from logto_webhooks.mapping.missing_values import MissingValues
from logto_webhooks.mapping.primary_keys import describe_null, make_conditions
from logto_webhooks.mapping.sources import RAISED, implementation_of

_LINK: Final = "logto_webhooks_link"
_TO_LOWER: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class NoLink(Struct, frozen=True):
    """Why no row is linked, and none is inserted either."""

    reason: str
    state: Literal["waiting", "conflict", "owed"] = "conflict"
    blocked_by: str | None = None  # the row that it wants


COMPARING: Final = "an existing row can be linked when all records have been compared"
UNCOMPARED: Final = (
    "an existing row can be linked when rows that are owed have been compared: it may be theirs"
)
SHARED: Final = "another user could be linked to the same row"
SEVERAL: Final = "several existing rows could be linked"
OF_ANOTHER: Final = (
    "an existing row could be linked, but another user's row had its primary key before: write the "
    "ID into the right row"
)
AMBIGUOUS: Final = (SHARED, SEVERAL, OF_ANOTHER)
_IN_DOUBT: Final = "its record is in doubt, so no existing row is linked yet"
LOCKED: Final = (
    "a row that could be linked is locked or was just changed, or row-level security doesn't let it"
    " be changed"
)
_WANTING: Final = (
    COMPARING,
    UNCOMPARED,
    SHARED,
    _IN_DOUBT,
    LOCKED,
)  # reasons of records that want a row
_SEVERAL: Final = NoLink(SEVERAL)
_NO_OBJECT: Final = NoLink("the JSON document of the row to be linked isn't an object")


Links = dict[str, sa.RowMapping | NoLink | Exception]


class LinkFinder:
    """Finds the rows without a key that belong to records of one mapping."""

    def __init__(
        self,
        connection: sa.Connection,
        mapping: EntityMapping,
        link: Link,
        columns: Sequence[sa.Column[Any]],
        run: Callable[[Any], sa.CursorResult[Any]],
        call: Callable[[Callable[[Any], Any], Mapping[str, Any]], Mapping[str, Any]],
        seen: SeenRows | None = None,
        find_obstacle: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`columns` are those to read; `run` executes a query on the application's table; `call`
        calls a function with rows of the mirror, and returns its results or errors. `seen` are the
        rows of a rehearsal. `find_obstacle` tells why no row is linked yet: other records that want
        it may not have been compared."""
        self._connection = connection
        self._mapping = mapping
        self._link = link
        self._columns = columns
        self._run = run
        self._call = call
        self._seen = seen
        self._find_obstacle = find_obstacle
        self._states = StateStore(connection, mapping.name, mapping.kind)
        self._is_free = mapping.is_free
        # What is in the database: a type of the application may give back its own objects.
        self._column: Any = None
        if link.column is not None:
            self._column = sa.type_coerce(link.column, implementation_of(link.column.type))
        # What the row of each record must still fulfil when it is locked, by id.
        self._values: dict[str, Any] = {}
        self._conditions: dict[str, sa.ColumnElement[bool]] = {}

    def find(self, rows: dict[str, Any]) -> Links:
        """Find a row for each of the records, and lock it. A record without one isn't returned. One
        for which the application's function fails has its error."""
        links: Links = {}
        if self._link.condition is not None:
            candidates = self._find_by_condition(rows, links)
        else:
            candidates = self._find_by_value(rows, links)
        chosen = self._choose(candidates)
        obstacle = self._find_obstacle() if chosen else None
        if any(isinstance(link, NotEvaluated) for link in links.values()):
            obstacle = obstacle or UNCOMPARED
        doubtful = find_doubtful(self._connection, self._mapping.kind, chosen) if chosen else []
        for logto_id in doubtful:
            rows_of = candidates[logto_id]
            wants = self._id_of(rows_of[0]) if len(rows_of) == 1 else None
            chosen[logto_id] = NoLink(_IN_DOUBT, "waiting", wants)
        if obstacle is not None:
            if self._seen is not None:
                self._note_wanted(candidates, self._seen)
            return links | self._put_off(chosen, obstacle)
        return links | self._lock(chosen)

    def _find_by_condition(
        self, rows: dict[str, Any], links: Links
    ) -> dict[str, list[sa.RowMapping]]:
        assert self._link.condition is not None
        candidates = {}
        conditions = self._call(self._link.condition, rows)
        key = str(self._mapping.key.text)
        missing_values = MissingValues(self._link.condition, self._call, key)
        for logto_id, condition in conditions.items():
            is_linked = missing_values.ignore(logto_id, rows[logto_id], condition)
            if isinstance(is_linked, Exception):
                links[logto_id] = is_linked
                continue
            query = sa.select(*self._columns).where(self._is_free, is_linked).limit(2)
            if found := list(self._run(query).mappings()):
                candidates[logto_id] = found
                self._conditions[logto_id] = is_linked
        return candidates

    def _find_by_value(self, rows: dict[str, Any], links: Links) -> dict[str, list[sa.RowMapping]]:
        column, read = self._column, self._link.read
        assert read is not None
        wanted: dict[Any, list[str]] = {}
        compute = partial(self._read_comparable, read)
        if self._link.calls:
            values = self._call(compute, rows)
        else:  # which takes no time, however long the mapping's functions take for a record
            values = {logto_id: compute(row) for logto_id, row in rows.items()}
        for logto_id, value in values.items():
            if isinstance(value, Exception):
                links[logto_id] = value
            elif value is not None:
                self._values[logto_id] = value
                wanted.setdefault(value, []).append(logto_id)
        if not wanted:
            return {}
        is_equal: sa.ColumnElement[bool] = column.in_(list(wanted))
        if self._link.folds_case:
            is_equal |= sa.func.lower(sa.func.trim(column)).in_(list(wanted))
        query = sa.select(*self._columns, column.label(_LINK)).where(self._is_free, is_equal)
        candidates: dict[str, list[sa.RowMapping]] = {}
        for row in self._run(query).mappings():
            # The database may take other letters for equal than we do.
            for logto_id in wanted.get(self._to_comparable(row[_LINK]), ()):
                candidates.setdefault(logto_id, []).append(row)
        return candidates

    def _read_comparable(self, read: Read, row: Any) -> Any:
        value, column = read(row), self._link.column
        if column is not None and isinstance(column.type, sa.types.TypeDecorator):
            try:
                value = column.type.process_bind_param(value, self._connection.dialect)
            except Exception:  # the type takes no such value, so no row has it
                return None
        return self._to_comparable(value)

    def _to_comparable(self, value: Any) -> Any:
        """Return the value as it is compared; None if nothing can equal it.

        Only ASCII letters are folded: a mailbox of another letter that looks the same, or has the
        same lower case, can be somebody else's.
        """
        if value is None or value == "":
            return None
        if self._link.folds_case:
            return str(value).strip(" ").translate(_TO_LOWER)
        kind = self._column.type.python_type
        try:
            return value if isinstance(value, kind) else kind(value)
        except (ValueError, TypeError):
            return None

    def _choose(
        self, candidates: dict[str, list[sa.RowMapping]]
    ) -> dict[str, sa.RowMapping | NoLink]:
        """Choose the rows that only one record can have, and no other ever had. A record that could
        have several rows wants none of them, so whose rows these are doesn't depend on it."""
        wanted = {id_: self._id_of(rows[0]) for id_, rows in candidates.items() if len(rows) == 1}
        row_ids = set(wanted.values())
        owners = self._states.find_owners(row_ids) if row_ids else {}
        wanted_by = self._states.find_wanting(row_ids, _WANTING, RAISED) if row_ids else {}
        for logto_id, row_id in wanted.items():
            wanted_by.setdefault(row_id, set()).add(logto_id)
        not_unlinked = self._find_not_unlinked(owners, wanted)
        chosen: dict[str, sa.RowMapping | NoLink] = {}
        for logto_id, rows in candidates.items():
            if len(rows) > 1:
                chosen[logto_id] = _SEVERAL
                continue
            if None in _values_of(rows[0], self._mapping.primary_key):
                chosen[logto_id] = NoLink(describe_null(self._mapping.primary_key))
                continue
            row_id = wanted[logto_id]
            is_shared = self._seen is not None and self._seen.is_shared(row_id)
            if len(wanted_by[row_id]) > 1 or is_shared:
                chosen[logto_id] = NoLink(SHARED, blocked_by=row_id)
            elif owners.get(row_id, {logto_id}) == {logto_id}:
                chosen[logto_id] = rows[0] if self._can_hold_key(rows[0]) else _NO_OBJECT
            elif self._is_of_another(rows[0], owners[row_id] - {logto_id}, not_unlinked):
                chosen[logto_id] = NoLink(OF_ANOTHER, blocked_by=row_id)
        return chosen

    def _find_not_unlinked(
        self, owners: Mapping[str, set[str]], wanted: Mapping[str, str]
    ) -> set[str]:
        """Return which former owners of the wanted rows were never unlinked. The application has
        emptied the key of such a row itself, or given its primary key to another row, as when it
        imports the table anew: only it knows whose the row is. One that was unlinked stays as it
        is."""
        others = {
            owner
            for logto_id, row_id in wanted.items()
            for owner in owners.get(row_id, set())
            if owner != logto_id
        }
        return others - self._states.find_deleted(others) if others else set()

    def _is_of_another(
        self, row: sa.RowMapping, owners: set[str], not_unlinked: Collection[str]
    ) -> bool:
        """Whether a row isn't the one that its former owners had: not all were unlinked, or its
        texts are others."""
        if not owners.isdisjoint(not_unlinked):
            return True
        if not may_be_another(self._mapping, self._connection.dialect):
            return False
        records = read_rows(self._connection, self._mapping.kind, owners)
        evaluated = self._call(self._mapping.evaluate, records).values()
        texts = [find_texts(self._mapping, of) for of in evaluated if isinstance(of, OwnValues)]
        return not any(has_texts(row, of) for of in texts)

    def _note_wanted(self, candidates: dict[str, list[sa.RowMapping]], seen: SeenRows) -> None:
        wanted: dict[str, list[str]] = {}
        for logto_id, rows in candidates.items():
            if len(rows) == 1:
                wanted.setdefault(self._id_of(rows[0]), []).append(logto_id)
        for row_id, logto_ids in wanted.items():
            seen.note(row_id, logto_ids)

    def _put_off(
        self, chosen: dict[str, sa.RowMapping | NoLink], obstacle: str
    ) -> dict[str, sa.RowMapping | NoLink]:
        """Link no row yet, and tell later records which rows these want."""
        put_off: dict[str, sa.RowMapping | NoLink] = {}
        for logto_id, row in chosen.items():
            is_shared = isinstance(row, NoLink) and row.reason == SHARED
            if is_shared and self._seen is not None and isinstance(row, NoLink):
                put_off[logto_id] = NoLink(obstacle, "waiting", row.blocked_by)
            elif isinstance(row, NoLink):
                put_off[logto_id] = row
            else:
                put_off[logto_id] = NoLink(obstacle, "waiting", self._id_of(row))
        return put_off

    def _lock(self, chosen: dict[str, sa.RowMapping | NoLink]) -> dict[str, sa.RowMapping | NoLink]:
        """Lock the chosen rows, so that nobody else gives them a key, and return them as they are
        now: the application may have changed them since they were found. One that is locked, has a
        key by now, or isn't the record's any more, isn't linked."""
        rows = {id_: row for id_, row in chosen.items() if not isinstance(row, NoLink)}
        if not rows:
            return chosen
        if self._link.condition is not None:
            locked = self._lock_by_condition(rows)
        else:
            locked = self._lock_by_value(rows)
        links = dict(chosen)
        for logto_id, found in rows.items():
            row = locked.get(logto_id)
            if row is None:
                links[logto_id] = NoLink(LOCKED, "owed", self._id_of(found))
            else:
                links[logto_id] = row if self._can_hold_key(row) else _NO_OBJECT
        return links

    def _lock_by_condition(self, rows: Mapping[str, sa.RowMapping]) -> dict[str, sa.RowMapping]:
        place = self._mapping.primary_key
        locked = {}
        for logto_id, found in rows.items():
            [is_row] = make_conditions(place, [_values_of(found, place)])
            query = sa.select(*self._columns).where(
                self._is_free, is_row, self._conditions[logto_id]
            )
            # The condition may join tables that nobody is to wait for.
            query = query.with_for_update(skip_locked=True, key_share=True, of=self._mapping.table)
            row = self._run(query).mappings().first()
            if row is not None:
                locked[logto_id] = row
        return locked

    def _lock_by_value(self, rows: Mapping[str, sa.RowMapping]) -> dict[str, sa.RowMapping]:
        column, place = self._column, self._mapping.primary_key
        query = sa.select(*self._columns, column.label(_LINK)).where(self._is_free)
        query = query.with_for_update(skip_locked=True, key_share=True)
        records = {self._id_of(row): logto_id for logto_id, row in rows.items()}
        keys = [_values_of(row, place) for row in rows.values()]
        locked = {
            records[self._id_of(row)]: row
            for are_some in make_conditions(place, keys)
            for row in self._run(query.where(are_some)).mappings()
        }
        return {
            logto_id: row
            for logto_id, row in locked.items()
            if self._to_comparable(row[_LINK]) == self._values[logto_id]
        }

    def _can_hold_key(self, row: sa.RowMapping) -> bool:
        """Whether a JSON document has room for the key: objects along its path, or nothing."""
        key = self._mapping.key
        inner = row[key.column] if key.path else None
        for name in key.path:
            if inner is None:
                return True
            if not isinstance(inner, dict):
                return False
            inner = inner.get(name)
        return inner is None

    def _id_of(self, row: sa.RowMapping) -> str:
        return encode_id(_values_of(row, self._mapping.primary_key))


def _values_of(row: sa.RowMapping, columns: Iterable[sa.Column[Any]]) -> list[Any]:
    return [row[column] for column in columns]
