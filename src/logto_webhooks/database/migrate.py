"""The schema's version, its migration, and information on a database.

Alembic, which has its own version table here, is slow to import, so only migrating imports it.
"""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.dialect import read_clock
from logto_webhooks.database.errors import place_of
from logto_webhooks.database.schema import (
    VERSION_TABLE,
    deliveries,
    jobs,
    metadata,
    queue_keys,
    records,
    rejected,
)
from logto_webhooks.errors import SchemaMismatch, SchemaUnknown, SettingInvalid

if TYPE_CHECKING:
    from alembic.config import Config

_SCRIPTS = Path(__file__).parent / "migrations"
_LOCK = 0x6C6F67746F  # "logto": an advisory lock, held while migrating


class Migrated(Struct, frozen=True):
    """The version of the tables after a migration, and whether the schema was created."""

    version: str
    new_schema: bool

    @property
    def is_newer(self) -> bool:
        """Whether a newer release has migrated the tables before, so that they were left alone."""
        return self.version > head()


def upgrade(connection: sa.Connection, schema: str | None = None) -> Migrated:
    """Migrate the tables to this release, in the caller's transaction. Leave those of a newer
    release alone, because this one runs on them.

    On PostgreSQL, wait for others that migrate them, and create `schema` if it doesn't exist. The
    connection is detached, because a forked process or another event loop must not get it from the
    pool. The caller must close that of an asynchronous engine, because SQLAlchemy doesn't.

    Raises SettingInvalid for a database that isn't in UTF-8, SchemaUnknown.
    """
    if not connection.dialect.is_async:
        connection.detach()
    if connection.dialect.name == "postgresql":
        _check_encoding(connection)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    is_new = schema is not None and not sa.inspect(connection).has_schema(schema)
    there = version(connection, schema)
    if there is None or there in _versions():
        _run_migrations(connection, schema)
        there = head()
    elif not is_usable(there):
        raise SchemaUnknown(_describe_place(connection, schema), there, head())
    if connection.dialect.name == "postgresql":
        _advance_sequences(connection, schema)
    return Migrated(there, is_new)


def _run_migrations(connection: sa.Connection, schema: str | None) -> None:
    from alembic import command

    config = _config(schema)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _advance_sequences(connection: sa.Connection, schema: str | None) -> None:
    """Let sequences go on after the greatest id: logical replication copies rows without them."""
    quote = connection.dialect.identifier_preparer.quote
    for table in (deliveries, jobs, queue_keys, rejected):
        name = ".".join(quote(part) for part in (schema, table.name) if part)
        connection.execute(sa.text(_ADVANCE.format(name)), {"name": name})


_ADVANCE: Final = """
    SELECT setval(sequence, max(id))
    FROM {}, (SELECT CAST(pg_get_serial_sequence(:name, 'id') AS regclass)) AS own (sequence)
    GROUP BY sequence HAVING max(id) > coalesce(pg_sequence_last_value(sequence), 0)
"""


def _check_encoding(connection: sa.Connection) -> None:
    """Raise SettingInvalid for a database that can't store every character."""
    encoding = connection.scalar(sa.select(sa.func.current_setting("server_encoding")))
    if encoding not in ("UTF8", "SQL_ASCII"):
        problem = (
            f"the encoding of the database {connection.engine.url.database} is {encoding}, which "
            "can't store every name: create a database with ENCODING 'UTF8' TEMPLATE template0"
        )
        raise SettingInvalid(name="the database", problem=problem)


def sql(dialect: str, schema: str | None = None) -> str:
    """Return the SQL that creates the schema, for SQLAlchemy's `dialect` of that name."""
    from alembic import command

    written = io.StringIO()
    config = _config(schema, written)
    config.set_main_option("sqlalchemy.url", f"{dialect}://")
    command.upgrade(config, "head", sql=True)
    return written.getvalue()


def check(connection: sa.Connection, schema: str | None = None) -> None:
    """Raise SchemaMismatch if the tables are older than this release. Newer ones are usable."""
    there = version(connection, schema)
    if is_usable(there):
        return
    is_older = there is None or is_number(there)
    mismatch = SchemaMismatch if is_older else SchemaUnknown
    raise mismatch(_describe_place(connection, schema), there, head())


def is_usable(version: str | None) -> bool:
    """Whether this release can use tables of a version: its own, or that of a newer release."""
    return version is not None and is_number(version) and version >= head()


def is_number(version: str) -> bool:
    """Whether a version can be that of a release. They have four digits."""
    return re.fullmatch("[0-9]{4}", version) is not None


def _describe_place(connection: sa.Connection, schema: str | None) -> str:
    place = place_of(connection.engine.url)
    if connection.dialect.name != "postgresql":
        return place
    if schema:
        return f"{place}, schema {schema} (LOGTO_WEBHOOKS_SCHEMA),"
    return f"{place}, default schema (LOGTO_WEBHOOKS_SCHEMA isn't set),"


def version(connection: sa.Connection, schema: str | None = None) -> str | None:
    """Return the version of the existing schema; None if there is none."""
    if not sa.inspect(connection).has_table(VERSION_TABLE, schema):
        return None
    table = sa.table(VERSION_TABLE, sa.column("version_num"), schema=schema)
    return connection.scalar(sa.select(table.c.version_num))


def head() -> str:
    """Return the version of the schema that this release needs."""
    return max(_versions())


@functools.cache
def _versions() -> frozenset[str]:
    """Return the versions of the schema from which this release can migrate, and its own."""
    return frozenset(script.name[:4] for script in (_SCRIPTS / "versions").glob("[0-9]*.py"))


def _config(schema: str | None, output: io.StringIO | None = None) -> Config:
    from alembic.config import Config

    config = Config(output_buffer=output) if output else Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["schema"] = schema
    return config


class DeadRows(Struct, frozen=True):
    """How many rows a table has, and how many dead ones, which updates and deletes leave until a
    vacuum."""

    table: str
    live: int
    dead: int


class DatabaseInfo(Struct, frozen=True, kw_only=True):
    """Information on a database, whose tables may be from another release.

    `settings` are a server's. `free` are the free bytes where its file is, None if unknown, and
    `unwritable` is why the file can't be written. `unsettled_s` is how long the first record has
    waited for a fetch from Logto. `unvacuumed` are our tables without autovacuum; None without a
    server.
    """

    place: str
    schema: str | None
    needed: str
    settings: dict[str, str] = {}
    free: int | None = None
    unwritable: str | None = None
    unsettled_s: float | None = None
    unvacuumed: list[DeadRows] | None = None


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
    connection: sa.Connection, place: str, free: int | None = None, schema: str | None = None
) -> DatabaseInfo:
    """Read the information on a database. `place` and `free` are fields of the result."""
    there = version(connection, schema)
    settings: dict[str, str] = {}
    unvacuumed: list[DeadRows] | None = None
    if connection.dialect.name == "postgresql":
        settings = {row.name: row.setting for row in connection.execute(_SETTINGS)}
        ours = {"schema": schema, "tables": sorted(metadata.tables)}
        unvacuumed = [DeadRows(*row) for row in connection.execute(_UNVACUUMED, ours)]
    return DatabaseInfo(
        place=place,
        schema=there,
        needed=head(),
        settings=settings,
        free=free,
        unsettled_s=_unsettled_s(connection) if is_usable(there) else None,
        unvacuumed=unvacuumed,
    )


def _unsettled_s(connection: sa.Connection) -> float | None:
    since = connection.scalar(sa.select(sa.func.min(records.c.refetch_since)))
    return None if since is None else max(0, read_clock(connection) - since) / 1000
