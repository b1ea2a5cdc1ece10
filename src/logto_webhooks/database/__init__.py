"""Open a database from a URL or an engine.

`schema.py` defines the tables, and `store.py` the operations of a transaction. `runner.py` and
`async_runner.py` run transactions on the databases of `sqlite.py` and `postgres.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, Union

import sqlalchemy as sa

from logto_webhooks.database.sqlite import SqliteFile
from logto_webhooks.deliveries import Status
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from logto_webhooks.database.postgres import Postgres

Engine = Union[sa.Engine, "AsyncEngine"]
Database = Union[SqliteFile, "Postgres"]  # opened on first use
# The arguments' names, for callers without settings.
_ARGUMENT: Final = "database_url"
_SCHEMA: Final = "schema"
_USE: Final = "sqlite:///file.db or postgresql://user:password@host/name"
_DRIVERS: Final = ("asyncpg", "psycopg", "greenlet")  # installed by an extra
# Backends that an error may name. Any other text may be part of a password.
_OTHER_BACKENDS: Final = re.compile("mysql|mariadb|mssql|oracle|mongodb|redis|cockroachdb|https?")


def open_database(
    url: str, schema: str | None = None, name: str = _ARGUMENT, schema_name: str = _SCHEMA
) -> Database:
    """Return the database for a URL from the setting `name`, and a schema from the setting
    `schema_name`. Raises SettingInvalid.

    No error quotes the URL, or a part of it that may be a password.
    """
    url = url.strip()
    scheme, separator, _ = url.partition(":")
    backend = scheme.partition("+")[0].lower()
    if separator and backend in ("postgresql", "postgres"):
        return _open_postgres(url, schema, name)
    if separator and backend == "sqlite":
        try:
            path = _to_path(sa.make_url(url), name)
        except (sa.exc.ArgumentError, ValueError):
            pass
        else:
            _refuse_schema(schema, schema_name, f"Set {name} to the URL of a PostgreSQL database")
            return SqliteFile(path, name)
    problem = f"it isn't a URL; use {_USE}"
    if url[:1] in ("'", '"'):
        problem = "it starts with a quote; remove the quotes"
    elif separator and _OTHER_BACKENDS.fullmatch(backend):
        problem = (
            f"it must be a URL of a SQLite file or a PostgreSQL server, not {backend}; use {_USE}"
        )
    raise SettingInvalid(name=name, problem=problem)


def database_for(settings: Settings) -> Database:
    """Return the database of the settings. Raises SettingInvalid."""
    name = settings.name_of("database_url")
    return open_database(settings.database_url, settings.schema, name, settings.name_of("schema"))


def for_another_loop(database: Database, settings: Settings) -> Database:
    """Return the same database for another event loop: two loops can't share a connection."""
    return database if database.any_loop else database_for(settings)


async def read_status(database: Database) -> Status:
    """Check the database and count its contents. Raises what `check` raises."""
    await database.check()
    return await database.host.read_long(lambda store: store.status())


def _refuse_schema(schema: str | None, name: str, remedy: str) -> None:
    """Refuse a schema for SQLite, because the URL of a PostgreSQL server is probably missing."""
    if schema is not None:
        problem = f"the database is a SQLite file, which has no schemas. {remedy}, or remove {name}"
        raise SettingInvalid(name=name, problem=problem)


def _open_postgres(url: str, schema: str | None, name: str) -> Database:
    # Imported on use: the driver and greenlet come with an extra.
    try:
        from logto_webhooks.database.postgres import Postgres

        return Postgres.at(url, schema, name)
    except ImportError as error:
        raise SettingInvalid(name=name, problem=_describe_import_error(url, error)) from None


def _describe_import_error(url: str, error: ImportError) -> str:
    """Say which package is missing, or else that packages don't fit together."""
    text = str(error)
    missing = error.name
    if missing is None:  # only the text names these two
        missing = next((name for name in ("greenlet", "libpq") if name in text), None)
    elif not isinstance(error, ModuleNotFoundError) or missing not in _DRIVERS:
        missing = None
    scheme = url.partition(":")[0].split("+")
    extra = "psycopg" if "psycopg" in (*scheme, missing) else "postgres"
    if missing:
        driver = '"psycopg[binary]"' if extra == "psycopg" else "asyncpg"
        needed = f'the extra "{extra}" of this package ({missing} is missing)'
        return f"PostgreSQL needs {needed}; install it, or run: pip install {driver} greenlet"
    first_line = next(iter(text.splitlines()), type(error).__name__)
    again = f'install this package again, with its extra "{extra}", and restart'
    return f"the PostgreSQL driver can't be imported ({first_line}); {again}"


def _to_path(url: sa.URL, name: str) -> Path:
    if url.host:
        problem = "a path begins after three slashes: sqlite:///name.db"
        raise SettingInvalid(name=name, problem=problem)
    if not url.database or url.database == ":memory:":
        problem = "it names no file, and a database in memory isn't durable"
        raise SettingInvalid(name=name, problem=problem)
    return Path(url.database)


def wrap_engine(engine: Engine, schema: str | None) -> Database:
    """Return the database of an engine. For SQLite, use only the engine's file, because writes must
    be durable and one at a time. Raises SettingInvalid."""
    if not isinstance(getattr(engine, "url", None), sa.URL):
        problem = f"it must be an Engine or an AsyncEngine, not {type(engine).__name__}; "
        raise SettingInvalid(name="engine", problem=f"{problem}pass a URL as database_url")
    backend = engine.url.get_backend_name()
    if backend == "sqlite":
        _refuse_schema(schema, _SCHEMA, "Pass an engine of a PostgreSQL database")
        application = engine if isinstance(engine, sa.Engine) else engine.sync_engine
        return SqliteFile(_to_path(engine.url, "engine"), "engine", application)
    if backend != "postgresql":
        problem = f"it must be an engine of SQLite or PostgreSQL, not {backend}"
        raise SettingInvalid(name="engine", problem=problem)
    # Imported on use: greenlet comes with the extra `postgres`.
    from logto_webhooks.database.postgres import LEVEL, Postgres

    level = str(engine.get_execution_options().get("isolation_level", LEVEL))
    if level.upper().replace("_", " ") != LEVEL:
        problem = (
            f"its execution_options set {level}, which can't be changed: "
            "pass the engine without these options"
        )
        raise SettingInvalid(name="engine", problem=problem)
    return Postgres(engine, schema, owns=False)
