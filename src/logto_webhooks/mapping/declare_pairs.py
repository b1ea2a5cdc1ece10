"""What a mapping of memberships or of roles says: whose row it is, and what fills its columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.mapping.declare import (
    ColumnFinder,
    ColumnName,
    Problem,
    Read,
    check_required,
    check_where,
    describe_primary_key,
    find_table,
    is_unique,
    make_reader,
    match_class,
    name_columns,
    read_defaults,
)
from logto_webhooks.mapping.definition import describe_definition
from logto_webhooks.mapping.sources import find_python_type, is_function

PairKind = Literal["member", "user_role", "member_role"]
EndKind = Literal["organization", "user", "member", "role"]
RoleBy = Literal["id", "name"]
_NAME: Final = "name"


class MemberRow(Struct, frozen=True, kw_only=True):
    """A membership, with the roles that the user has in the organization, by name and by id."""

    organization_id: str
    user_id: str
    joined_at: datetime | None = None
    roles: tuple[str, ...] = ()
    role_ids: tuple[str, ...] = ()


class UserRoleRow(Struct, frozen=True, kw_only=True):
    """A role that a user has, by id and by name."""

    user_id: str
    role_id: str
    name: str


class MemberRoleRow(Struct, frozen=True, kw_only=True):
    """A role that a member has in an organization, by id and by name."""

    organization_id: str
    user_id: str
    role_id: str
    name: str


PairRow = MemberRow | UserRoleRow | MemberRoleRow
ROW_TYPES: Final[dict[PairKind, type[Struct]]] = {
    "member": MemberRow,
    "user_role": UserRoleRow,
    "member_role": MemberRoleRow,
}


class End(Struct, frozen=True):
    """A column that says whose row it is: an organization's, a user's or a member's.

    `referred` are the columns to which it refers. If the table of one is mapped, the column holds
    what that one has in your own row, and otherwise Logto's id.
    """

    kind: EndKind
    column: sa.Column[Any]
    referred: tuple[sa.Column[Any], ...] = ()

    def find_referred(self, tables: Collection[sa.Table]) -> sa.Column[Any] | None:
        """Return the column to which it refers in one of these tables. Another object, such as a
        reflected one, can stand for the same table."""
        return next(
            (
                table.c[own.key]
                for own in self.referred
                for table in tables
                if isinstance(own.table, sa.Table)
                and own.table.fullname == table.fullname
                and own.key in table.c
            ),
            None,
        )

    def id_in(self, row: Any) -> str:
        """Return the end's id in a row of the mirror."""
        if self.kind == "member":
            return f"{row.organization_id}:{row.user_id}"
        return str(getattr(row, f"{self.kind}_id"))


class RoleEnd(End, frozen=True):
    """A column that says which role it is. It holds the role's id or name, as `by` says, or what it
    refers to in the row of yours whose column `match` equals that."""

    by: RoleBy = "id"
    match: sa.Column[Any] | None = None

    def id_in(self, row: Any) -> str:
        """Return the role's id or name."""
        return str(row.role_id if self.by == "id" else row.name)


class PairMapping(Struct, frozen=True, kw_only=True):
    """A mapping of memberships, of users' roles or of members' roles onto a table.

    `kind` is that of the records: each user or membership has any number of rows for its roles.
    """

    pair: PairKind
    kind: Literal["user", "membership"]
    name: str
    target: Any
    table: sa.Table
    ends: tuple[End, ...]
    columns: dict[str, Read]
    create_defaults: dict[str, Any]
    where: Callable[[Any], bool] | None
    has_functions: bool
    definition: str

    def evaluate(self, row: Any) -> dict[str, Any]:
        """Return the values of columns for a row of the mirror. Raises what the application's
        functions raise."""
        return {name: read(row) for name, read in self.columns.items()}

    @property
    def primary_key(self) -> tuple[sa.Column[Any], ...]:
        """The primary key of the table."""
        return tuple(self.table.primary_key)

    @property
    def of_class(self) -> list[sa.ColumnElement[bool]]:
        """The condition for the rows of the class, if several classes share the table."""
        return match_class(self.target)


