"""`python -m bench.dead_rows`: jobs per second of a handler in a transaction; nothing vacuums.

Jobs of many users are made and run piece by piece, on a PostgreSQL database of its own whose tables
are never vacuumed. Printed is the rate of the first pieces and of the last, and what was updated.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import time
import uuid
from argparse import Namespace

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection
from tests.support.stores import delivery

from bench.queue_databases import on_postgres
from logto_webhooks.cli import collect_seldom
from logto_webhooks.cli.session import run_async
from logto_webhooks.clock import SystemClock
from logto_webhooks.database import Database, open_database
from logto_webhooks.database.store import Store
from logto_webhooks.events import UserDataUpdated
from logto_webhooks.handlers import HandlerOptions, Handlers
from logto_webhooks.handlers.worker import JobWorker
from logto_webhooks.jobs import NewJob
from logto_webhooks.testing import make

SHOWN = 3  # pieces at the start and at the end
UPDATES = sa.text(
    "SELECT relname, n_tup_upd, n_tup_hot_upd, n_tup_del, n_dead_tup FROM pg_stat_user_tables"
    " WHERE n_tup_upd > 0 ORDER BY relname"
)
# What is read from the cache counts, too: these don't depend on what else the machine does.
BLOCKS = sa.text(
    "SELECT sum(heap_blks_hit + heap_blks_read + coalesce(idx_blks_hit + idx_blks_read, 0))"
    " FROM pg_statio_user_tables"
)
NO_VACUUM = (
    "DO $$ DECLARE t regclass; BEGIN FOR t IN SELECT oid FROM pg_class WHERE relkind = 'r'"
    " AND relnamespace = 'public'::regnamespace LOOP"
    " EXECUTE format('ALTER TABLE %s SET (autovacuum_enabled = off)', t); END LOOP; END $$"
)


async def _handle(event: UserDataUpdated, connection: AsyncConnection) -> None:
    await connection.execute(sa.text("INSERT INTO handled VALUES (1)"))


async def run_piece(database: Database, handlers: Handlers, first: int, count: int) -> float:
    """Make jobs and run them; return how many a second were run."""
    delivery_id = await database.host.run(_deliver)
    jobs = [_job(number, delivery_id) for number in range(first, first + count)]
    await database.host.run(lambda store: store.jobs.add(jobs))
    runner = JobWorker(database.host, SystemClock(), lambda report: None, random.random, handlers)
    started = time.perf_counter()
    await runner.drain()
    return count / (time.perf_counter() - started)


async def measure(arguments: Namespace) -> None:
    """Print the rates."""
    name = f"bench_{uuid.uuid4().hex[:10]}"
    on_postgres(f'CREATE DATABASE "{name}"', arguments.server)
    url = sa.make_url(arguments.server).set(database=name)
    engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
    database = open_database(url.render_as_string(hide_password=False))
    try:
        await database.migrate()
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE handled (n integer)"))
            connection.execute(sa.text(NO_VACUUM))
        handlers = Handlers()
        handlers.fit(database.host.provides)
        handlers.add(_handle, ["User.Data.Updated"], name="bench", options=HandlerOptions())
        rates, blocks = [], [0]
        for first in range(0, arguments.jobs, arguments.piece):
            rates.append(await run_piece(database, handlers, first, arguments.piece))
            await asyncio.sleep(1)  # until the server's statistics are written
            with engine.connect() as connection:
                blocks.append(int(connection.scalar(BLOCKS) or 0))
        each = [(b - a) // arguments.piece for a, b in itertools.pairwise(blocks)]
        print("blocks a job:", *each[:SHOWN], "…", *each[-SHOWN:])
        print("first:", *(f"{rate:.0f}/s" for rate in rates[:SHOWN]))
        print("last:", *(f"{rate:.0f}/s" for rate in rates[-SHOWN:]))
        ratio = statistics.median(rates[-SHOWN:]) / statistics.median(rates[:SHOWN])
        print(f"last ÷ first: {ratio:.2f}")
        with engine.connect() as connection:
            for row in connection.execute(UPDATES).mappings():
                print(dict(row))
    finally:
        await database.host.close()
        engine.dispose()
        on_postgres(f'DROP DATABASE "{name}" WITH (FORCE)', arguments.server)


def _deliver(store: Store) -> int:
    body = make.user_data_updated(id=uuid.uuid4().hex).body
    return store.add([delivery(body)])[0].id


def _job(number: int, delivery_id: int) -> NewJob:
    user = f"user:{number}"
    return NewJob(
        handler="bench",
        key=f"{number}",
        event="User.Data.Updated",
        subject=user,
        queue_key=user,
        delivery_id=delivery_id,
    )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True, help="URL of a PostgreSQL database")
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--piece", type=int, default=1_000)
    collect_seldom()
    run_async(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
