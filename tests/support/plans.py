"""How a database runs our statements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from logto_webhooks.database.store import Store

Ran = list[tuple[str, Any]]  # statements and their parameters


@contextmanager
def noting(connection: sa.Connection) -> Iterator[Ran]:
    """Note what is run on a connection."""
    ran = Ran()

    def note(_: Any, __: Any, statement: str, parameters: Any, *more: Any) -> None:
        ran.append((statement, parameters))

    sa.event.listen(connection, "before_cursor_execute", note)
    try:
        yield ran
    finally:
        sa.event.remove(connection, "before_cursor_execute", note)


def explain(store: Store, work: Callable[[Store], object]) -> list[str]:
    """The plan of each statement of some work. Where tables are small, as if they were large."""
    connection = store.connection
    with noting(connection) as ran:
        work(store)
    words = "EXPLAIN QUERY PLAN"
    if connection.dialect.name == "postgresql":
        words = "EXPLAIN"
        # Statistics of few rows, which may be there or not, would make it read and sort them.
        for way in ("seqscan", "bitmapscan", "sort"):
            connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")
    plans = [connection.exec_driver_sql(f"{words} {query}", values) for query, values in ran]
    return ["\n".join(str(row) for row in plan) for plan in plans]