def declare_members(
    target: Any,
    *,
    organization: ColumnName,
    user: ColumnName,
    columns: Mapping[ColumnName, str | Read] | None = None,
    create_defaults: Mapping[ColumnName, Any] | None = None,
) -> PairMapping:
    """Check a mapping of memberships. Raises InvalidMapping."""
    finder = _make_finder(target)
    ends = [_find_end("organization", organization, finder), _find_end("user", user, finder)]
    return _declare("member", target, finder, ends, columns, create_defaults)


def declare_user_roles(
    target: Any,
    *,
    user: ColumnName,
    role: ColumnName,
    role_by: Any = None,
    columns: Mapping[ColumnName, str | Read] | None = None,
    create_defaults: Mapping[ColumnName, Any] | None = None,
    where: Callable[[Any], bool] | None = None,
) -> PairMapping:
    """Check a mapping of users' roles. Raises InvalidMapping."""
    finder = _make_finder(target)
    ends = [_find_end("user", user, finder), _find_role(role, role_by, finder)]
    return _declare("user_role", target, finder, ends, columns, create_defaults, where)


def declare_member_roles(
    target: Any,
    *,
    role: ColumnName,
    organization: ColumnName | None = None,
    user: ColumnName | None = None,
    member: ColumnName | None = None,
    role_by: Any = None,
    columns: Mapping[ColumnName, str | Read] | None = None,
    create_defaults: Mapping[ColumnName, Any] | None = None,
    where: Callable[[Any], bool] | None = None,
) -> PairMapping:
    """Check a mapping of members' roles. Raises InvalidMapping."""
    finder = _make_finder(target)
    if member is not None and organization is None and user is None:
        ends = [_find_member(member, finder)]
    elif member is None and organization is not None and user is not None:
        ends = [_find_end("organization", organization, finder), _find_end("user", user, finder)]
    else:
        raise finder.problem("pass either member, or both organization and user")
    ends.append(_find_role(role, role_by, finder))
    return _declare("member_role", target, finder, ends, columns, create_defaults, where)


def _make_finder(target: Any) -> ColumnFinder:
    table = find_table(target)
    return ColumnFinder(table, target, Problem(table.fullname))


def _declare(
    pair: PairKind,
    target: Any,
    finder: ColumnFinder,
    ends: Sequence[End],
    columns: Mapping[ColumnName, str | Read] | None,
    create_defaults: Mapping[ColumnName, Any] | None,
    where: Callable[[Any], bool] | None = None,
) -> PairMapping:
    problem, table = finder.problem, finder.table
    columns = columns or {}
    reads = {
        finder.find(name).key: make_reader(ROW_TYPES[pair], source, finder.find(name), problem)
        for name, source in columns.items()
    }
    keys = [end.column.key for end in ends]
    for key in keys:
        if keys.count(key) > 1 or key in reads:
            raise problem(f"{key} would be filled twice")
    defaults = read_defaults(create_defaults or {}, finder, {*keys, *reads})
    check_required(table, {*keys, *reads, *defaults}, problem)
    described = [
        [end.column, *end.referred, getattr(end, "by", ""), getattr(end, "match", "")]
        for end in ends
    ]
    return PairMapping(
        pair=pair,
        kind="user" if pair == "user_role" else "membership",
        name=str(table.fullname),  # a subclass of str can't be encoded
        target=target,
        table=table,
        ends=tuple(ends),
        columns=reads,
        create_defaults=defaults,
        where=None if where is None else check_where(where, problem),
        has_functions=any(map(is_function, (where, *columns.values()))),
        definition=describe_definition(
            {
                "ends": described,
                "primary_key": describe_primary_key(table),
                "columns": name_columns(columns, finder),
                "create_defaults": name_columns(create_defaults or {}, finder),
                "where": where,
            },
            problem,
        ),
    )


