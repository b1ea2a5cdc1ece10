"""The schema and its version: Alembic inside the package, with a version table of its own."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from logto_webhooks.adapters.stores.schema import VERSION_TABLE
from logto_webhooks.errors import SchemaMismatch

_SCRIPTS = Path(__file__).parent / "migrations"
_LOCK = 0x6C6F67746F  # "logto": whoever migrates holds it until the transaction ends


def upgrade(connection: sa.Connection, schema: str | None = None) -> None:
    """Bring the schema up to this release, in the caller's transaction, with its own record.

    On PostgreSQL it waits for whoever is at it, and makes `schema` if there is none. The connection
    isn't kept: who forks, or begins another event loop, must not find it in the pool.
    """
    connection.detach()
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    config = _config(schema)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def sql(dialect: str, schema: str | None = None) -> str:
    """Return the statements that make the schema, for `dialect` (as SQLAlchemy names it)."""
    written = io.StringIO()
    config = _config(schema, written)
    config.set_main_option("sqlalchemy.url", f"{dialect}://")
    command.upgrade(config, "head", sql=True)
    return written.getvalue()


def check(connection: sa.Connection, schema: str | None = None) -> None:
    """Raise SchemaMismatch if the schema is older than this release; a newer one is good."""
    found, needed = version(connection, schema), head()
    if found is None or found < needed:  # revisions are numbers of four digits
        raise SchemaMismatch(found=found or "nothing", needed=needed)


def version(connection: sa.Connection, schema: str | None = None) -> str | None:
    """Return the version of the schema that is there; None if there is none."""
    options = {"version_table": VERSION_TABLE, "version_table_schema": schema}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


@functools.cache
def head() -> str:
    """Return the version of the schema that this release needs."""
    return ScriptDirectory.from_config(_config(None)).get_current_head() or "nothing"


def _config(schema: str | None, output: io.StringIO | None = None) -> Config:
    config = Config(output_buffer=output) if output else Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["schema"] = schema
    return config
