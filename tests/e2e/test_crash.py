"""A short form of `make crash`, and two workers of which one is paused."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import msgspec

from logto_webhooks.database import open_database
from logto_webhooks.testing import make
from tests.crash.databases import PostgresVictim, SqliteVictim
from tests.crash.harness import Harness
from tests.support import postgres
from tests.support.forked import Forked
from tests.support.service import clean_environment
from tests.support.stores import delivery
from tests.support.waiting import until


def test_kills_under_load_lose_nothing_on_sqlite(tmp_path: Path) -> None:
    """What was answered 200 is there, once, and right."""
    result = asyncio.run(Harness(SqliteVictim(tmp_path), tmp_path, kills=6, seed=1).run())
    assert result.good, result
    assert result.kills > 0


def test_kills_under_load_lose_nothing_on_postgres(tmp_path: Path) -> None:
    """Receivers, workers, and the server itself."""
    victim = PostgresVictim()
    try:
        result = asyncio.run(Harness(victim, tmp_path, kills=10, seed=2).run())
    finally:
        victim.close()
    assert result.good, result
    assert result.database_crashes == 1


def test_a_worker_paused_past_its_lease_applies_nothing_twice(tmp_path: Path) -> None:
    """Another takes over; the paused one finds its claims gone."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().render_as_string(hide_password=False)
    deliveries = [delivery(make.user_created().body) for _ in range(6000)]

    async def fill() -> None:
        database = open_database(url, schema)
        await database.host.run(lambda store: store.add(deliveries))
        await database.host.close()

    asyncio.run(fill())
    command = ["worker", "--drain", "--log-format", "json"]
    command += ["--database-url", url, "--schema", schema]
    logs = [tmp_path / "paused.log", tmp_path / "other.log"]
    processes = []
    for log in logs:
        processes.append(Forked(command, tmp_path, clean_environment({}), errors=log))
        processes[-1].stderr.close()
        if log is logs[0]:
            until(lambda: logs[0].exists() and b'"delivery"' in logs[0].read_bytes())
            processes[0].send_signal(signal.SIGSTOP)
    assert processes[1].wait(60) == 0, logs[1].read_text()[-2000:]
    processes[0].send_signal(signal.SIGCONT)
    assert processes[0].wait(60) == 0, logs[0].read_text()[-2000:]
    lines = [msgspec.json.decode(line) for log in logs for line in log.read_bytes().splitlines()]
    ids = [line["id"] for line in lines if line["message"] == "delivery"]
    assert len(ids) == len(set(ids)) == 6000
