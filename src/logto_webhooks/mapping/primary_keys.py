"""Conditions for the application's rows, by their primary keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa

from logto_webhooks.mapping.sources import implementation_of

AT_ONCE: Final = (
    500  # keys of one condition: SQLite refuses very many, PostgreSQL plans for seconds
)


def make_conditions(
    columns: Sequence[sa.ColumnElement[Any]], keys: Iterable[Sequence[Any]]
) -> Iterator[sa.ColumnElement[bool]]:
    """Make conditions for the rows with these primary keys, each for some of them."""
    wanted = [tuple(key) for key in keys]
    for start in range(0, len(wanted), AT_ONCE):
        some = wanted[start : start + AT_ONCE]
        if len(columns) == 1:
            yield columns[0].in_([value for (value,) in some])
        else:
            yield sa.tuple_(*columns).in_(some)


def may_be_reused(columns: Sequence[sa.Column[Any]], dialect: sa.Dialect) -> bool:
    """Whether the database may give the primary key of a deleted row to a new one, as SQLite does
    with the greatest one."""
    is_generated = len(columns) == 1 and isinstance(implementation_of(columns[0].type), sa.Integer)
    return dialect.name == "sqlite" and is_generated


def describe_null(columns: Iterable[sa.Column[Any]]) -> str:
    """Say what is wrong with a row whose primary key has a NULL, as SQLite allows."""
    names = ", ".join(column.name for column in columns)
    return (
        f"the primary key of its row is NULL, so the row can't be found again: fill {names}, or "
        "let the database generate it, which SQLite only does for INTEGER PRIMARY KEY"
    )


def describe_unknown(key: Iterable[Any], columns: Iterable[sa.Column[Any]]) -> str:
    """Say what is wrong with a primary key whose type gives back objects of its own."""
    kinds = ", ".join(type(value).__name__ for value in key)
    names = ", ".join(column.name for column in columns)
    return (
        f"the primary key of its row is made of objects ({kinds}) that the type of {names} doesn't "
        "take as text: let str(object) be what the type accepts"
    )


def describe_several(what: str) -> str:
    """Say what is wrong if several rows have what tells whose row it is."""
    return (
        f"several rows have its {what}, so none is changed or deleted: keep one of them, and add a "
        "unique index"
    )
