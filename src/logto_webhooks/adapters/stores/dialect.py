"""The few statements that differ per database, and what all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

T = TypeVar("T")

_MOST_PARAMETERS = 1000  # of one IN (…)
INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
CLOCK: dict[str, sa.TextClause] = {
    "sqlite": sa.text("CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"),
    "postgresql": sa.text("CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"),
}


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Cut into pieces that fit into one statement."""
    for start in range(0, len(items), _MOST_PARAMETERS):
        yield items[start : start + _MOST_PARAMETERS]


def pairs(rows: Iterable[Any]) -> dict[Any, Any]:
    """Make a mapping of rows of two columns."""
    return {row[0]: row[1] for row in rows}
