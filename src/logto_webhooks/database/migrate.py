"""The schema and its version: Alembic inside the package, with a version table of its own.

It is imported only to migrate: to look at the version, each command would wait for it.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from logto_webhooks.database.schema import VERSION_TABLE
from logto_webhooks.errors import SchemaMismatch

if TYPE_CHECKING:
    from alembic.config import Config

_SCRIPTS = Path(__file__).parent / "migrations"
_LOCK = 0x6C6F67746F  # "logto": whoever migrates holds it until the transaction ends


def upgrade(connection: sa.Connection, schema: str | None = None) -> None:
    """Bring the schema up to this release, in the caller's transaction, with its own record.

    On PostgreSQL it waits for whoever is at it, and makes `schema` if there is none. The connection
    isn't kept: who forks, or begins another event loop, must not find it in the pool. Of an
    asynchronous engine the caller must close it: SQLAlchemy doesn't close what is detached there.
    """
    from alembic import command

    if not connection.dialect.is_async:
        connection.detach()
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    config = _config(schema)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def sql(dialect: str, schema: str | None = None) -> str:
    """Return the statements that make the schema, for `dialect` (as SQLAlchemy names it)."""
    from alembic import command

    written = io.StringIO()
    config = _config(schema, written)
    config.set_main_option("sqlalchemy.url", f"{dialect}://")
    command.upgrade(config, "head", sql=True)
    return written.getvalue()


def check(connection: sa.Connection, schema: str | None = None) -> None:
    """Raise SchemaMismatch if the schema is older than this release; a newer one is good."""
    found, needed = version(connection, schema), head()
    if found is None or found < needed:  # revisions are numbers of four digits
        raise SchemaMismatch(found, needed)


def version(connection: sa.Connection, schema: str | None = None) -> str | None:
    """Return the version of the schema that is there; None if there is none."""
    if not sa.inspect(connection).has_table(VERSION_TABLE, schema):
        return None
    table = sa.table(VERSION_TABLE, sa.column("version_num"), schema=schema)
    return connection.scalar(sa.select(table.c.version_num))


@functools.cache
def head() -> str:
    """Return the version of the schema that this release needs."""
    return max(each.name[:4] for each in (_SCRIPTS / "versions").glob("[0-9]*.py"))


def _config(schema: str | None, output: io.StringIO | None = None) -> Config:
    from alembic.config import Config

    config = Config(output_buffer=output) if output else Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["schema"] = schema
    return config
