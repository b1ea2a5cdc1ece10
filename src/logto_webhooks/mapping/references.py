"""Read the foreign keys of the database, which can differ from what an application declares, and
find the rows to which others refer.

SQLite checks foreign keys only if the application has turned that on, and then doesn't say which
table refers to a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Any, Final

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.sessions import APP_SCHEMAS
from logto_webhooks.mapping.primary_keys import make_conditions

_REFERRED: Final = "rows of {} refer to it"
# They aren't changed by SQLite, which the application expects.
_LEFT_ALONE: Final = (
    "rows of {} refer to it, and SQLite changes them with it only after PRAGMA foreign_keys = ON"
)
_FOLLOWING: Final = ("CASCADE", "SET NULL", "SET DEFAULT")
# A table is called by what PostgreSQL makes of its name.
_OF_POSTGRESQL: Final = sa.text("""
    SELECT
        CAST(CAST(conrelid AS regclass) AS text) AS child,
        CAST(CAST(confrelid AS regclass) AS text) AS parent,
        CAST(confdeltype AS text) AS on_delete,
        CAST(confupdtype AS text) AS on_update,
        ARRAY(
            SELECT CAST(attname AS text) FROM unnest(conkey) WITH ORDINALITY AS own (number, place)
            JOIN pg_attribute ON attrelid = conrelid AND attnum = number ORDER BY place
        ) AS columns,
        ARRAY(
            SELECT CAST(attname AS text) FROM unnest(confkey) WITH ORDINALITY AS own (number, place)
            JOIN pg_attribute ON attrelid = confrelid AND attnum = number ORDER BY place
        ) AS referred
    FROM pg_constraint
    WHERE contype = 'f' AND (confdeltype IN ('c', 'n', 'd') OR confupdtype IN ('c', 'n', 'd'))
    ORDER BY 1, 5, 2
""")
# Also if its schema can't be used, which to_regclass would refuse.
_NAME_ON_POSTGRESQL: Final = sa.text("""
    SELECT CAST(CAST(own.oid AS regclass) AS text)
    FROM pg_class AS own JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relname = :name
    AND (nspname = :schema OR (CAST(:schema AS text) IS NULL AND pg_table_is_visible(own.oid)))
""")
_ACTIONS: Final = {"c": "CASCADE", "n": "SET NULL", "d": "SET DEFAULT"}
# Without names, they refer to the primary key.
_OF_SQLITE: Final = sa.text("""
    SELECT
        child.name AS child, id, "table" AS parent, on_delete, on_update, "from",
        coalesce("to", (SELECT name FROM pragma_table_info("table") WHERE pk = seq + 1), '') AS "to"
    FROM sqlite_master AS child, pragma_foreign_key_list(child.name)
    WHERE child.type = 'table' ORDER BY child.name, id, seq
""")


class Reference(Struct, frozen=True, kw_only=True):
    """A foreign key: the names of its table and columns, and of those to which it refers."""

    child: str
    columns: tuple[str, ...]
    parent: str
    referred: tuple[str, ...]
    on_delete: str
    on_update: str


def read_references(connection: sa.Connection) -> list[Reference]:
    """Read the foreign keys of all tables; on PostgreSQL, only those that change or delete rows
    with those to which they refer."""
    if connection.dialect.name == "sqlite":
        return list(_read_sqlite(connection))
    return [
        Reference(
            child=row.child,
            columns=tuple(row.columns),
            parent=row.parent,
            referred=tuple(row.referred),
            on_delete=_ACTIONS.get(row.on_delete, ""),
            on_update=_ACTIONS.get(row.on_update, ""),
        )
        for row in connection.execute(_OF_POSTGRESQL)
    ]


def _read_sqlite(connection: sa.Connection) -> Iterator[Reference]:
    rows = connection.execute(_OF_SQLITE).mappings()
    for _, parts in groupby(rows, lambda row: (row["child"], row["id"])):
        first, *others = parts
        yield Reference(
            child=first["child"],
            columns=tuple(row["from"] for row in (first, *others)),
            parent=first["parent"],
            referred=tuple(row["to"] for row in (first, *others)),
            on_delete=first["on_delete"],
            on_update=first["on_update"],
        )


def enforces_references(connection: sa.Connection) -> bool:
    """Whether the database checks foreign keys, and does what they say. SQLite does so only if the
    connection asks for it."""
    if connection.dialect.name != "sqlite":
        return True
    return bool(connection.exec_driver_sql("PRAGMA foreign_keys").scalar())


def find_name(connection: sa.Connection, table: sa.Table) -> str | None:
    """Return what the database calls a table in references, in lower case on SQLite; None if it
    doesn't exist."""
    if connection.dialect.name == "sqlite":
        return table.name.lower()
    schemas = connection.get_execution_options().get(APP_SCHEMAS) or {}
    schema = schemas.get(table.schema, table.schema)
    parameters = {"name": str(table.name), "schema": schema}
    name: str | None = connection.scalar(_NAME_ON_POSTGRESQL, parameters)
    return name


