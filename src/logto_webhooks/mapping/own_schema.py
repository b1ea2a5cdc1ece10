"""Compare the mapped tables in the database with what the mappings need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.sessions import APP_SCHEMAS
from logto_webhooks.database.store import Store
from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.cascades import describe_in_database, read_cascades
from logto_webhooks.mapping.declare import EntityMapping
from logto_webhooks.mapping.declare_pairs import PairMapping, RoleEnd
from logto_webhooks.mapping.own_tables import list_unique


class OwnSchema(Struct, frozen=True, kw_only=True):
    """What is wrong with the database. `missing` says for mappings, by name, which table or columns
    don't exist. `unindexed` are the columns that say whose row it is, if they have no unique index.
    `cascades` says what foreign keys do to rows that they shouldn't. `file_problem` says why a file
    with mappings can't be used, `incomplete` why an application with these mappings can't start."""

    file_problem: str = ""
    incomplete: str = ""
    missing: dict[str, str] = {}
    unindexed: list[str] = []
    cascades: list[str] = []


def inspect_own_schema(store: Store, mappings: Mappings) -> OwnSchema:
    """Look for the tables, the columns and the indexes that mappings need."""
    catalog = _Catalog(store.connection)
    missing = {mapping.name: _find_missing(catalog, mapping) for mapping in mappings.all}
    return OwnSchema(
        incomplete=_find_incomplete(mappings),
        missing={name: problem for name, problem in missing.items() if problem},
        unindexed=[
            *(
                f"{mapping.name}.{mapping.key.column.name}"
                for mapping in mappings.entities
                if not _has_unique_index(catalog, mapping)
            ),
            *(
                f"{mapping.name} ({', '.join(end.column.name for end in mapping.ends)})"
                for mapping in mappings.pairs
                if not _has_unique_ends(catalog, mapping)
            ),
        ],
        cascades=_list_cascades(store.connection, mappings),
    )


def _find_incomplete(mappings: Mappings) -> str:
    try:
        mappings.check_complete()
    except InvalidMapping as error:
        return str(error)
    return ""


def find_missing(store: Store, mapping: EntityMapping | PairMapping) -> str:
    """Say which table or columns of a mapping don't exist; "" if all do."""
    return _find_missing(_Catalog(store.connection), mapping)


class _Catalog:
    """The tables in the database, by those of the application."""

    def __init__(self, connection: sa.Connection) -> None:
        self.inspector = sa.inspect(connection)
        self._schemas = connection.get_execution_options().get(APP_SCHEMAS) or {}

    def find_schema(self, table: sa.Table) -> str | None:
        """Return the schema of a table."""
        schema: str | None = self._schemas.get(table.schema, table.schema)
        return schema

    def list_columns(self, table: sa.Table) -> set[str] | None:
        """Return the names of a table's columns; None if there is no such table."""
        schema = self.find_schema(table)
        if not self.inspector.has_table(table.name, schema):
            return None
        return {column["name"] for column in self.inspector.get_columns(table.name, schema)}


def _list_cascades(connection: sa.Connection, mappings: Mappings) -> list[str]:
    """Say what the database's foreign keys do to rows, if the tables aren't declared so: otherwise,
    the mappings would have been refused."""
    cascades = read_cascades(connection, mappings.all)
    harms = [*cascades.list_harms(), *cascades.list_emptied()]
    return list(dict.fromkeys(map(describe_in_database, harms)))


def _find_missing(catalog: _Catalog, mapping: EntityMapping | PairMapping) -> str:
    tables: dict[sa.Table, set[str]] = {}
    for column in _list_columns(mapping):
        assert isinstance(column.table, sa.Table)
        tables.setdefault(column.table, set()).add(column.name)
    columns = []
    for table, names in tables.items():
        there = catalog.list_columns(table)
        if there is None:
            return f"The table {table.fullname} doesn't exist"
        columns += [f"{table.fullname}.{name}" for name in sorted(names - there)]
    if len(columns) > 1:
        return f"The columns {', '.join(columns)} don't exist"
    return f"The column {columns[0]} doesn't exist" if columns else ""


def _list_columns(mapping: EntityMapping | PairMapping) -> Iterator[sa.Column[Any]]:
    """List the columns that a mapping reads or writes."""
    yield from mapping.primary_key
    names = {*mapping.columns, *mapping.create_defaults}
    if isinstance(mapping, EntityMapping):
        yield mapping.key.column
        names |= mapping.fill.keys()
        if isinstance(mapping.when_deleted, dict):
            names |= mapping.when_deleted.keys()
        if mapping.link is not None and mapping.link.column is not None:
            yield mapping.link.column
    else:
        for end in mapping.ends:
            yield end.column
            if isinstance(end, RoleEnd) and end.match is not None:
                yield from (end.match, *end.referred)
    yield from (mapping.table.c[name] for name in sorted(names))


def _has_unique_index(catalog: _Catalog, mapping: EntityMapping) -> bool:
    """Whether the key's column has one. A path inside a JSON column needs an index on an
    expression."""
    table, key, inspector = mapping.table.name, mapping.key, catalog.inspector
    if key.column.name not in (catalog.list_columns(mapping.table) or ()):
        return True  # what is missing is another problem
    schema = catalog.find_schema(mapping.table)
    if key.path and inspector.dialect.name == "sqlite":
        return True  # unknown
    with warnings.catch_warnings():  # about indexes on expressions, which it can't read in SQLite
        warnings.simplefilter("ignore", sa.exc.SAWarning)
        if not key.path:
            return [key.column.name] in list_unique(inspector, table, schema)
        indexes = inspector.get_indexes(table, schema)
    expressions = [index.get("expressions") for index in indexes if index["unique"]]
    return any(key.path[-1] in str(expression) for expression in expressions)


def _has_unique_ends(catalog: _Catalog, mapping: PairMapping) -> bool:
    """Whether a unique index has some of the columns of a pair's ends, and no others."""
    ends = {end.column.name for end in mapping.ends}
    if not ends <= (catalog.list_columns(mapping.table) or set()):
        return True  # what is missing is another problem
    schema = catalog.find_schema(mapping.table)
    unique = list_unique(catalog.inspector, mapping.table.name, schema)
    return any(ends.issuperset(names) for names in unique)
