"""Find the rows of SQLite that refer to rows which are to be deleted.

SQLite checks foreign keys only if the application has turned that on, and then doesn't say which
table refers to a row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.mapping.primary_keys import make_conditions

_REFERRED: Final = "rows of {} refer to it"
# They aren't changed by SQLite, which the application expects.
_LEFT_ALONE: Final = (
    "rows of {} refer to it, and SQLite changes them with it only after PRAGMA foreign_keys = ON"
)
_KEEPING: Final = ("NO ACTION", "RESTRICT")


class _ForeignKey(Struct, frozen=True):
    """A foreign key of a table, with the names of its own columns and of those it refers to."""

    table: str
    columns: tuple[tuple[str, str], ...]
    on_delete: str


def find_referring(
    connection: sa.Connection, table: sa.Table, keys: Collection[Sequence[Any]]
) -> dict[tuple[Any, ...], str]:
    """Return which of the rows with these primary keys can't be deleted, and why: others refer to
    them. On other databases than SQLite, return nothing."""
    if not keys or connection.dialect.name != "sqlite":
        return {}
    is_enforced = bool(connection.exec_driver_sql("PRAGMA foreign_keys").scalar())
    problems: dict[tuple[Any, ...], str] = {}
    for foreign_key in _list_foreign_keys(connection, table):
        keeps = foreign_key.on_delete in _KEEPING
        if is_enforced and not keeps:
            continue
        problem = (_REFERRED if keeps else _LEFT_ALONE).format(foreign_key.table)
        for key in _find_referred(connection, table, foreign_key, keys):
            problems.setdefault(key, problem)
    return problems


def _list_foreign_keys(connection: sa.Connection, parent: sa.Table) -> Iterator[_ForeignKey]:
    """List the foreign keys of all tables that refer to a table."""
    names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")
    query = sa.text("SELECT * FROM pragma_foreign_key_list(:name) ORDER BY id, seq")
    for name in names.scalars().all():
        columns: dict[int, list[tuple[str, str]]] = {}
        on_delete: dict[int, str] = {}
        for row in connection.execute(query, {"name": name}).mappings():
            if row["table"].lower() == parent.name.lower():
                # Without a name, it refers to the primary key.
                referred = row["to"] or list(parent.primary_key)[row["seq"]].name
                columns.setdefault(row["id"], []).append((row["from"], referred))
                on_delete[row["id"]] = row["on_delete"]
        for id_, its_columns in columns.items():
            yield _ForeignKey(name, tuple(its_columns), on_delete[id_])


def _find_referred(
    connection: sa.Connection,
    table: sa.Table,
    foreign_key: _ForeignKey,
    keys: Collection[Sequence[Any]],
) -> Iterator[tuple[Any, ...]]:
    """Return the primary keys of the rows to which other rows refer."""
    primary_key = list(table.primary_key)
    types = {column.name.lower(): column.type for column in primary_key}
    referred = {name.lower(): name for _, name in foreign_key.columns}
    names = {column.name.lower(): column.name for column in primary_key} | referred
    parent = sa.table(
        table.name, *(sa.column(name, types.get(key)) for key, name in names.items())
    ).alias("logto_webhooks_parent")
    is_itself = foreign_key.table.lower() == table.name.lower()
    own = {own for own, _ in foreign_key.columns}
    own |= {column.name for column in primary_key} if is_itself else set()
    child = sa.table(foreign_key.table, *map(sa.column, sorted(own))).alias("logto_webhooks_child")
    refers = [child.c[own] == parent.c[name] for own, name in foreign_key.columns]
    place = [parent.c[names[column.name.lower()]] for column in primary_key]
    if is_itself:  # a row may refer to itself
        same = [child.c[column.name] == own for column, own in zip(primary_key, place, strict=True)]
        refers.append(~sa.and_(*same))
    query = sa.select(*place).where(sa.exists().where(*refers))
    for are_some in make_conditions(place, keys):
        yield from map(tuple, connection.execute(query.where(are_some)))
