"""`python -m bench.jobs`: jobs per second of an ordered handler that does nothing, one process.

Beside it, what a line that is stuck for ever costs the others, with many jobs waiting in it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path

from tests.support import postgres
from tests.support.copy import delivery

from logto_webhooks.core.events import UserDataUpdated
from logto_webhooks.core.jobs import NewJob
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
    handlers = Handlers(database.host.provides())
    bad = "user:stuck"

    async def empty(event: UserDataUpdated) -> None:
        if event.user_id == "stuck":
            raise ValueError("for ever")

    options = Options(max_attempts=10**9, waits=(0.05,))
    handlers.add(empty, ["User.Data.Updated"], name="empty", options=options)
    await database.host.run(lambda store: store.jobs.register([h.registered for h in handlers]))
    body = make.user_data_updated(id="stuck" if stuck else "u0")
    [accepted] = await database.host.run(lambda store: store.add([delivery(body.body)]))
    other = make.user_data_updated(id="other")
    [fine] = await database.host.run(lambda store: store.add([delivery(other.body)]))
    await fill(database, stuck, lambda number: bad, accepted.id)
    subjects = [f"user:{number}" for number in range(SUBJECTS)]
    await fill(database, count, lambda number: subjects[number % SUBJECTS], fine.id)
    runner = Runner(database.host, SystemClock(), lambda report: None, random.random, handlers)
    started = time.perf_counter()
    running = asyncio.create_task(runner.run())
    while await waiting(database, stuck):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    seconds = time.perf_counter() - started
    runner.stop()
    await running
    return count / seconds


async def fill(database: Database, count: int, line: object, delivery_id: int) -> None:
    """Make jobs."""
    assert callable(line)
    for start in range(0, count, PIECE):
        made = [
            NewJob(
                handler="empty",
                key=f"{line(number)}:{number}",
                event="User.Data.Updated",
                subject=line(number),
                line=line(number),
                occurred_at=number,
                delivery_id=delivery_id,
            )
            for number in range(start, min(start + PIECE, count))
        ]
        await database.host.run(lambda store, made=made: store.jobs.add(made))  # type: ignore[misc]


async def waiting(database: Database, stuck: int) -> bool:
    """Whether any line but the stuck one has jobs."""

    def look(store: Store) -> bool:
        import sqlalchemy as sa

        from logto_webhooks.adapters.stores.schema import lines

        connection: sa.Connection = store._connection  # type: ignore[attr-defined]
        query = sa.select(sa.func.count()).select_from(lines)
        return (connection.scalar(query) or 0) > bool(stuck)

    return await database.host.read(look)


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
