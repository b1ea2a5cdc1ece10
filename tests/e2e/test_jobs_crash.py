"""Handlers that fail at random, in workers that are killed: each effect is there once, in order.
`make kills` tries many."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import sqlalchemy as sa

from logto_webhooks.database import Database, open_database
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery, Status
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

LATE = """
import asyncio
import os

from logto_webhooks import LogtoWebhooks

logto = LogtoWebhooks.from_env()


@logto.on("User.Data.Updated", name="slow")
async def slow():
    await asyncio.sleep(1)


@logto.on("User.Deleted", name="late")
async def late():
    await asyncio.sleep(0.5)
    os._exit(9)
"""
SOON_CLEARED = {"logto_webhooks.handlers.worker:CLEARED_S": 0.2}


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


def test_what_ends_its_process_late_costs_no_other_job_its_attempts(tmp_path: Path) -> None:
    """After it is no longer suspected, others that were lost run beside it, each time the same."""
    given, engine, _ = prepared("sqlite", tmp_path)
    (tmp_path / "app.py").write_text(LATE)
    drain = partial(command, "worker", "--drain", "--app", "app:logto", folder=tmp_path, **given)
    assert drain().returncode == 0
    at = time.time_ns() // 1_000_000 + 1_000
    bodies = [make.user_data_updated(id=f"u{number}", at=at).body for number in range(4)]
    bodies.append(make.user_deleted(id="poison", at=at).body)
    asyncio.run(receive(given, bodies))
    for _ in range(3):
        worker = started(given, tmp_path, SOON_CLEARED)
        assert worker.wait() == 9
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE logto_lines SET held_until = 0 WHERE token > ''"))
    assert drain().returncode == 0
    with engine.connect() as connection:
        states = "SELECT handler, state, count(*) FROM logto_jobs GROUP BY handler, state"
        found = {tuple(each) for each in connection.execute(sa.text(states))}
    engine.dispose()
    assert found == {("late", "dead", 1), ("slow", "done", 4)}


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
    bodies = [
        make.user_data_updated(id=f"u{user}", at=at + user * 100).body for user, at in moments
    ]
    made = await receive(given, bodies)
    return [(each.subject or "", each.occurred_at) for each in made]


async def receive(given: dict[str, str], bodies: list[bytes]) -> list[NewDelivery]:
    """Put deliveries into the inbox."""
    made = [delivery(body) for body in bodies]
    database = opened(given)
    await database.host.run(lambda store: store.add(made))
    await database.host.close()
    return made


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


def started(
    given: dict[str, str], folder: Path, constants: Mapping[str, object] | None = None
) -> Forked:
    arguments = ["worker", "--app", "app:logto"]
    environment, errors = clean_environment(given), folder / "errors"
    worker = Forked(arguments, folder, environment, errors=errors, constants=constants)
    worker.stderr.close()
    return worker
