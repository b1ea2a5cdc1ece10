"""Find what refers to the rows of a table in the database.

SQLite checks foreign keys only if the application has turned that on, and then doesn't say which
table refers to a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.mapping.primary_keys import make_conditions

_REFERRED: Final = "rows of {} refer to it"
# They aren't changed by SQLite, which the application expects.
_LEFT_ALONE: Final = (
    "rows of {} refer to it, and SQLite changes them with it only after PRAGMA foreign_keys = ON"
)
_SQLITE_KEYS: Final = sa.text(
    "SELECT child.name AS child, foreign_key.* FROM sqlite_master AS child,"
    " pragma_foreign_key_list(child.name) AS foreign_key WHERE child.type = 'table'"
    ' AND lower(foreign_key."table") = lower(:parent) ORDER BY child, id, seq'
)


_FOLLOWING: Final = ("CASCADE", "SET NULL", "SET DEFAULT")
# As PostgreSQL abbreviates these.
_FOLLOWED_ON_POSTGRESQL: Final = """
    SELECT EXISTS (
        SELECT FROM pg_constraint
        WHERE contype = 'f' AND confupdtype IN ('c', 'n', 'd') AND confrelid = to_regclass(:name)
    )
"""


class ForeignKey(Struct, frozen=True):
    """A foreign key of a table, with the names of its own columns and of those it refers to."""

    table: str
    columns: tuple[str, ...]
    referred: tuple[str, ...]
    on_delete: str
    on_update: str


def follows_updates(connection: sa.Connection, table: sa.Table, schemas: Any) -> bool:
    """Return whether rows that refer to a table's rows change with these (ON UPDATE). `schemas` is
    the `schema_translate_map` of the application's engine."""
    if connection.dialect.name == "sqlite":
        keys = list_foreign_keys(connection, table)
        return any(key.on_update in _FOLLOWING for key in keys)
    preparer = connection.dialect.identifier_preparer
    schema = (schemas or {}).get(table.schema, table.schema)
    name = preparer.quote(table.name)
    full_name = f"{preparer.quote_schema(schema)}.{name}" if schema else name
    query = sa.text(_FOLLOWED_ON_POSTGRESQL)
    return bool(connection.scalar(query, {"name": full_name}))


def find_referring(
    connection: sa.Connection,
    run: Callable[[Any], sa.CursorResult[Any]],
    table: sa.Table,
    foreign_keys: Sequence[ForeignKey],
    keys: Collection[tuple[Any, ...]],
    changed: Collection[str] | None = None,
) -> dict[tuple[Any, ...], str]:
    """Return which of the rows with these primary keys can't be deleted, and why: others refer to
    them. If columns are `changed`, return which rows can't be changed. `foreign_keys` are those
    that refer to the table in SQLite; `run` executes a query."""
    if changed is not None:
        names = {table.c[key].name.lower() for key in changed}
        foreign_keys = [
            key for key in foreign_keys if not names.isdisjoint(map(str.lower, key.referred))
        ]
    if not foreign_keys:
        return {}
    is_enforced = bool(connection.exec_driver_sql("PRAGMA foreign_keys").scalar())
    problems: dict[tuple[Any, ...], str] = {}
    for foreign_key in foreign_keys:
        action = foreign_key.on_delete if changed is None else foreign_key.on_update
        if is_enforced and action in _FOLLOWING:
            continue
        problem = (_LEFT_ALONE if action in _FOLLOWING else _REFERRED).format(foreign_key.table)
        for key in _find_referred(run, table, foreign_key, keys):
            problems.setdefault(key, problem)
    return problems


def list_foreign_keys(connection: sa.Connection, parent: sa.Table) -> list[ForeignKey]:
    """List the foreign keys of all tables that refer to a table. Those that refer to columns which
    don't exist are left out: SQLite accepts them as long as it needn't check them."""
    parts: dict[tuple[str, int], list[Any]] = {}
    for row in connection.execute(_SQLITE_KEYS, {"parent": parent.name}).mappings():
        parts.setdefault((row["child"], row["id"]), []).append(row)
    if not parts:
        return []
    own = sa.text("SELECT lower(name) FROM pragma_table_info(:name)")
    known = set(connection.execute(own, {"name": parent.name}).scalars())
    primary_key = [column.name for column in parent.primary_key]
    foreign_keys = []
    for (child, _), rows in parts.items():
        columns = tuple(row["from"] for row in rows)
        # Without names, it refers to the primary key.
        named = [row["to"] for row in rows]
        referred = tuple(primary_key if None in named else named)
        if len(columns) == len(referred) and known.issuperset(map(str.lower, referred)):
            actions = (rows[0]["on_delete"], rows[0]["on_update"])
            foreign_keys.append(ForeignKey(child, columns, referred, *actions))
    return foreign_keys


def _find_referred(
    run: Callable[[Any], sa.CursorResult[Any]],
    table: sa.Table,
    foreign_key: ForeignKey,
    keys: Collection[tuple[Any, ...]],
) -> Iterator[tuple[Any, ...]]:
    """Yield the primary keys of the rows to which other rows refer."""
    place = list(table.primary_key)
    referred = [_make_column(table, name) for name in foreign_key.referred]
    keys_by_value: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for are_some in make_conditions(place, keys):
        for row in run(sa.select(*place, *referred).where(are_some)):
            keys_by_value.setdefault(tuple(row[len(place) :]), []).append(tuple(row[: len(place)]))
    is_itself = foreign_key.table.lower() == table.name.lower()
    child = table if is_itself else sa.table(foreign_key.table)
    columns = [_make_column(child, name) for name in foreign_key.columns]
    own_key = place if is_itself else []  # a row may refer to itself
    for are_some in make_conditions(columns, keys_by_value):
        query = sa.select(*columns, *own_key).select_from(child).where(are_some).distinct()
        for row in run(query):
            for key in keys_by_value.get(tuple(row[: len(columns)]), ()):
                if not is_itself or key != tuple(row[len(columns) :]):
                    yield key


def _make_column(table: sa.FromClause, name: str) -> sa.ColumnClause[Any]:
    """Make a column whose values are as SQLite stores them."""
    return sa.column(name, sa.types.NullType(), _selectable=table)
