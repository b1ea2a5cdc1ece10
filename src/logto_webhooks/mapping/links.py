"""Find the application's existing rows that belong to records, to link them: once and for all."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.mapped_rows import StateStore, encode_id
from logto_webhooks.mapping.declare import EntityMapping, Link
from logto_webhooks.mapping.mirror import find_doubtful

_LINK: Final = "logto_link"
_TO_LOWER: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class NoLink(Struct, frozen=True):
    """Why no row is linked, and none is inserted either."""

    reason: str
    state: Literal["waiting", "conflict", "owed"] = "conflict"


_SHARED: Final = NoLink("another user could be linked to the same row")
_SEVERAL: Final = NoLink("several existing rows could be linked")
_IN_DOUBT: Final = NoLink("its record is in doubt, so no existing row is linked yet", "waiting")
_LOCKED: Final = NoLink("a row that could be linked is locked", "owed")
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
    ) -> None:
        """`columns` are those to read; `run` executes a query on the application's table."""
        self._connection = connection
        self._mapping = mapping
        self._link = link
        self._columns = columns
        self._run = run
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
        doubtful = find_doubtful(self._connection, self._mapping.kind, chosen) if chosen else []
        return links | self._lock(chosen | dict.fromkeys(doubtful, _IN_DOUBT))

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
        """Choose the rows that only one record can have, and no other ever had."""
        wanted_by: dict[str, set[str]] = {}
        for logto_id, rows in candidates.items():
            for row in rows:
                wanted_by.setdefault(self._id_of(row), set()).add(logto_id)
        owners = self._states.find_owners(wanted_by) if wanted_by else {}
        chosen: dict[str, sa.RowMapping | NoLink] = {}
        for logto_id, rows in candidates.items():
            if len(rows) > 1:
                chosen[logto_id] = _SEVERAL
            elif rows and len(wanted_by[self._id_of(rows[0])]) > 1:
                chosen[logto_id] = _SHARED
            elif rows and owners.get(self._id_of(rows[0]), {logto_id}) == {logto_id}:
                chosen[logto_id] = rows[0] if self._can_hold_key(rows[0]) else _NO_OBJECT
        return chosen

    def _lock(self, chosen: dict[str, sa.RowMapping | NoLink]) -> dict[str, sa.RowMapping | NoLink]:
        """Lock the chosen rows, so that nobody else gives them a key. One that is locked, or has
        one by now, isn't linked."""
        rows = {id_: row for id_, row in chosen.items() if not isinstance(row, NoLink)}
        if not rows:
            return chosen
        place = self._mapping.primary_key
        is_chosen = sa.or_(
            *(sa.and_(*(column == row[column] for column in place)) for row in rows.values())
        )
        query = sa.select(*place).where(self._is_free, is_chosen)
        query = query.with_for_update(skip_locked=True, key_share=True)
        locked = {encode_id(row) for row in self._run(query)}
        lost = {id_: _LOCKED for id_, row in rows.items() if self._id_of(row) not in locked}
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
    """Say that a function of the mapping raised. The message of the error may contain personal
    data."""
    return f"the mapping raised {type(error).__name__}"
