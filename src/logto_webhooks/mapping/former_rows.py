"""Tell whether a row is still that of a record which it was unlinked from.

The application may have given such a row to somebody else, or deleted it, and another row may have
its primary key by now. Then the texts that the mapping keeps equal are others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa

from logto_webhooks.mapping.declare import EntityMapping, MappedKind, OwnValues
from logto_webhooks.mapping.primary_keys import may_be_reused
from logto_webhooks.mapping.sources import implementation_of

# What tells who or what a record is. Many users have the same name.
_TELLING: Final[dict[MappedKind, tuple[str, ...]]] = {
    "user": ("username", "email", "phone"),
    "organization": ("name",),
}


def find_texts(mapping: EntityMapping, values: OwnValues) -> dict[str, str | None]:
    """Return the values of the columns that a mapping keeps equal and that hold text; None for what
    a record lacks."""
    return {
        name: value
        for name, value in values.columns.items()
        if isinstance(value, str)
        or (value is None and isinstance(implementation_of(mapping.table.c[name].type), sa.String))
    }


def has_texts(row: sa.RowMapping, texts: Mapping[str, str | None]) -> bool:
    """Whether a row has these texts. A database may store letters in another case, and add
    spaces."""
    return all(_fold(row[name]) == _fold(text) for name, text in texts.items())


def is_told_by(texts: Mapping[str, str | None], kind: MappedKind, record: Any) -> bool:
    """Whether at least one of the texts tells who a record is: many can have the same status, for
    example."""
    telling = {_fold(getattr(record, name)) for name in _TELLING[kind]} - {""}
    return not telling.isdisjoint(map(_fold, texts.values()))


def may_be_another(mapping: EntityMapping, dialect: sa.Dialect) -> bool:
    """Whether another row may have the primary key of a deleted one: SQLite gives it to a new row,
    and people take a username that is free."""
    is_mapped = any(column.key in mapping.columns for column in mapping.primary_key)
    return is_mapped or may_be_reused(mapping.primary_key, dialect)


def _fold(text: Any) -> str:
    return "" if text is None else str(text).strip().casefold()
