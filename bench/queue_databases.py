"""Databases whose jobs wait in lines, and how many a second an ordered empty handler is given."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import sqlalchemy as sa
from tests.support import postgres
from tests.support.stores import delivery

from logto_webhooks.clock import SystemClock
from logto_webhooks.database import Database, open_database
from logto_webhooks.database.store import Store
from logto_webhooks.events import UserDataUpdated
from logto_webhooks.handlers import HandlerOptions, Handlers
from logto_webhooks.handlers.worker import JobWorker
from logto_webhooks.jobs import NewJob
from logto_webhooks.testing import make

SUBJECTS = 200
PIECE = 5_000
AGAIN_S = 0.05  # what fails is tried again so soon, for ever
_TABLES = ("logto_jobs", "logto_lines", "logto_deliveries")


class Lines:
    """A database of its own: jobs of many users, and perhaps a line that is stuck for ever."""

    def __init__(self, name: str, database: Database, schema: str | None) -> None:
        self.name = name
        self._database = database
        self._schema = schema
        self._made = self._done = self._failed = 0
        self._all_done = asyncio.Event()
        self._handlers = Handlers()
        self._handlers.fit(database.host.provides)
        options = HandlerOptions(max_attempts=10**9, waits=(AGAIN_S,))
        self._handlers.add(self._empty, ["User.Data.Updated"], name="empty", options=options)

    async def prepare(self, stuck: int) -> None:
        """Put so many jobs into one line whose first fails for ever."""
        await self._database.migrate()
        bodies = [make.user_data_updated(id=user).body for user in ("stuck", "other")]
        add = partial(_deliver, bodies)
        self._stuck_id, self._fine_id = await self._database.host.run(add)
        await self._make([_job(number, "user:stuck", self._stuck_id) for number in range(stuck)])
        self.stuck = stuck

    async def fill(self, waiting: int) -> None:
        """Make jobs until so many wait, of all users by turns; tidy up as PostgreSQL would."""
        new = range(self._made, self._done + waiting)
        users = [f"user:{number % SUBJECTS}" for number in new]
        await self._make([_job(*each, self._fine_id) for each in zip(new, users, strict=True)])
        self._made = max(self._made, self._done + waiting)
        if self._schema:
            tables = ", ".join(f"{self._schema}.{table}" for table in _TABLES)
            on_postgres(f"VACUUM ANALYZE {tables}")

    async def rate(self, seconds: float) -> float:
        """Jobs per second, until all are done or the time is over; what is done is written."""
        self._all_done.clear()
        before, failed = self._done, self._failed
        host, clock = self._database.host, SystemClock()
        runner = JobWorker(host, clock, lambda report: None, random.random, self._handlers)
        started = time.perf_counter()
        running = asyncio.create_task(runner.run())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_done.wait(), seconds)
        runner.stop()
        await running
        took = time.perf_counter() - started
        assert bool(self.stuck) == (self._failed > failed), "the stuck line wasn't tried"
        return (self._done - before) / took

    async def check(self) -> None:
        """Raise unless each call was written as done, and the stuck line still waits."""
        counts = await self._database.host.read(lambda store: store.jobs.counts())
        found = {each.state: each.count for each in counts}
        waiting = self._made - self._done + self.stuck
        assert found.get("done", 0) == self._done, (found, self._done)
        assert found.get("waiting", 0) == waiting, (found, waiting)

    async def _empty(self, event: UserDataUpdated) -> None:
        if event.user_id == "stuck":
            self._failed += 1
            raise ValueError("for ever")
        self._done += 1
        if self._done == self._made:
            self._all_done.set()

    async def _make(self, jobs: list[NewJob]) -> None:
        for start in range(0, len(jobs), PIECE):
            await self._database.host.run(partial(_add, jobs[start : start + PIECE]))


@contextlib.asynccontextmanager
async def lines(kind: str, name: str, folder: Path) -> AsyncIterator[Lines]:
    """A new database: a file, or a schema that is dropped in the end."""
    if kind == "sqlite":
        database = open_database(f"sqlite:///{folder / name}.db")
        yield Lines(name, database, None)
        await database.host.close()
        return
    with new_schema(name) as schema:
        url = postgres.server_url().render_as_string(hide_password=False)
        database = open_database(url, schema)
        yield Lines(name, database, schema)
        await database.host.close()


@contextlib.contextmanager
def new_schema(name: str) -> Iterator[str]:
    """A schema on the tests' PostgreSQL for as long as the block runs."""
    schema = f"bench_{name}_{os.getpid()}"
    on_postgres(f"CREATE SCHEMA {schema}")
    try:
        yield schema
    finally:
        on_postgres(f"DROP SCHEMA {schema} CASCADE")


def on_postgres(statement: str, url: str | None = None) -> None:
    """Run a statement outside of a transaction, on the tests' server if there is no URL."""
    engine = postgres.sync_engine()
    if url:
        engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
    engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(statement))


def _job(number: int, subject: str, delivery_id: int) -> NewJob:
    return NewJob(
        handler="empty",
        key=f"{subject}:{number}",
        event="User.Data.Updated",
        subject=subject,
        queue_key=subject,
        occurred_at=number,
        delivery_id=delivery_id,
    )


def _deliver(bodies: list[bytes], store: Store) -> list[int]:
    return [each.id for each in store.add([delivery(body) for body in bodies])]


def _add(jobs: list[NewJob], store: Store) -> None:
    store.jobs.add(jobs)
