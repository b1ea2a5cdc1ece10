"""procrastinate, a job queue on PostgreSQL, with a lock for each subject: what ours is measured by.

It gets what makes it quicker, by its documentation or as tried: done jobs are deleted at once, no
LISTEN while nothing new comes, a connection for each statement it may have at once, none of them
checked before use, and no transactions beside its own functions'; statistics and a vacuum before
the clock starts, uvloop, and the best of several concurrencies. It fetches jobs one at a time, with
one statement each, and writes each with another: that is how it works, not how it is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import procrastinate
import psycopg_pool
from procrastinate.jobs import Job
from tests.support import postgres

from bench.queue_databases import PIECE, SUBJECTS, new_schema, on_postgres

CONCURRENCIES = (1, 5, 10, 30, 100)
POLL_S = 0.01


class Rival:
    """Jobs of many users in its tables."""

    def __init__(self, app: procrastinate.App, schema: str) -> None:
        self._app = app
        self._table = f"{schema}.procrastinate_jobs"
        self._waiting = 0
        self._all_done = asyncio.Event()
        app.task(name="empty")(self._empty)

    async def fill(self, waiting: int) -> None:
        """Make so many jobs, of all users by turns, and nothing else."""
        on_postgres(f"TRUNCATE {self._table} CASCADE")
        jobs = [_job(number) for number in range(waiting)]
        for start in range(0, waiting, PIECE):
            await self._app.job_manager.batch_defer_jobs_async(jobs[start : start + PIECE])
        on_postgres(f"VACUUM ANALYZE {self._table}")
        self._waiting = waiting

    async def rate(self, seconds: float, concurrency: int) -> float:
        """Jobs per second, until all are done or the time is over; what is done is written."""
        self._all_done.clear()
        before = self._waiting
        started = time.perf_counter()
        running = asyncio.create_task(
            self._app.run_worker_async(
                concurrency=concurrency,
                delete_jobs="always",
                listen_notify=False,
                fetch_job_polling_interval=POLL_S,
                install_signal_handlers=False,
            )
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_done.wait(), seconds)
        running.cancel()  # it ends what is in hand
        with contextlib.suppress(asyncio.CancelledError):
            await running
        return (before - self._waiting) / (time.perf_counter() - started)

    async def _empty(self) -> None:
        self._waiting -= 1
        if not self._waiting:
            self._all_done.set()


@contextlib.asynccontextmanager
async def rival() -> AsyncIterator[Rival]:
    """Its tables, in a schema that is dropped in the end."""
    with new_schema("rival") as schema:
        connector = procrastinate.PsycopgConnector(
            conninfo=postgres.server_url().render_as_string(hide_password=False),
            kwargs={"options": f"-c search_path={schema}", "autocommit": True},
            pool_factory=_unchecked,
            min_size=20,
            max_size=20,
        )
        app = procrastinate.App(connector=connector)
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            yield Rival(app, schema)


def _unchecked(**options: Any) -> psycopg_pool.AsyncConnectionPool:
    return psycopg_pool.AsyncConnectionPool(**options | {"check": None})


def _job(number: int) -> Job:
    lock = f"user:{number % SUBJECTS}"
    return Job(queue="default", lock=lock, queueing_lock=None, task_name="empty")
