"""What the columns hold that say whose row it is: own rows' primary keys, or Logto's ids."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Protocol

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.mapping.declare_pairs import End, RoleEnd
from logto_webhooks.records.record import Key

Former = tuple[Any, str]  # what an end's column held, and the end's id


class NoValue(Struct, frozen=True):
    """Why an end's column has no value. If the end is excluded, it needs no row."""

    state: Literal["waiting", "conflict", "excluded"]
    reason: str = ""
    blocked_by: str | None = None


class EndValues(Protocol):
    """Finds the values of an end's column by the end's ids, and the other way round."""

    def find_values(self, ids: Collection[str]) -> dict[str, Any]:
        """Return the values, or why there is none (`NoValue`), by id."""

    def find_ids(self, values: Collection[Any]) -> dict[Any, str]:
        """Return the ids by value. Values that stand for nothing of Logto's are left out."""

    def find_former(self, ends: Collection[Former]) -> set[Former]:
        """Of values that stand for nothing of Logto's now, return those that still mean the end
        with this id: its row is gone, or was unlinked."""


class ParentRows(Protocol):
    """Finds own rows of users, organizations or members, by a column to which others refer."""

    def find_keys(self, ids: Sequence[str], column: sa.Column[Any]) -> dict[str, Any]:
        """Return what the column has in records' rows."""

    def find_logto_ids(self, keys: Sequence[Any], column: sa.Column[Any]) -> dict[Any, str]:
        """Return the ids of the records of rows by what the column has in them."""

    def find_former(self, ends: Collection[Former], column: sa.Column[Any]) -> set[Former]:
        """Return which values of the column still mean these records: no row has them, or one that
        was unlinked."""

    def find_excluded(self, ids: Sequence[str]) -> set[str]:
        """Return those of the records without a row that get none."""


class OwnParents:
    """The column holds what a column has in own rows, which another mapping writes: mostly their
    primary keys."""

    def __init__(self, end: End, parents: ParentRows, referred: sa.Column[Any]) -> None:
        self._kind = end.kind
        self._parents = parents
        self._referred = referred

    def find_values(self, ids: Collection[str]) -> dict[str, Any]:
        """Return the values. A record without a row waits, unless it gets none."""
        values = self._parents.find_keys(sorted(ids), self._referred)
        if missing := sorted(set(ids) - values.keys()):
            excluded = self._parents.find_excluded(missing)
            for id_ in missing:
                values[id_] = NoValue("excluded") if id_ in excluded else self._wait(id_)
        return values

    def _wait(self, id_: str) -> NoValue:
        return NoValue("waiting", f"the {self._kind} has no row yet", blocker(self._kind, id_))

    def find_ids(self, values: Collection[Any]) -> dict[Any, str]:
        """Return the ids of the records of rows."""
        return self._parents.find_logto_ids(sorted(values, key=str), self._referred)

    def find_former(self, ends: Collection[Former]) -> set[Former]:
        """Return those of the values whose rows are gone, or were unlinked."""
        return self._parents.find_former(ends, self._referred)


class LogtoIds:
    """The column holds Logto's ids, or the names of roles."""

    def __init__(self, column: sa.Column[Any]) -> None:
        self._column = column
        self._members = _list_members(column.type)

    def find_values(self, ids: Collection[str]) -> dict[str, Any]:
        """Return the ids themselves, or the members of the column's enumeration."""
        if self._members is None:
            return {id_: id_ for id_ in ids}
        problem = f"{self._column.name} is an enumeration without"
        none = {id_: NoValue("conflict", f"{problem} {id_!r}") for id_ in ids}
        return {id_: self._members.get(id_, none[id_]) for id_ in ids}

    def find_ids(self, values: Collection[Any]) -> dict[Any, str]:
        """Return the values as text."""
        if self._members is None:
            return {value: str(value) for value in values}
        return {member: id_ for id_, member in self._members.items() if member in values}

    def find_former(self, ends: Collection[Former]) -> set[Former]:
        """Return none of them: the column has the ids."""
        return set()


class OwnRoles:
    """The column refers to the application's own rows of roles."""

    def __init__(self, end: RoleEnd, run: Callable[[Any], sa.CursorResult[Any]]) -> None:
        assert end.match is not None
        self._match, [self._referred] = end.match, end.referred
        self._by = end.by
        self._run = run
        self._members = _list_members(end.match.type)

    def find_values(self, ids: Collection[str]) -> dict[str, Any]:
        """Return what the column refers to in the row of each role, by the role's id or name."""
        wanted = {self._to_own(id_): id_ for id_ in sorted(ids)}
        rows: dict[str, list[Any]] = {}
        for own, referred in self._select(self._match, [own for own in wanted if own is not None]):
            if own in wanted:  # the database may take other letters for equal than we do
                rows.setdefault(wanted[own], []).append(referred)
        return {id_: self._choose(id_, rows.get(id_, [])) for id_ in ids}

    def _select(self, column: sa.Column[Any], values: Collection[Any]) -> list[tuple[Any, ...]]:
        """Select the rows with these values: what they are matched by, and what refers to them."""
        if not values:
            return []
        query = sa.select(self._match, self._referred).where(column.in_(list(values)))
        return list(map(tuple, self._run(query)))

    def _choose(self, id_: str, referred: list[Any]) -> Any:
        if len(referred) == 1:
            return referred[0]
        count = "several rows have" if referred else "no row has"
        table = self._match.table.description
        return NoValue("conflict", f"{count} the role's {self._by} {id_!r} in {table}")

    def _to_own(self, id_: str) -> Any:
        return id_ if self._members is None else self._members.get(id_)

    def find_ids(self, values: Collection[Any]) -> dict[Any, str]:
        """Return the ids or names of the roles of own rows."""
        rows = self._select(self._referred, values)
        return {referred: _to_text(own) for own, referred in rows if own is not None}

    def find_former(self, ends: Collection[Former]) -> set[Former]:
        """Return none of them: the application's roles are its own."""
        return set()


def blocker(kind: str, id_: str) -> str:
    """How a state names the record that it waits for."""
    return f"{kind}:{id_}"


def name_parent(key: Key) -> str:
    """How a state names a user, an organization or a member that it waits for."""
    return blocker("member" if key.kind == "membership" else key.kind, key.id)


def _list_members(column_type: Any) -> dict[str, Any] | None:
    """Return the members of a column's enumeration by their text in the database; None if it has
    none."""
    if not isinstance(column_type, sa.Enum):
        return None
    if column_type.enum_class is None:
        return {text: text for text in column_type.enums}
    members = dict(column_type.enum_class.__members__)
    if len(members) > len(column_type.enums):  # it leaves out aliases
        members = {name: member for name, member in members.items() if member.name == name}
    return dict(zip(column_type.enums, members.values(), strict=True))


def _to_text(own: Any) -> str:
    return str(own.name if isinstance(own, enum.Enum) else own)
