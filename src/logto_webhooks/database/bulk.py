"""Write many rows with one statement."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from logto_webhooks.database.dialect import INSERT, NOW_ON_SQLITE, now, pairs
from logto_webhooks.database.schema import deliveries, members, organizations, records, users

Row = dict[str, Any]
MIRROR = {"user": users, "organization": organizations, "membership": members}
_TABLES = {table.name: table for table in (records, *MIRROR.values())}
_KEYS = {
    records.name: ["kind", "logto_id"],
    users.name: ["logto_user_id"],
    organizations.name: ["logto_organization_id"],
    members.name: ["logto_organization_id", "logto_user_id"],
}
_NEVER_CHANGED = {"id", "local_id"}


def insert(connection: sa.Connection, table: sa.Table, rows: Sequence[Row]) -> None:
    """Insert the rows that aren't there, in their order. All have the same columns."""
    if rows:
        statement = _insert(connection.dialect.name, table.name, tuple(rows[0]))
        _run(connection, statement.on_conflict_do_nothing(), rows)


def upsert(connection: sa.Connection, table: sa.Table, rows: Sequence[Row]) -> None:
    """Insert or update rows; a local id is never changed. All have the same columns."""
    if rows:
        _run(connection, _upsert(connection.dialect.name, table.name, tuple(rows[0])), rows)


def given(table: sa.Table, columns: Sequence[str]) -> sa.TableValuedAlias:
    """The rows that PostgreSQL gets as one array for each column."""
    types = {name: postgresql.ARRAY(table.c[name].type) for name in columns}
    arrays = [sa.bindparam(name, type_=types[name]) for name in columns]
    return sa.func.unnest(*arrays).table_valued(*columns).render_derived()


def arrays(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Turn rows into a list for each column."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def _run(connection: sa.Connection, statement: Any, rows: Sequence[Row]) -> None:
    at_once = connection.dialect.name == "postgresql"
    connection.execute(statement, arrays(rows) if at_once else rows)


@functools.cache
def _insert(dialect: str, name: str, columns: tuple[str, ...]) -> Any:
    table = _TABLES[name]
    at_once = given(table, columns) if dialect == "postgresql" else None
    values: dict[str, Any] = {
        column: sa.bindparam(column, type_=table.c[column].type)
        if at_once is None
        else at_once.c[column]
        for column in columns
    }
    if name == records.name:
        values["refetch_since"] = sa.case((values["waiting_reason"].is_not(None), now()))
    statement = INSERT[dialect](table)
    if at_once is None:
        return statement.values(values)
    return statement.from_select(list(values), sa.select(*values.values()))


@functools.cache
def _upsert(dialect: str, name: str, columns: tuple[str, ...]) -> Any:
    statement = _insert(dialect, name, columns)
    new = statement.excluded
    kept = {*_KEYS[name], *_NEVER_CHANGED}
    changed: dict[str, Any] = {column: new[column] for column in columns if column not in kept}
    if name == records.name:  # since when it waits stays, as long as it waits
        since = sa.func.coalesce(records.c.refetch_since, new.refetch_since)
        changed["refetch_since"] = sa.case((new.waiting_reason.is_not(None), since), else_=None)
    return statement.on_conflict_do_update(index_elements=_KEYS[name], set_=changed)


LOCK_MS = 500
_MOST_ROWS = 64


def insert_deliveries(connection: sa.Connection, rows: Sequence[Row]) -> dict[bytes, int]:
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
    has inserted the same digest, and neither commits nor ends; and that its commit waits for the
    disk, whatever is set for the role."""
    selected = sa.select(*given(deliveries, columns).c, now())
    if alone:
        limit = sa.func.set_config("lock_timeout", f"{LOCK_MS}ms", sa.true())
        mode = sa.func.current_setting("synchronous_commit")
        durable = sa.case((mode == "off", "on"), else_=mode)  # remote_apply promises more than on
        commit = sa.func.set_config("synchronous_commit", durable, sa.true())
        settings = sa.select(limit.concat(commit)).scalar_subquery()
        selected = selected.where(settings.is_not(None))
    return (
        postgresql.insert(deliveries)
        .from_select([*columns, "due_at"], selected)
        .on_conflict_do_nothing(index_elements=["digest"])
        .returning(deliveries.c.digest, deliveries.c.id)
    )
