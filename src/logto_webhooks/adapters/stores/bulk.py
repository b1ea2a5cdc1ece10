"""Inserting a batch of deliveries in one go: what accepting is fast or slow with.

A driver that takes rows one by one gives up Python's lock for each, and has to win it back from
the event loop; so each database gets the whole batch in one statement.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from logto_webhooks.adapters.stores.dialect import NOW_ON_SQLITE, now, pairs
from logto_webhooks.adapters.stores.schema import deliveries
from logto_webhooks.adapters.stores.write import Row, arrays, given

LOCK_MS = 500
_MOST_ROWS = 64


def insert_new(connection: sa.Connection, rows: Sequence[Row]) -> dict[bytes, int]:
    """Insert the rows whose digest is new, due at once; return their ids by digest.

    All rows have the same keys.
    """
    insert = _sqlite if connection.dialect.name == "sqlite" else _postgres
    return insert(connection, rows)


def _sqlite(connection: sa.Connection, rows: Sequence[Row]) -> dict[bytes, int]:
    before = connection.scalar(sa.select(sa.func.max(deliveries.c.id))) or 0
    inserted = last = 0
    for some in _pieces(rows):
        values = tuple(value for row in some for value in row.values())
        done = connection.exec_driver_sql(_statement(tuple(rows[0]), len(some)), values)
        inserted, last = inserted + done.rowcount, done.lastrowid or 0
    if inserted == len(rows):  # the only writer: ids are given in order, without a gap
        ids = range(last - inserted + 1, last + 1)
        return dict(zip((row["digest"] for row in rows), ids, strict=True))
    new = sa.select(deliveries.c.digest, deliveries.c.id).where(deliveries.c.id > before)
    return pairs(connection.execute(new))


def _pieces(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Cut into powers of two, so that there are few statements to prepare."""
    start = 0
    while start < len(rows):
        size = min(_MOST_ROWS, 1 << (len(rows) - start).bit_length() - 1)
        yield rows[start : start + size]
        start += size


@functools.cache
def _statement(columns: tuple[str, ...], rows: int) -> str:
    row = f"({', '.join('?' * len(columns))}, {NOW_ON_SQLITE})"
    return (
        f"INSERT INTO {deliveries.name} ({', '.join(columns)}, due_at) "
        f"VALUES {', '.join([row] * rows)} ON CONFLICT (digest) DO NOTHING"
    )


def _postgres(connection: sa.Connection, rows: Sequence[Row]) -> dict[bytes, int]:
    alone = bool(connection.get_execution_options().get("logto_accepts"))
    return pairs(connection.execute(_from_arrays(tuple(rows[0]), alone), arrays(rows)))


@functools.cache
def _from_arrays(columns: tuple[str, ...], alone: bool) -> sa.Executable:
    """The statement; `alone` in its transaction, it sets how long it may wait for one that
    has inserted the same digest, and neither commits nor ends."""
    selected = sa.select(*given(deliveries, columns).c, now())
    if alone:
        limit = sa.func.set_config("lock_timeout", f"{LOCK_MS}ms", sa.true())
        selected = selected.where(sa.select(limit).scalar_subquery().is_not(None))
    return (
        postgresql.insert(deliveries)
        .from_select([*columns, "due_at"], selected)
        .on_conflict_do_nothing(index_elements=["digest"])
        .returning(deliveries.c.digest, deliveries.c.id)
    )
