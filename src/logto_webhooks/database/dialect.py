"""SQL that differs by database, and statements that write many rows at once."""

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


class _DialectFunction(FunctionElement[Any]):
    """A function whose SQL is a template for each dialect."""

    sqlite: ClassVar[str]
    postgresql: ClassVar[str]


@compiles(_DialectFunction)
def _compile(element: _DialectFunction, compiler: SQLCompiler, **options: Any) -> str:
    template: str = getattr(element, compiler.dialect.name)
    return template.format(*(compiler.process(clause, **options) for clause in element.clauses))


class now(_DialectFunction):  # noqa: N801
    """The database's clock, in milliseconds since the epoch."""

    type = sa.BigInteger()
    inherit_cache = True
    sqlite = NOW_ON_SQLITE
    # Not clock_timestamp(): it is volatile, so no index can be used.
    postgresql = "CAST(extract(epoch FROM statement_timestamp()) * 1000 AS BIGINT)"


class among(_DialectFunction):  # noqa: N801
    """Whether a column is one of the values of the parameter `name`.

    This is one statement for any number of values. `IN (…)` has to be prepared for each number.
    """

    type = sa.types.NullType()  # a Boolean becomes `… = 1` on SQLite, which uses no index
    inherit_cache = True
    sqlite = "{} IN (SELECT value FROM json_each({}))"
    postgresql = "{} = ANY({})"

    def __init__(self, column: sa.ColumnElement[Any], name: str) -> None:
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


class among_pairs(_DialectFunction):  # noqa: N801
    """Whether two columns are one of the pairs of texts of the parameter `name`."""

    type = sa.types.NullType()  # see `among`
    inherit_cache = True
    sqlite = (
        "({}, {}) IN (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') "
        "FROM json_each({}))"
    )
    postgresql = (
        "({}, {}) IN (SELECT pair ->> 0, pair ->> 1 "
        "FROM json_array_elements(CAST({} AS json)) AS pair)"
    )

    def __init__(
        self, first: sa.ColumnElement[Any], second: sa.ColumnElement[Any], name: str
    ) -> None:
        super().__init__(first, second, sa.bindparam(name, type_=_Pairs()))


class _Pairs(sa.types.TypeDecorator[Any]):
    """A list of pairs, as JSON."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str:
        """Encode."""
        return canonical_json.encode(value).decode()


class by_code(_DialectFunction):  # noqa: N801
    """A text that sorts by code point, as in Python, whatever the database's collation."""

    type = sa.Text()
    inherit_cache = True
    sqlite = "{}"
    postgresql = '{} COLLATE "C"'


class folded(_DialectFunction):  # noqa: N801
    """A text to compare with a lowercase one."""

    type = sa.Text()
    inherit_cache = True
    # Not lower(): an application may replace it, and an index of it would break.
    sqlite = "{} COLLATE NOCASE"
    postgresql = "lower({})"


class contains(_DialectFunction):  # noqa: N801
    """Whether the bytes of a column contain some others."""

    type = sa.Boolean()
    inherit_cache = True
    sqlite = "(instr({0}, {1}) > 0)"
    postgresql = "(position({1} IN {0}) > 0)"

    def __init__(self, column: sa.Column[bytes], part: bytes) -> None:
        super().__init__(column, sa.literal(part, sa.LargeBinary))


class greatest(_DialectFunction):  # noqa: N801
    """The greatest of several values that aren't NULL."""

    type = sa.BigInteger()
    inherit_cache = True
    sqlite = "max({}, {})"
    postgresql = "greatest({}, {})"


def read_clock(connection: sa.Connection) -> int:
    """Return the time of the database's clock (ms)."""
    return int(connection.scalar(sa.select(now())) or 0)


def group_ids(changes: Iterable[tuple[Row, int]]) -> Iterator[tuple[Row, list[int]]]:
    """Group ids by the values that they get. Mostly, there is one group."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for values, id_ in changes:
        groups.setdefault(tuple(values.items()), []).append(id_)
    return ((dict(values), ids) for values, ids in groups.items())


def insert_into(table: sa.Table, dialect: str) -> Any:
    """Return an INSERT that supports ON CONFLICT."""
    # Imported on use: PostgreSQL's dialect is slow to import.
    return import_module(f"sqlalchemy.dialects.{dialect}").insert(table)


def put_row(connection: sa.Connection, table: sa.Table, row: Row) -> None:
    """Insert a row, or update the one with its primary key."""
    [key] = table.primary_key
    values = {name: value for name, value in row.items() if name != key.name}
    insert = insert_into(table, connection.dialect.name).values(row)
    connection.execute(insert.on_conflict_do_update(index_elements=[key], set_=values))


def put_rows(connection: sa.Connection, table: sa.Table, rows: Sequence[Row]) -> None:
    """The same for many rows with the same columns, in one statement."""
    if not rows:
        return
    [key] = table.primary_key
    columns, dialect = tuple(rows[0]), connection.dialect.name
    insert = insert_values(table, inserted_values(table, columns, dialect), dialect)
    changes = {name: insert.excluded[name] for name in columns if name != key.name}
    put = insert.on_conflict_do_update(index_elements=[key], set_=changes)
    # In one order, because transactions that lock rows in different orders can deadlock.
    execute_rows(connection, put, sorted(rows, key=lambda row: str(row[key.name])))


def inserted_values(table: sa.Table, columns: Sequence[str], dialect: str) -> Row:
    """Return the values of the rows of `execute_rows`, as parameters or columns of `unnest`."""
    if dialect == "postgresql":
        return dict(unnest(table, columns).c)
    return {name: sa.bindparam(name, type_=table.c[name].type) for name in columns}


def insert_values(table: sa.Table, values: Row, dialect: str) -> Any:
    """Return an INSERT of such values."""
    insert = insert_into(table, dialect)
    if dialect == "postgresql":
        return insert.from_select(list(values), sa.select(*values.values()))
    return insert.values(values)


def execute_rows(connection: sa.Connection, statement: Any, rows: Sequence[Row]) -> Any:
    """Execute a statement for all rows. PostgreSQL gets them at once, as an array per column."""
    if connection.dialect.name != "postgresql":
        return connection.execute(statement, rows)
    arrays = {name: [row[name] for row in rows] for name in rows[0]}
    return connection.execute(statement, arrays)


def unnest(table: sa.Table, columns: Sequence[str]) -> sa.TableValuedAlias:
    """Return the rows that PostgreSQL gets as one array for each column."""
    arrays = [sa.bindparam(name, type_=_array(table.c[name].type)) for name in columns]
    return sa.func.unnest(*arrays).table_valued(*columns).render_derived()


def _array(item: sa.types.TypeEngine[Any]) -> sa.types.TypeEngine[Any]:
    array: sa.types.TypeEngine[Any] = import_module("sqlalchemy.dialects.postgresql").ARRAY(item)
    return array
