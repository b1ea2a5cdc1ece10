"""Builds the application: the only place that knows which adapter serves which port."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import sqlalchemy as sa
from starlette.types import ASGIApp

from logto_webhooks.adapters import web
from logto_webhooks.adapters.hosts.failures import translated
from logto_webhooks.adapters.hosts.thread import ThreadHost
from logto_webhooks.adapters.stores import engine as engines
from logto_webhooks.adapters.stores import migrate
from logto_webhooks.adapters.stores.sql import SqlStore
from logto_webhooks.core.ports import Host, Observer
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.service.receive import GroupCommit, Receiver
from logto_webhooks.service.work import Worker
from logto_webhooks.settings import Settings

# SQLite has one writer: a worker's transaction must not hold back who accepts.
SQLITE_BUDGET_S = 0.005


class SystemClock:
    """The machine's clock."""

    def now(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000


class Database:
    """An embedded SQLite file, its engine and its host."""

    def __init__(self, url: str) -> None:
        """Raises SettingInvalid when `url` doesn't name a SQLite file."""
        self.file = sqlite_file(url)
        self._engine = engines.sqlite_engine(self.file)
        self._still_there = engines.still_there(self._engine, self.file)
        self.host: Host = ThreadHost(
            self._engine, SqlStore, reads=engines.READS, committed=self._still_there
        )

    def prepare(self) -> None:
        """Make the file, and migrate it. Raises SettingInvalid or StoreUnavailable."""
        engines.create(self.file)
        with translated():
            migrate.upgrade(self._engine)

    def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless it can be used as it is."""
        self._still_there()
        with translated(), self._engine.connect() as connection:
            migrate.check(connection.execution_options(**engines.READS))


class Service:
    """Receiver and worker over one database."""

    def __init__(self, settings: Settings, database: Database, observe: Observer) -> None:
        """Opens nothing. Raises SigningKeyMissing."""
        clock = SystemClock()
        self._database = database
        self.worker = worker_of(settings, database, observe)
        commit = GroupCommit(database.host, observe, stored=self.worker.wake)
        receiver = Receiver(settings.signing_keys, commit.add, clock, observe)
        self.app: ASGIApp = web.application(
            receiver,
            self._ready,
            self._lifespan,
            path=settings.path,
            max_body=settings.max_body_bytes,
        )

    async def _ready(self) -> None:
        await asyncio.to_thread(self._database.check)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        working = asyncio.create_task(self.worker.run())
        try:
            yield
        finally:
            self.worker.stop()
            await working
            await self._database.host.close()


def worker_of(settings: Settings, database: Database, observe: Observer) -> Worker:
    """Make a worker on `database`."""
    return Worker(
        database.host,
        SystemClock(),
        observe,
        random.random,
        lag_ms=settings.lag_ms,
        max_attempts=settings.max_attempts,
        budget_s=SQLITE_BUDGET_S,
    )


def sqlite_file(url: str) -> Path:
    """Return the file that a `sqlite:///…` URL names. Raises SettingInvalid."""
    name = "LOGTO_WEBHOOKS_DATABASE_URL"
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        problem = "it isn't a URL; use sqlite:///file.db, or sqlite:////absolute/file.db"
        raise SettingInvalid(name=name, problem=problem) from None
    if parsed.get_backend_name() != "sqlite":
        problem = f"this release keeps its data in SQLite only, not in {parsed.get_backend_name()}"
        raise SettingInvalid(name=name, problem=problem)
    if not parsed.database or parsed.database == ":memory:":
        problem = "it names no file, and what is only in memory can't be durable"
        raise SettingInvalid(name=name, problem=problem)
    return Path(parsed.database)
