"""The SQL that differs per database, and how many rows are written at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from logto_webhooks import canonical_json

Row = dict[str, Any]

NOW_ON_SQLITE = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


class _Spelled(FunctionElement[Any]):
    """What each dialect spells in its own way."""

    sqlite: ClassVar[str]
    postgresql: ClassVar[str]


@compiles(_Spelled)
def _spell(element: _Spelled, compiler: SQLCompiler, **options: Any) -> str:
    template: str = getattr(element, compiler.dialect.name)
    return template.format(*(compiler.process(clause, **options) for clause in element.clauses))


class now(_Spelled):  # noqa: N801
    """The database's clock, in milliseconds since the epoch."""

    type = sa.BigInteger()
    inherit_cache = True
    sqlite = NOW_ON_SQLITE
    # Not clock_timestamp(), with which no index serves.
    postgresql = "CAST(extract(epoch FROM statement_timestamp()) * 1000 AS BIGINT)"


class among(_Spelled):  # noqa: N801
    """Whether a column is one of the values of the parameter `name`: one statement for any number.

    `IN (…)` is another statement for each number of values, to be prepared anew.
    """

    type = sa.types.NullType()  # a Boolean becomes `… = 1` on SQLite, which no index serves
    inherit_cache = True
    sqlite = "{} IN (SELECT value FROM json_each({}))"
    postgresql = "{} = ANY({})"

    def __init__(self, column: sa.Column[Any], name: str) -> None:
        super().__init__(column, sa.bindparam(name, type_=_Values(column.type)))


class _Values(sa.types.TypeDecorator[Any]):
    """A list of numbers or texts: an array, or JSON where there are no arrays."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, item: sa.types.TypeEngine[Any]) -> None:
        super().__init__()
        self.item = item

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Choose by the database."""
        is_postgresql = dialect.name == "postgresql"
        return dialect.type_descriptor(_array(self.item) if is_postgresql else sa.Text())

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        """Encode, where there are no arrays."""
        return value if dialect.name == "postgresql" else canonical_json.encode(value).decode()


class by_code(_Spelled):  # noqa: N801
    """A text as Python orders it, whatever the language of the database."""

    type = sa.Text()
    inherit_cache = True
    sqlite = "{}"
    postgresql = '{} COLLATE "C"'


class holds(_Spelled):  # noqa: N801
    """Whether the bytes of a column hold some others."""

    type = sa.Boolean()
    inherit_cache = True
    sqlite = "(instr({0}, {1}) > 0)"
    postgresql = "(position({1} IN {0}) > 0)"

    def __init__(self, column: sa.Column[bytes], part: bytes) -> None:
        super().__init__(column, sa.literal(part, sa.LargeBinary))


def read_clock(connection: sa.Connection) -> int:
    """Return what the database's clock says."""
    return int(connection.scalar(sa.select(now())) or 0)


def group_ids(changes: Iterable[tuple[Row, int]]) -> Iterator[tuple[Row, list[int]]]:
    """Group ids by the values that they get: mostly that is one group."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for values, id_ in changes:
        groups.setdefault(tuple(values.items()), []).append(id_)
    return ((dict(values), ids) for values, ids in groups.items())


def insert_into(table: sa.Table, dialect: str) -> Any:
    """Begin an INSERT that can say ON CONFLICT."""
    # Imported only when used: PostgreSQL's dialect takes long.
    return import_module(f"sqlalchemy.dialects.{dialect}").insert(table)


def put_row(connection: sa.Connection, table: sa.Table, row: Row) -> None:
    """Insert a row, or update the one with its primary key."""
    [key] = table.primary_key
    values = {name: value for name, value in row.items() if name != key.name}
    insert = insert_into(table, connection.dialect.name).values(row)
    connection.execute(insert.on_conflict_do_update(index_elements=[key], set_=values))


def inserted_values(table: sa.Table, columns: Sequence[str], dialect: str) -> Row:
    """Name the values of rows that `execute_rows` inserts: parameters, or columns of `unnest`."""
    if dialect == "postgresql":
        return dict(unnest(table, columns).c)
    return {name: sa.bindparam(name, type_=table.c[name].type) for name in columns}


def insert_values(table: sa.Table, values: Row, dialect: str) -> Any:
    """Insert such values."""
    insert = insert_into(table, dialect)
    if dialect == "postgresql":
        return insert.from_select(list(values), sa.select(*values.values()))
    return insert.values(values)


def execute_rows(connection: sa.Connection, statement: Any, rows: Sequence[Row]) -> Any:
    """Execute for all rows: at once on PostgreSQL, which gets an array for each column."""
    if connection.dialect.name != "postgresql":
        return connection.execute(statement, rows)
    arrays = {name: [row[name] for row in rows] for name in rows[0]}
    return connection.execute(statement, arrays)


def unnest(table: sa.Table, columns: Sequence[str]) -> sa.TableValuedAlias:
    """The rows that PostgreSQL gets as one array for each column."""
    arrays = [sa.bindparam(name, type_=_array(table.c[name].type)) for name in columns]
    return sa.func.unnest(*arrays).table_valued(*columns).render_derived()


def _array(item: sa.types.TypeEngine[Any]) -> sa.types.TypeEngine[Any]:
    array: sa.types.TypeEngine[Any] = import_module("sqlalchemy.dialects.postgresql").ARRAY(item)
    return array
