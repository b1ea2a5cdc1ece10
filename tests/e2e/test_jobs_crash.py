"""Handlers that fail at random, in workers that are killed: each effect is there once, in order.
`make kills` tries many."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Literal

import pytest
import sqlalchemy as sa

from logto_webhooks.database import Database, open_database
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import Status
from logto_webhooks.testing import make
from tests.support import postgres
from tests.support.forked import Forked
from tests.support.service import clean_environment, command
from tests.support.stores import delivery

KILLS = int(os.environ.get("LOGTO_WEBHOOKS_TEST_JOB_KILLS", "3"))
USERS, CHANGES = 10 * max(1, KILLS // 4), 8
Kind = Literal["sqlite", "postgres"]
WORKERS: dict[Kind, int] = {"sqlite": 1, "postgres": 4}

APP = """
import random
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from logto_webhooks import Delivery, LogtoWebhooks, events

logto = LogtoWebhooks.from_env()
INSERT = text("INSERT INTO {schema}effects (handler, subject, at) VALUES (:h, :s, :a)")
PATIENT = dict(waits=(0.01,), max_attempts=10_000)


def row(handler, delivery):
    return {{"h": handler, "s": delivery.subject, "a": delivery.occurred_at}}


@logto.on("User.Data.Updated", name="plain", **PATIENT)
def plain(event: events.UserDataUpdated, delivery: Delivery, session: Session):
    session.execute(INSERT, row("plain", delivery))
    if random.random() < 0.2:
        raise ValueError("at random")
"""
ASYNC = """

@logto.on("User.Data.Updated", name="awaited", **PATIENT)
async def awaited(event: events.UserDataUpdated, delivery: Delivery, session: AsyncSession):
    await session.execute(INSERT, row("awaited", delivery))
    if random.random() < 0.2:
        raise ValueError("at random")
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_each_effect_is_there_once_and_in_order(kind: Kind, tmp_path: Path) -> None:
    """20 % of the calls fail; a worker without the code makes the jobs, and leaves them."""
    given, engine, schema = prepared(kind, tmp_path)
    source = APP + (ASYNC if kind == "postgres" else "")
    (tmp_path / "app.py").write_text(source.format(schema=schema))
    handlers = ["plain", *(["awaited"] if kind == "postgres" else [])]
    assert command("worker", "--drain", "--app", "app:logto", folder=tmp_path, **given).stderr
    expected = asyncio.run(fill(given))
    applied = command("worker", "--drain", folder=tmp_path, **given)
    assert "--app" in applied.stderr
    assert waiting(given) == len(handlers) * len(expected)
    killed_until_done(given, tmp_path, WORKERS[kind])
    with engine.connect() as connection:
        query = f"SELECT handler, subject, at FROM {schema}effects ORDER BY id"
        effects = [tuple(each) for each in connection.execute(sa.text(query))]
    engine.dispose()
    for handler in handlers:
        found = [each[1:] for each in effects if each[0] == handler]
        assert sorted(found) == sorted(expected)
        for subject in {each for each, _ in expected}:
            moments = [at for each, at in found if each == subject]
            assert moments == sorted(moments)


def prepared(kind: Kind, folder: Path) -> tuple[dict[str, str], sa.Engine, str]:
    number = "INTEGER PRIMARY KEY AUTOINCREMENT"
    if kind == "sqlite":
        schema, engine = "", sa.create_engine(f"sqlite:///{folder}/jobs.db")
        given = {"LOGTO_WEBHOOKS_DATABASE_URL": f"sqlite:///{folder}/jobs.db"}
        command("migrate", folder=folder, **given)
    else:
        schema, number = postgres.emptied_schema(), "BIGSERIAL PRIMARY KEY"
        url = postgres.server_url().render_as_string(hide_password=False)
        given = {"LOGTO_WEBHOOKS_DATABASE_URL": url, "LOGTO_WEBHOOKS_SCHEMA": schema}
        engine = postgres.sync_engine()
        schema = f"{schema}."
    with engine.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE IF EXISTS {schema}effects"))
        columns = f"id {number}, handler TEXT, subject TEXT, at BIGINT"
        connection.execute(sa.text(f"CREATE TABLE {schema}effects ({columns})"))
    return given, engine, schema


def opened(given: dict[str, str]) -> Database:
    url, schema = given["LOGTO_WEBHOOKS_DATABASE_URL"], given.get("LOGTO_WEBHOOKS_SCHEMA")
    return open_database(url, schema)


async def fill(given: dict[str, str]) -> list[tuple[str, int]]:
    """Put changes of users into the inbox, in disorder; return what each handler should see."""
    rng = random.Random(1)
    start = time.time_ns() // 1_000_000 + 1_000
    moments = [(user, start + number) for number in range(CHANGES) for user in range(USERS)]
    rng.shuffle(moments)
    made = [
        delivery(make.user_data_updated(id=f"u{user}", at=at + user * 100).body)
        for user, at in moments
    ]
    database = opened(given)
    await database.host.run(lambda store: store.add(made))
    await database.host.close()
    return [(each.subject or "", each.occurred_at) for each in made]


def waiting(given: dict[str, str]) -> int:
    async def count() -> int:
        database = opened(given)

        def counted(store: Store) -> tuple[Status, int]:
            jobs = [each.count for each in store.jobs.counts() if each.state == "waiting"]
            return store.status(), sum(jobs)

        status, jobs = await database.host.read(counted)
        await database.host.close()
        assert status.deliveries["pending"] == 0
        return jobs

    return asyncio.run(count())


def killed_until_done(given: dict[str, str], folder: Path, count: int) -> None:
    """Run workers, kill one now and then and start another, until no job waits."""
    rng, workers = random.Random(2), [started(given, folder) for _ in range(count)]
    try:
        for _ in range(KILLS):
            time.sleep(1.0 + rng.random())
            victim = workers.pop(rng.randrange(len(workers)))
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            workers.append(started(given, folder))
        end = time.monotonic() + 300
        while waiting(given):
            assert time.monotonic() < end
            time.sleep(0.5)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def started(given: dict[str, str], folder: Path) -> Forked:
    arguments = ["worker", "--app", "app:logto"]
    worker = Forked(arguments, folder, clean_environment(given), errors=folder / "errors")
    worker.stderr.close()
    return worker
