"""Find the application's existing rows that belong to records, to link them: once and for all."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.mapped_rows import StateStore, encode_id
from logto_webhooks.mapping.apply_run import SeenRows
from logto_webhooks.mapping.declare import EntityMapping, Link
from logto_webhooks.mapping.mirror import find_doubtful
from logto_webhooks.mapping.primary_keys import make_conditions
from logto_webhooks.mapping.sources import FunctionRaised

_LINK: Final = "logto_link"
_TO_LOWER: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class NoLink(Struct, frozen=True):
    """Why no row is linked, and none is inserted either."""

    reason: str
    state: Literal["waiting", "conflict", "owed"] = "conflict"
    blocked_by: str | None = None  # the row that it wants


COMPARING: Final = "an existing row can be linked when all records have been compared"
SHARED: Final = "another user could be linked to the same row"
SEVERAL: Final = "several existing rows could be linked"
AMBIGUOUS: Final = (SHARED, SEVERAL)
_IN_DOUBT: Final = "its record is in doubt, so no existing row is linked yet"
_LOCKED: Final = (
    "a row that could be linked is locked, or row-level security doesn't let it be changed"
)
_WANTING: Final = (COMPARING, SHARED, _IN_DOUBT, _LOCKED)  # reasons of records that want a row
_SEVERAL: Final = NoLink(SEVERAL)
_NO_OBJECT: Final = NoLink("the JSON document of the row to be linked isn't an object")


class LinkFinder:
    """Finds the rows without a key that belong to records of one mapping."""

    def __init__(
        self,
        connection: sa.Connection,
        mapping: EntityMapping,
        link: Link,
        columns: Sequence[sa.Column[Any]],
        run: Callable[[Any], sa.CursorResult[Any]],
        seen: SeenRows | None = None,
        compares: Callable[[], bool] = lambda: False,
    ) -> None:
        """`columns` are those to read; `run` executes a query on the application's table. `seen`
        are the rows of a rehearsal. If it `compares`, no row is linked, because other records
        that want it may not have been compared yet."""
        self._connection = connection
        self._mapping = mapping
        self._link = link
        self._columns = columns
        self._run = run
        self._seen = seen
        self._compares = compares
        self._states = StateStore(connection, mapping.name, mapping.kind)
        self._is_free = mapping.key.text.is_(None)

    def find(self, rows: dict[str, Any]) -> dict[str, sa.RowMapping | NoLink]:
        """Find a row for each of the records, and lock it. A record without one isn't returned."""
        links: dict[str, sa.RowMapping | NoLink] = {}
        if self._link.condition is not None:
            candidates = self._find_by_condition(rows, links)
        else:
            candidates = self._find_by_value(rows, links)
        chosen = self._choose(candidates)
        is_comparing = bool(chosen) and self._compares()
        doubtful = find_doubtful(self._connection, self._mapping.kind, chosen) if chosen else []
        for logto_id in doubtful:
            rows_of = candidates[logto_id]
            wants = self._id_of(rows_of[0]) if len(rows_of) == 1 else None
            chosen[logto_id] = NoLink(_IN_DOUBT, "waiting", wants)
        if is_comparing:
            if self._seen is not None:
                self._note_wanted(candidates, self._seen)
            return links | self._put_off(chosen)
        return links | self._lock(chosen)

    def _find_by_condition(
        self, rows: dict[str, Any], links: dict[str, sa.RowMapping | NoLink]
    ) -> dict[str, list[sa.RowMapping]]:
        assert self._link.condition is not None
        candidates = {}
        for logto_id, row in rows.items():
            try:
                is_linked = self._link.condition(row)
            except Exception as error:
                links[logto_id] = NoLink(describe_raised(error))
                continue
            query = sa.select(*self._columns).where(self._is_free, is_linked).limit(2)
            candidates[logto_id] = list(self._run(query).mappings())
        return candidates

    def _find_by_value(
        self, rows: dict[str, Any], links: dict[str, sa.RowMapping | NoLink]
    ) -> dict[str, list[sa.RowMapping]]:
        column, read = self._link.column, self._link.read
        assert column is not None
        assert read is not None
        wanted: dict[Any, list[str]] = {}
        for logto_id, row in rows.items():
            try:
                value = self._to_comparable(read(row))
            except Exception as error:
                links[logto_id] = NoLink(describe_raised(error))
                continue
            if value is not None:
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

    def _to_comparable(self, value: Any) -> Any:
        """Return the value as it is compared; None if nothing can equal it.

        Only ASCII letters are folded: a mailbox of another letter that looks the same, or has the
        same lower case, can be somebody else's.
        """
        column = self._link.column
        assert column is not None
        if value is None or value == "":
            return None
        if self._link.folds_case:
            return str(value).strip(" ").translate(_TO_LOWER)
        kind = column.type.python_type
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
        wanted_by = self._states.find_wanting(row_ids, _WANTING) if row_ids else {}
        for logto_id, row_id in wanted.items():
            wanted_by.setdefault(row_id, set()).add(logto_id)
        chosen: dict[str, sa.RowMapping | NoLink] = {}
        for logto_id, rows in candidates.items():
            if len(rows) > 1:
                chosen[logto_id] = _SEVERAL
                continue
            row_id = wanted[logto_id]
            is_shared = self._seen is not None and self._seen.is_shared(row_id)
            if len(wanted_by[row_id]) > 1 or is_shared:
                chosen[logto_id] = NoLink(SHARED, blocked_by=row_id)
            elif owners.get(row_id, {logto_id}) == {logto_id}:
                chosen[logto_id] = rows[0] if self._can_hold_key(rows[0]) else _NO_OBJECT
        return chosen

    def _note_wanted(self, candidates: dict[str, list[sa.RowMapping]], seen: SeenRows) -> None:
        wanted: dict[str, list[str]] = {}
        for logto_id, rows in candidates.items():
            if len(rows) == 1:
                wanted.setdefault(self._id_of(rows[0]), []).append(logto_id)
        for row_id, logto_ids in wanted.items():
            seen.note(row_id, logto_ids)

    def _put_off(
        self, chosen: dict[str, sa.RowMapping | NoLink]
    ) -> dict[str, sa.RowMapping | NoLink]:
        """Link no row yet, and tell later records which rows these want."""
        put_off: dict[str, sa.RowMapping | NoLink] = {}
        for logto_id, row in chosen.items():
            is_shared = isinstance(row, NoLink) and row.reason == SHARED
            if is_shared and self._seen is not None and isinstance(row, NoLink):
                put_off[logto_id] = NoLink(COMPARING, "waiting", row.blocked_by)
            elif isinstance(row, NoLink):
                put_off[logto_id] = row
            else:
                put_off[logto_id] = NoLink(COMPARING, "waiting", self._id_of(row))
        return put_off

    def _lock(self, chosen: dict[str, sa.RowMapping | NoLink]) -> dict[str, sa.RowMapping | NoLink]:
        """Lock the chosen rows, so that nobody else gives them a key. One that is locked, or has
        one by now, isn't linked."""
        rows = {id_: row for id_, row in chosen.items() if not isinstance(row, NoLink)}
        if not rows:
            return chosen
        place = self._mapping.primary_key
        query = sa.select(*place).where(self._is_free)
        query = query.with_for_update(skip_locked=True, key_share=True)
        keys = [_values_of(row, place) for row in rows.values()]
        locked = {
            encode_id(row)
            for are_some in make_conditions(place, keys)
            for row in self._run(query.where(are_some))
        }
        lost = {
            id_: NoLink(_LOCKED, "owed", row_id)
            for id_, row in rows.items()
            if (row_id := self._id_of(row)) not in locked
        }
        return chosen | lost

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


def describe_raised(error: Exception) -> str:
    """Say which function of the mapping raised. The message of its error may contain personal
    data."""
    if isinstance(error, FunctionRaised):
        return str(error)
    return f"the mapping raised {type(error).__name__}"
