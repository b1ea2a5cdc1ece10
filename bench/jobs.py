"""`python -m bench.jobs`: jobs per second of an ordered handler that does nothing, one process.

Beside it, what a line that is stuck for ever costs the others, with many jobs waiting in it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.support import postgres
from tests.support.copy import delivery

from logto_webhooks.core.events import UserDataUpdated
from logto_webhooks.core.jobs import JobCount, NewJob
from logto_webhooks.core.ports import Store
from logto_webhooks.service.handlers import Handlers, Options
from logto_webhooks.service.run import Runner
from logto_webhooks.testing import make
from logto_webhooks.wiring import Database, database_of
from logto_webhooks.wiring.clock import SystemClock

SUBJECTS = 200
PIECE = 5_000


async def rate(database: Database, count: int, stuck: int) -> float:
    """Jobs per second, beside `stuck` jobs of one line whose first fails for ever."""
    handlers, done, all_done = Handlers(), itertools.count(1), asyncio.Event()
    handlers.fit(database.host.provides)

    async def empty(event: UserDataUpdated) -> None:
        if event.user_id == "stuck":
            raise ValueError("for ever")
        if next(done) == count:
            all_done.set()

    options = Options(max_attempts=10**9, waits=(0.05,))
    handlers.add(empty, ["User.Data.Updated"], name="empty", options=options)
    bodies = [make.user_data_updated(id=user).body for user in ("stuck", "other")]
    bad, fine = await database.host.run(
        lambda store: store.add([delivery(body) for body in bodies])
    )
    await fill(database, stuck, 1, bad.id)
    await fill(database, count, SUBJECTS, fine.id)
    runner = Runner(database.host, SystemClock(), lambda report: None, random.random, handlers)
    started = time.perf_counter()
    running = asyncio.create_task(runner.run())
    await all_done.wait()
    runner.stop()  # writes what is done
    await running
    seconds = time.perf_counter() - started
    [written] = [each for each in await counts(database) if each.state == "done"]
    assert written.count == count
    return count / seconds


async def counts(database: Database) -> list[JobCount]:
    """Jobs by state."""
    return await database.host.read(lambda store: store.jobs.counts())


async def fill(database: Database, count: int, subjects: int, delivery_id: int) -> None:
    """Make jobs for a delivery, of so many subjects."""
    for start in range(0, count, PIECE):
        numbers = range(start, min(start + PIECE, count))
        made = [
            job(number, f"user:{delivery_id}-{number % subjects}", delivery_id)
            for number in numbers
        ]
        await database.host.run(partial(_add, made))


def job(number: int, subject: str, delivery_id: int) -> NewJob:
    """One of them."""
    return NewJob(
        handler="empty",
        key=f"{subject}:{number}",
        event="User.Data.Updated",
        subject=subject,
        line=subject,
        occurred_at=number,
        delivery_id=delivery_id,
    )


def _add(made: list[NewJob], store: Store) -> None:
    store.jobs.add(made)


async def opened(kind: str, folder: str) -> Database:
    """An empty database."""
    if kind == "sqlite":
        database = database_of(f"sqlite:///{Path(folder) / 'jobs.db'}")
        await database.migrate()
        return database
    url = postgres.server_url().render_as_string(hide_password=False)
    return database_of(url, postgres.emptied_schema())


async def measure(kind: str, count: int, stuck: int) -> None:
    """Print one database's figures."""
    rates = []
    for beside in (0, stuck):
        with tempfile.TemporaryDirectory() as folder:
            database = await opened(kind, folder)
            rates.append(await rate(database, count, beside))
            await database.host.close()
    alone, beside_stuck = rates
    print(f"{kind}: {alone:.0f} jobs/s; beside {stuck} stuck {beside_stuck:.0f}", end="")
    print(f" ({beside_stuck / alone:.2f})", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--stuck", type=int, default=100_000)
    given = parser.parse_args()
    for kind in ("sqlite", "postgres"):
        asyncio.run(measure(kind, given.jobs, given.stuck))


if __name__ == "__main__":
    main()
