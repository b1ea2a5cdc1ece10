"""The few expressions that differ per database, and what all statements share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from logto_webhooks import canonical_json

T = TypeVar("T")

_MOST_PARAMETERS = 1000  # of one IN (…)
NOW_ON_SQLITE = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class now(FunctionElement[int]):  # noqa: N801
    """The database's clock, in milliseconds since the epoch."""

    type = sa.BigInteger()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_on_sqlite(element: now, compiler: SQLCompiler, **options: Any) -> str:
    return NOW_ON_SQLITE


@compiles(now, "postgresql")
def _now_on_postgresql(element: now, compiler: SQLCompiler, **options: Any) -> str:
    # Not clock_timestamp(), with which no index serves.
    return "CAST(extract(epoch FROM statement_timestamp()) * 1000 AS BIGINT)"


class among(FunctionElement[Any]):  # noqa: N801
    """Whether a column is one of the values of the parameter `name`: one statement for any number.

    `IN (…)` is another statement for each number of values, to be prepared anew.
    """

    type = sa.types.NullType()  # a Boolean becomes `… = 1` on SQLite, which no index serves
    inherit_cache = True

    def __init__(self, column: sa.Column[Any], name: str) -> None:
        super().__init__(column, sa.bindparam(name, type_=_Values(column.type)))


@compiles(among, "sqlite")
def _among_on_sqlite(element: among, compiler: SQLCompiler, **options: Any) -> str:
    column, values = (compiler.process(each, **options) for each in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({values}))"


@compiles(among, "postgresql")
def _among_on_postgresql(element: among, compiler: SQLCompiler, **options: Any) -> str:
    column, values = (compiler.process(each, **options) for each in element.clauses)
    return f"{column} = ANY({values})"


class _Values(sa.types.TypeDecorator[Any]):
    """A list of numbers or texts: an array, or JSON where there are no arrays."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, item: sa.types.TypeEngine[Any]) -> None:
        super().__init__()
        self.item = item

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Choose by the database."""
        array = postgresql.ARRAY(self.item) if dialect.name == "postgresql" else sa.Text()
        return dialect.type_descriptor(array)

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        """Encode, where there are no arrays."""
        return value if dialect.name == "postgresql" else canonical_json.encode(value).decode()


class by_code(FunctionElement[str]):  # noqa: N801
    """A text as Python orders it, whatever the language of the database."""

    type = sa.Text()
    inherit_cache = True


@compiles(by_code, "sqlite")
def _by_code_on_sqlite(element: by_code, compiler: SQLCompiler, **options: Any) -> str:
    return compiler.process(element.clauses, **options)


@compiles(by_code, "postgresql")
def _by_code_on_postgresql(element: by_code, compiler: SQLCompiler, **options: Any) -> str:
    return f'{compiler.process(element.clauses, **options)} COLLATE "C"'


class holds(FunctionElement[bool]):  # noqa: N801
    """Whether the bytes of a column hold some others."""

    type = sa.Boolean()
    inherit_cache = True

    def __init__(self, column: sa.Column[bytes], part: bytes) -> None:
        super().__init__(column, sa.literal(part, sa.LargeBinary))


@compiles(holds, "sqlite")
def _holds_on_sqlite(element: holds, compiler: SQLCompiler, **options: Any) -> str:
    column, part = (compiler.process(each, **options) for each in element.clauses)
    return f"(instr({column}, {part}) > 0)"


@compiles(holds, "postgresql")
def _holds_on_postgresql(element: holds, compiler: SQLCompiler, **options: Any) -> str:
    column, part = (compiler.process(each, **options) for each in element.clauses)
    return f"(position({part} IN {column}) > 0)"


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Cut into pieces that fit into one statement."""
    for start in range(0, len(items), _MOST_PARAMETERS):
        yield items[start : start + _MOST_PARAMETERS]


def pairs(rows: Iterable[Any]) -> dict[Any, Any]:
    """Make a mapping of rows of two columns."""
    return {row[0]: row[1] for row in rows}
