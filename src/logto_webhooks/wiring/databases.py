"""Databases: which engine, store and host serve a URL."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.adapters.hosts.failures import translated
from logto_webhooks.adapters.hosts.thread import ThreadHost
from logto_webhooks.adapters.lockfile import LockFile
from logto_webhooks.adapters.stores import migrate, premises, sqlite
from logto_webhooks.adapters.stores.sql import SqlStore
from logto_webhooks.core.doctor.here import Premises
from logto_webhooks.core.ports import HandlerHost, Status
from logto_webhooks.errors import SettingInvalid, StoreUnavailable

T = TypeVar("T")
_URL = "LOGTO_WEBHOOKS_DATABASE_URL"


class Database(Protocol):
    """A database that can be used, checked and migrated; nothing is opened before that.

    `budget_s` is how long a worker's transaction may take: on SQLite it holds back who accepts.
    """

    name: str
    host: HandlerHost
    budget_s: float
    any_loop: bool  # whether its connections are of no event loop

    async def open(self) -> None:
        """Make it ready for the service, or raise a LogtoWebhooksError that says what to do."""

    async def migrate(self) -> None:
        """Bring the schema up to this release."""

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless it can be used as it is."""

    async def premises(self) -> Premises:
        """Tell of itself, whatever its schema. Raises StoreUnavailable."""

    def may_work(self) -> bool:
        """Whether this process may apply deliveries; if not now, perhaps later."""

    def migration_sql(self) -> str:
        """Return the statements that make the schema."""


class SqliteFile:
    """An embedded SQLite file: one writer, in a thread; migrated whenever it is opened."""

    budget_s = 0.005
    any_loop = True

    def __init__(self, file: Path) -> None:
        self.name = str(file)
        self.file = file
        self._engine = sqlite.engine_of(file)
        self._worker = LockFile(Path(f"{file}-worker"))
        self._guard = sqlite.Guard(self._engine, file)
        self.host: HandlerHost = ThreadHost(
            self._engine,
            SqlStore,
            reads=sqlite.READS,
            committed=self._guard.check,
            failed=self._guard.reset,
            stop=sqlite.stop,
            one_writer=True,
        )

    async def open(self) -> None:
        """Make the file unless it exists, and migrate it. Raises SettingInvalid."""
        self._guard.reset()  # with the last connection of before, the files beside it went, too
        await self.migrate()

    async def migrate(self) -> None:
        """Bring the schema up to this release."""
        sqlite.create(self.file)
        with translated(self._engine.url), self._engine.begin() as connection:
            migrate.upgrade(connection)

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless it can be used as it is."""
        await asyncio.to_thread(self._check)

    async def premises(self) -> Premises:
        """Tell of itself, whatever its schema. Raises StoreUnavailable."""
        return await asyncio.to_thread(self._premises)

    def migration_sql(self) -> str:
        """Return the statements that make the schema."""
        return migrate.sql("sqlite")

    def may_work(self) -> bool:
        """One process works on a file; others are its spares."""
        return self._worker.acquire()

    def _check(self) -> None:
        self._look(migrate.check)
        if problem := sqlite.forbidden(self.file):
            raise StoreUnavailable(problem=problem)

    def _premises(self) -> Premises:
        free = shutil.disk_usage(self.file.absolute().parent).free
        found = self._look(premises.look(self.name, free))
        return replace(found, unwritable=self._unwritable())

    def _unwritable(self) -> str | None:
        """Why nothing can be written now, if so; nothing is."""
        try:
            with translated(self._engine.url), self._engine.connect() as connection:
                sqlite.try_to_write(connection)
        except StoreUnavailable as error:
            return error.problem
        return sqlite.forbidden(self.file)

    def _look(self, work: Callable[[sa.Connection], T]) -> T:
        self._guard.check_file()
        with translated(self._engine.url), self._engine.connect() as connection:
            return work(connection.execution_options(**sqlite.READS))


def database_of(url: str, schema: str | None = None) -> Database:
    """Choose by the URL. Raises SettingInvalid."""
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        problem = "it isn't a URL; use sqlite:///file.db or postgresql://user:password@host/name"
        raise SettingInvalid(name=_URL, problem=problem) from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return SqliteFile(_file_of(parsed))
    if backend in ("postgresql", "postgres"):
        return _postgres(parsed, schema)
    problem = f"it must name a SQLite file or a PostgreSQL server, not {backend}"
    raise SettingInvalid(name=_URL, problem=problem)


def for_another_loop(database: Database, url: str, schema: str | None) -> Database:
    """The same database, for another event loop: one connection can't be used in two."""
    return database if database.any_loop else database_of(url, schema)


async def status_of(database: Database) -> Status:
    """Count what is in it. Raises as `check` does."""
    await database.check()
    return await database.host.read(lambda store: store.status())


def _postgres(url: sa.URL, schema: str | None) -> Database:
    # Imported only when used: a driver and greenlet come with an extra.
    try:
        from logto_webhooks.adapters.stores.postgres import engine_of
        from logto_webhooks.wiring.postgres import Postgres

        return Postgres(engine_of(url), schema)
    except ImportError as error:
        missing = error.name or "libpq"  # which psycopg tells only in its text
        extra = "psycopg" if "psycopg" in url.drivername else "postgres"
        problem = f'PostgreSQL needs the extra "{extra}" of this package ({missing} is missing)'
        raise SettingInvalid(name=_URL, problem=problem) from None


def _file_of(url: sa.URL) -> Path:
    if not url.database or url.database == ":memory:":
        problem = "it names no file, and what is only in memory can't be durable"
        raise SettingInvalid(name=_URL, problem=problem)
    return Path(url.database)
