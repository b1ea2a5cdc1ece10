"""Reflect the application's tables from the database, for mappings without code."""

from __future__ import annotations

import re
import warnings
from typing import Any

import sqlalchemy as sa

from logto_webhooks.database.schema import VERSION_TABLE
from logto_webhooks.database.schema import metadata as our_metadata
from logto_webhooks.database.sessions import APP_SCHEMAS, use_app_schemas
from logto_webhooks.errors import LogtoWebhooksError
from logto_webhooks.validation import nearest

_INDEXES = sa.text(
    "SELECT name, sql FROM sqlite_master"
    " WHERE type = 'index' AND lower(tbl_name) = lower(:table) AND sql IS NOT NULL"
)
# Such as `CREATE UNIQUE INDEX emails ON users (lower(email)) WHERE deleted_at IS NULL`.
_BY_EXPRESSION = re.compile(
    r"CREATE\s+UNIQUE\s+INDEX\s+.+?\s+ON\s+[^(]+?"
    r"\((?P<expression>[^,;]+?)\)\s*(?:WHERE\s+(?P<where>.+))?",
    re.IGNORECASE | re.DOTALL,
)
_OURS = frozenset({*our_metadata.tables, VERSION_TABLE})


class TableNotFound(LogtoWebhooksError):
    """{problem}."""

    problem: str


class OwnTables:
    """The application's tables. Each is reflected once, when it is needed."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._metadata = sa.MetaData()
        self._inspector = sa.inspect(connection)

    @property
    def dialect(self) -> str:
        """The database's name in SQLAlchemy."""
        return self._connection.dialect.name

    def list_names(self, schema: str | None = None) -> list[str]:
        """Return the names of the tables in a schema, by default the connection's, without this
        package's."""
        names = self._inspector.get_table_names(self._find_schema(schema))
        return sorted(name for name in names if name not in _OURS)

    def list_referred(self) -> dict[str, set[str]]:
        """Return the tables to which each table of the default schema refers, by name."""
        referred = self._inspector.get_multi_foreign_keys(schema=self._find_schema(None))
        return {
            name: {key["referred_table"] for key in keys if len(key["referred_columns"]) == 1}
            for (_, name), keys in sorted(referred.items(), key=lambda item: item[0][1])
            if name not in _OURS
        }

    def quote(self, name: str | sa.Table) -> str:
        """Quote a name for a statement, if necessary."""
        preparer = self._connection.dialect.identifier_preparer
        quoted = preparer.quote(name) if isinstance(name, str) else preparer.format_table(name)
        return str(quoted)

    def find(self, name: str) -> sa.Table:
        """Return a table by its name, which can begin with a schema. Raises TableNotFound."""
        schema, _, table = name.rpartition(".")
        if (table or name) in _OURS:
            raise TableNotFound(problem=f"{name} is a table of logto-webhooks, not of yours")
        if not schema or self._has(name, None):
            return self._reflect(name, None)
        # Foreign keys name no schema if a table is in the default one.
        is_default = schema == self._inspector.default_schema_name
        return self._reflect(table, None if is_default else schema)

    def find_parents(self, column: sa.Column[Any]) -> None:
        """Reflect the tables to which a column refers, and those to which it refers through them.
        Raises TableNotFound."""
        for key in column.foreign_keys:
            target, _, _ = str(key.target_fullname).rpartition(".")
            schema, _, name = target.rpartition(".")
            if target not in self._metadata.tables:
                self._reflect(name, schema or None)
                self.find_parents(key.column)

    def _reflect(self, name: str, schema: str | None) -> sa.Table:
        key = f"{schema}.{name}" if schema else name
        if key in self._metadata.tables:
            return self._metadata.tables[key]
        schemas = self._inspector.get_schema_names()
        if schema is not None and self._find_schema(schema) not in schemas:
            known = ", ".join(schemas)
            raise TableNotFound(problem=f"there is no schema {schema}; the database has {known}")
        if not self._has(name, schema):
            names = self.list_names(schema)
            advice = nearest(name, names) if names else "there are no tables"
            raise TableNotFound(problem=f"there is no table {key}; {advice}")
        with warnings.catch_warnings(), use_app_schemas(self._connection):
            warnings.simplefilter("ignore", sa.exc.SAWarning)  # about types that it doesn't know
            table = sa.Table(
                name,
                self._metadata,
                schema=schema,
                autoload_with=self._connection,
                resolve_fks=False,
                listeners=[("column_reflect", _read_uuids_as_text)],
            )
            self._add_constraints(table)
            return table

    def _add_constraints(self, table: sa.Table) -> None:
        """Add what SQLAlchemy doesn't see in SQLite: unique constraints such as that of `email
        VARCHAR(254) UNIQUE`, and unique indexes of expressions."""
        if self._connection.dialect.name != "sqlite":
            return
        schema = self._find_schema(table.schema)
        for index in self._inspector.get_indexes(table.name, schema, include_auto_indexes=True):
            if str(index["name"]).startswith("sqlite_autoindex_"):
                columns = [table.c[name] for name in index["column_names"] if name is not None]
                table.append_constraint(sa.UniqueConstraint(*columns))
        known = {index.name for index in table.indexes}
        for name, sql in self._connection.execute(_INDEXES, {"table": table.name}):
            match = _BY_EXPRESSION.fullmatch(sql)
            if name not in known and match is not None:
                expression = sa.text(match["expression"].replace(":", r"\:"))
                table.indexes.add(
                    sa.Index(name, expression, unique=True, sqlite_where=match["where"])
                )

    def _has(self, name: str, schema: str | None) -> bool:
        return self._inspector.has_table(name, self._find_schema(schema))

    def _find_schema(self, schema: str | None) -> str | None:
        schemas = self._connection.get_execution_options().get(APP_SCHEMAS) or {}
        shown: str | None = schemas.get(schema, schema)
        return shown


def list_unique(inspector: sa.Inspector, table: str, schema: str | None) -> list[list[str]]:
    """Return the columns of unique indexes and constraints, without those on expressions or for a
    part of the rows."""
    options = {"include_auto_indexes": True} if inspector.dialect.name == "sqlite" else {}
    indexes = inspector.get_indexes(table, schema, **options)
    constraints = inspector.get_unique_constraints(table, schema)
    primary = inspector.get_pk_constraint(table, schema)["constrained_columns"]
    unique = [primary, *(constraint["column_names"] for constraint in constraints)]
    for index in indexes:
        names = [name for name in index["column_names"] if name is not None]
        is_partial = any(name.endswith("_where") for name in index.get("dialect_options", {}))
        if index["unique"] and not is_partial and len(names) == len(index["column_names"]):
            unique.append(names)
    return [names for place, names in enumerate(unique) if names and names not in unique[:place]]


def _read_uuids_as_text(inspector: object, table: sa.Table, column: Any) -> None:
    """Logto's mirror has UUIDs as text."""
    if isinstance(column["type"], sa.Uuid):
        column["type"] = sa.Uuid(as_uuid=False)


def name_table(table: sa.Table) -> str:
    """Return a table's name, with its schema if it has one."""
    return str(table.fullname)
