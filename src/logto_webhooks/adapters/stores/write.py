"""Writing many rows of one table: one statement with arrays on PostgreSQL, row by row on SQLite.

There a row costs a message to the server and back, here nothing but the row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from logto_webhooks.adapters.stores.dialect import INSERT, now
from logto_webhooks.adapters.stores.schema import members, organizations, records, users

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