def follows_updates(connection: sa.Connection, table: sa.Table) -> bool:
    """Return whether rows that refer to a table's rows change with these (ON UPDATE)."""
    references = list_references(connection, table)
    return any(reference.on_update in _FOLLOWING for reference in references)


def find_referring(
    connection: sa.Connection,
    run: Callable[[Any], sa.CursorResult[Any]],
    table: sa.Table,
    references: Sequence[Reference],
    keys: Collection[tuple[Any, ...]],
    changed: Collection[str] | None = None,
) -> dict[tuple[Any, ...], str]:
    """Return which of the rows with these primary keys can't be deleted, and why: others refer to
    them. If columns are `changed`, return which rows can't be changed. `references` are those
    to the table in SQLite; `run` executes a query."""
    if changed is not None:
        names = {table.c[key].name.lower() for key in changed}
        references = [
            own for own in references if not names.isdisjoint(map(str.lower, own.referred))
        ]
    if not references:
        return {}
    is_enforced = enforces_references(connection)
    problems: dict[tuple[Any, ...], str] = {}
    for reference in references:
        action = reference.on_delete if changed is None else reference.on_update
        if is_enforced and action in _FOLLOWING:
            continue
        problem = (_LEFT_ALONE if action in _FOLLOWING else _REFERRED).format(reference.child)
        for key in _find_referred(run, table, reference, keys):
            problems.setdefault(key, problem)
    return problems


def list_references(connection: sa.Connection, parent: sa.Table) -> list[Reference]:
    """List the foreign keys that refer to a table, as `read_references` does. In SQLite, those that
    refer to columns which don't exist are left out: it accepts them until it has to check them."""
    name = find_name(connection, parent)
    if connection.dialect.name != "sqlite":
        return [own for own in read_references(connection) if own.parent == name]
    references = [own for own in read_references(connection) if own.parent.lower() == name]
    if not references:
        return []
    columns = sa.text("SELECT lower(name) FROM pragma_table_info(:name)")
    known = set(connection.execute(columns, {"name": parent.name}).scalars())
    return [own for own in references if known.issuperset(map(str.lower, own.referred))]


def _find_referred(
    run: Callable[[Any], sa.CursorResult[Any]],
    table: sa.Table,
    reference: Reference,
    keys: Collection[tuple[Any, ...]],
) -> Iterator[tuple[Any, ...]]:
    """Yield the primary keys of the rows to which other rows refer."""
    place = list(table.primary_key)
    referred = [_make_column(table, name) for name in reference.referred]
    keys_by_value: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for are_some in make_conditions(place, keys):
        for row in run(sa.select(*place, *referred).where(are_some)):
            keys_by_value.setdefault(tuple(row[len(place) :]), []).append(tuple(row[: len(place)]))
    is_itself = reference.child.lower() == table.name.lower()
    child = table if is_itself else sa.table(reference.child)
    columns = [_make_column(child, name) for name in reference.columns]
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
