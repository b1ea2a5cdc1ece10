"""Read the foreign keys of the database, which can differ from what an application declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

import sqlalchemy as sa

from logto_webhooks.database.sessions import APP_SCHEMAS
from logto_webhooks.mapping.cascades import Cascades, OneMapping, Reference

# Those that do something. A table is called by what PostgreSQL makes of its name.
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
        lower(child.name) AS child, id, lower("table") AS parent, on_delete, on_update, "from",
        coalesce("to", (SELECT name FROM pragma_table_info("table") WHERE pk = seq + 1), '') AS "to"
    FROM sqlite_master AS child, pragma_foreign_key_list(child.name)
    WHERE child.type = 'table' ORDER BY child.name, id, seq
""")


def read_cascades(connection: sa.Connection, mappings: Sequence[OneMapping]) -> Cascades:
    """Read what the database's foreign keys do to the rows of mappings."""
    mapped = {
        name: mapping
        for mapping in mappings
        if (name := _find_name(connection, mapping.table)) is not None
    }
    return Cascades(_list_references(connection), mapped)


def _list_references(connection: sa.Connection) -> list[Reference]:
    """List the foreign keys that change or delete rows with those to which they refer. In SQLite,
    there are none unless the connection enforces them."""
    if connection.dialect.name != "sqlite":
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
    if not connection.exec_driver_sql("PRAGMA foreign_keys").scalar():
        return []
    return list(_read_sqlite(connection))


def _read_sqlite(connection: sa.Connection) -> Iterator[Reference]:
    rows = connection.execute(_OF_SQLITE).mappings()
    for (child, _), parts in groupby(rows, lambda row: (row["child"], row["id"])):
        first, *others = parts
        yield Reference(
            child=child,
            columns=tuple(row["from"] for row in (first, *others)),
            parent=first["parent"],
            referred=tuple(row["to"] for row in (first, *others)),
            on_delete=first["on_delete"],
            on_update=first["on_update"],
        )


def _find_name(connection: sa.Connection, table: sa.Table) -> str | None:
    """Return what a table is called in the list; None if it doesn't exist."""
    if connection.dialect.name == "sqlite":
        return table.name.lower()
    schemas = connection.get_execution_options().get(APP_SCHEMAS) or {}
    schema = schemas.get(table.schema, table.schema)
    parameters = {"name": str(table.name), "schema": schema}
    name: str | None = connection.scalar(_NAME_ON_POSTGRESQL, parameters)
    return name
