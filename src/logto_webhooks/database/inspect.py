"""Inspect a database: version, size, rights, what can be written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database import migrate
from logto_webhooks.database.dialect import now
from logto_webhooks.database.schema import metadata, records


class DeadRows(Struct, frozen=True):
    """A table's rows, and its dead ones: what updates and deletes left behind, until a vacuum."""

    table: str
    live: int
    dead: int


class DatabaseInfo(Struct, frozen=True, kw_only=True):
    """What a database says of itself, whose tables may be of another release.

    `settings` are a server's. `free` are bytes where its file is, None if that can't be seen;
    `unwritable` is why its file can't be written. `unsettled_s` is how long the first record has
    waited for Logto. `unvacuumed` are our tables that the server doesn't vacuum by itself.
    """

    place: str
    schema: str | None
    needed: str
    settings: dict[str, str] = {}
    free: int | None = None
    unwritable: str | None = None
    unsettled_s: float | None = None
    unvacuumed: list[DeadRows] = []


_SETTINGS: Final = sa.text(
    "SELECT name, setting FROM pg_settings WHERE name IN "
    "('fsync', 'full_page_writes', 'synchronous_commit', 'transaction_read_only')"
)
_UNVACUUMED: Final = sa.text(
    "SELECT stats.relname, stats.n_live_tup, stats.n_dead_tup FROM pg_stat_user_tables stats"
    " JOIN pg_class ON pg_class.oid = stats.relid"
    " LEFT JOIN pg_options_to_table(pg_class.reloptions) options"
    " ON options.option_name = 'autovacuum_enabled'"
    " WHERE stats.schemaname = coalesce(:schema, current_schema()) AND stats.relname = ANY(:tables)"
    " AND NOT (current_setting('autovacuum')::boolean"
    " AND coalesce(options.option_value::boolean, true))"
    " ORDER BY stats.relname"
)


def inspect_database(
    place: str, free: int | None = None, schema: str | None = None
) -> Callable[[sa.Connection], DatabaseInfo]:
    """Return what looks: `place` names the database, `free` bytes are where its file is."""
    return partial(_look, place, free, schema)


def _look(
    place: str, free: int | None, schema: str | None, connection: sa.Connection
) -> DatabaseInfo:
    found, needed = migrate.version(connection, schema), migrate.head()
    settings: dict[str, str] = {}
    unvacuumed: list[DeadRows] = []
    if connection.dialect.name == "postgresql":
        settings = {row.name: row.setting for row in connection.execute(_SETTINGS)}
        ours = {"schema": schema, "tables": sorted(metadata.tables)}
        unvacuumed = [DeadRows(*row) for row in connection.execute(_UNVACUUMED, ours)]
    return DatabaseInfo(
        place=place,
        schema=found,
        needed=needed,
        settings=settings,
        free=free,
        unsettled_s=_unsettled_s(connection) if found and found >= needed else None,
        unvacuumed=unvacuumed,
    )


def _unsettled_s(connection: sa.Connection) -> float | None:
    since = connection.scalar(sa.select(sa.func.min(records.c.refetch_since)))
    moment = connection.scalar(sa.select(now())) or 0
    return None if since is None else max(0, moment - since) / 1000
