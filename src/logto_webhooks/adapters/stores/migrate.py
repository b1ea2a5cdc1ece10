"""The schema and its version: Alembic inside the package, with a version table of its own."""

from __future__ import annotations

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


def upgrade(engine: sa.Engine) -> None:
    """Bring the schema up to this release; each migration commits with its own record."""
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def sql(dialect: str) -> str:
    """Return the statements that make the schema, for `dialect` (as SQLAlchemy names it)."""
    written = io.StringIO()
    config = _config(written)
    config.set_main_option("sqlalchemy.url", f"{dialect}://")
    command.upgrade(config, "head", sql=True)
    return written.getvalue()


def check(connection: sa.Connection) -> None:
    """Raise SchemaMismatch unless the schema is the one that this release needs."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    found = context.get_current_revision() or "nothing"
    needed = head()
    if found != needed:
        raise SchemaMismatch(found=found, needed=needed)


def head() -> str:
    """Return the version of the schema that this release needs."""
    return ScriptDirectory.from_config(_config()).get_current_head() or "nothing"


def _config(output: io.StringIO | None = None) -> Config:
    config = Config(output_buffer=output) if output else Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    return config
