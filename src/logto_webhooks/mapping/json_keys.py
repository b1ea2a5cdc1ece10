"""A key inside a JSON document of the application's: only the key changes.

The database changes it. Python would read and write the whole document, and round its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa

_EMPTY: Final = "{}"


def change_document(
    document: Mapping[str, Any] | None, path: Sequence[str], key: str | None
) -> dict[str, Any]:
    """Return a document as it is once the key at a path is set, or removed if it is None."""
    changed = dict(document or {})
    inner = changed
    for name in path[:-1]:
        inner[name] = dict(inner.get(name) or {})
        inner = inner[name]
    if key is None:
        inner.pop(path[-1], None)
    else:
        inner[path[-1]] = key
    return changed


def find_key(document: Any, path: Sequence[str]) -> Any:
    """Return what is at a path of a document, or None."""
    for name in path:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def make_change(
    column: sa.Column[Any], path: Sequence[str], parameter: str, dialect: sa.Dialect
) -> sa.ColumnElement[Any]:
    """Make the expression that does the same to a column: the key is a parameter, which can be null
    to remove it. Along the path, there are only objects, or nothing."""
    key = sa.bindparam(parameter, type_=sa.Text())
    if dialect.name == "sqlite":
        patch: sa.ColumnElement[Any] = key
        for name in reversed(path):
            patch = sa.func.json_object(name, patch)
        # A merge patch: it changes what it names, and removes what it names null.
        text = sa.type_coerce(column, sa.Text())
        return sa.func.json_patch(sa.func.coalesce(text, _EMPTY), patch)
    from sqlalchemy.dialects.postgresql import ARRAY, JSONB  # slow to import

    document = sa.cast(column, JSONB)
    removed = document.op("#-", return_type=JSONB())(sa.cast(list(path), ARRAY(sa.Text())))
    changed = _set_key(document, path, key)
    return sa.cast(sa.case((key.is_(None), removed), else_=changed), column.type)


def _set_key(
    document: sa.ColumnElement[Any], path: Sequence[str], key: sa.ColumnElement[Any]
) -> sa.ColumnElement[Any]:
    from sqlalchemy.dialects.postgresql import JSONB

    name, *rest = path
    literal = sa.literal(name, sa.Text())
    inner = document.op("->", return_type=JSONB())(literal)
    value = _set_key(inner, rest, key) if rest else key
    is_object = sa.func.jsonb_typeof(document) == "object"
    known = sa.case((is_object, document), else_=sa.cast(sa.text("'{}'"), JSONB))
    return known.op("||", return_type=JSONB())(sa.func.jsonb_build_object(literal, value))