def _find_end(kind: Literal["organization", "user"], name: ColumnName, finder: ColumnFinder) -> End:
    column = finder.find(name)
    referred = tuple(dict.fromkeys(_list_referred(column, finder)))
    if not referred:
        finder.check_id(column)
    for parent in referred:
        _check_same_type(column, parent, finder)
    return End(kind, column, referred)


def _check_same_type(column: sa.Column[Any], parent: sa.Column[Any], finder: ColumnFinder) -> None:
    """Check that values of a column can be compared with those to which it refers. Raises
    InvalidMapping."""
    own, theirs = find_python_type(column), find_python_type(parent)
    if own is not theirs and UUID in (own, theirs) and None not in (own, theirs):
        raise finder.problem(
            f"{column.name} is of type {column.type!r}, but refers to {parent}, which is of type "
            f"{parent.type!r}: give both the same type"
        )


def list_foreign_keys(column: sa.Column[Any]) -> list[sa.ForeignKey]:
    """List the foreign keys of a column in an order that is the same in each process."""
    return sorted(column.foreign_keys, key=lambda key: str(key.target_fullname))


def is_part(key: sa.ForeignKey) -> bool:
    """Whether a foreign key has other columns, too."""
    return key.constraint is not None and len(key.constraint.elements) > 1


def _list_referred(
    column: sa.Column[Any], finder: ColumnFinder, through: Collection[sa.Column[Any]] = ()
) -> Iterator[sa.Column[Any]]:
    """Yield the columns to which a column refers. If a foreign key has several columns, such as one
    to a table of members, a column that isn't unique stands for what it refers to itself."""
    for key in list_foreign_keys(column):
        referred = key.column
        if is_unique(referred):
            yield referred
            continue
        if is_part(key):
            if not any(referred is other for other in (column, *through)):
                yield from _list_referred(referred, finder, (*through, column))
            continue
        if referred.primary_key:
            raise finder.problem(
                f"{column.name} refers to {referred.table.name}, whose primary key has several "
                "columns: refer to a column that is unique by itself"
            )
        yield referred


def _find_member(name: ColumnName, finder: ColumnFinder) -> End:
    column = finder.find(name)
    keys = [key.column for key in list_foreign_keys(column)]
    referred = tuple(own for own in keys if list(own.table.primary_key) == [own])
    if referred:
        return End("member", column, referred)
    raise finder.problem(
        f"{column.name} doesn't refer to the primary key of a table of members, which is one "
        "column: pass organization and user instead of member"
    )


def _find_role(name: ColumnName, by: Any, finder: ColumnFinder) -> RoleEnd:
    column = finder.find(name)
    referred = next((key.column for key in list_foreign_keys(column)), None)
    way = by if isinstance(by, str) else None
    if referred is None:
        if way not in ("id", "name", None) or by is not way:
            raise finder.problem(
                f'{column.name} refers to no table, so role_by must be "id" or "name"'
            )
        return RoleEnd("role", column, by="name" if way == "name" else "id")
    table = referred.table
    if any(is_part(key) for key in column.foreign_keys):
        raise finder.problem(
            f"{column.name} refers to {table.name} together with other columns, so the role alone "
            f"doesn't tell which row is meant: let it refer to {table.name} by itself"
        )
    if way == "id":
        return RoleEnd("role", column, (referred,), by="id", match=referred)
    match = table.c.get(_NAME) if by is None or way == "name" else _find_of_table(by, table)
    if match is None:
        raise finder.problem(
            f"{column.name} refers to {table.name}: pass role_by, the column of {table.name} that "
            "holds the role's name, or \"id\" if it is Logto's role id. If it isn't your table of "
            "roles, role must be another column"
        )
    return RoleEnd("role", column, (referred,), by="name", match=match)


def _find_of_table(name: Any, table: sa.Table) -> sa.Column[Any] | None:
    """Find a column of the table of roles by what an application calls it."""
    columns = getattr(getattr(name, "property", None), "columns", [name])
    column = columns[0]
    return column if isinstance(column, sa.Column) and column.table is table else None
