"""`python -m bench.backfill`: backfill and recover of much, beside reading the same and discarding.

Time as a ratio to a reader that decodes the pages and forgets them; peak memory as a ratio to a
hundredth of the work; and both killed five times, and gone on with.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from logto_webhooks.runtime import make_client
from logto_webhooks.settings import from_env

Environment = dict[str, str]
KILLS = 5


@contextmanager
def logto(users: int = 0, entries: int = 0) -> Iterator[Environment]:
    """A FakeLogto in a process of its own; gives the settings to reach it."""
    options = ["--users", str(users), "--entries", str(entries)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.logto", *options], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout
        yield msgspec.json.decode(process.stdout.readline(), type=Environment)
    finally:
        process.terminate()
        process.wait()


def read_and_discard(environment: Environment, what: str, webhook: str = "") -> float:
    """Read all pages as fast as the client can; return the seconds."""
    started = time.perf_counter()
    asyncio.run(_discard(environment, what, webhook))
    return time.perf_counter() - started


async def _discard(environment: Environment, what: str, webhook: str) -> None:
    api = make_client(from_env(environment), fast=True)
    if what == "log":
        [webhook] = [each["id"] async for page in api.webhooks() for each in page.content]
    pages = api.users() if what == "users" else api.log(webhook, 1, 2**42)
    async for _ in pages:
        pass
    await api.close()


def command(name: str, folder: Path, environment: Environment, *options: str) -> Any:
    """Start a command."""
    return subprocess.Popen(
        [sys.executable, "-m", "logto_webhooks", name, *options],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
    )


def measured(name: str, folder: Path, environment: Environment, *options: str) -> tuple[Any, ...]:
    """Run a command; return its answer, the seconds, and its peak memory in MB."""
    started = time.perf_counter()
    process = command(name, folder, environment, *options)
    out = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, status
    return msgspec.json.decode(out), time.perf_counter() - started, used.ru_maxrss / 1024


def killed(name: str, folder: Path, environment: Environment, seconds: float, *options: str) -> Any:
    """Run a command to its end, killed and started again five times."""
    for number in range(KILLS):
        process = command(name, folder, environment, *options)
        time.sleep(seconds * (number + 1) / (KILLS * 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    return measured(name, folder, environment, *options)[0]


def migrated(folder: Path, name: str, url: str) -> tuple[Path, Environment]:
    """An empty database."""
    place = folder / name
    place.mkdir()
    environment = {"LOGTO_WEBHOOKS_DATABASE_URL": url, "LOGTO_WEBHOOKS_SCHEMA": ""}
    if url.startswith("postgres"):
        environment["LOGTO_WEBHOOKS_SCHEMA"] = f"bench_{name}_{os.getpid()}"
    measured_ = command("migrate", place, environment)
    measured_.wait()
    return place, environment


def count(place: Path, environment: Environment, table: str) -> int:
    """How many rows a table has."""
    url = environment["LOGTO_WEBHOOKS_DATABASE_URL"]
    if url.startswith("sqlite"):
        engine = sa.create_engine(f"sqlite:///{place / 'bench.db'}")
    else:
        engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
    schema = environment["LOGTO_WEBHOOKS_SCHEMA"]
    with engine.connect() as connection:
        name = f"{schema}.{table}" if schema else table
        found = connection.execute(sa.text(f"SELECT count(*) FROM {name}")).scalar_one()
    engine.dispose()
    return int(found)


def filled(users: int, url: str, folder: Path) -> None:
    """Backfill."""
    with logto(users=users) as few_or_many:
        reading = read_and_discard(few_or_many, "users")
        place, environment = migrated(folder, "whole", url)
        found, seconds, memory = measured("backfill", place, few_or_many | environment, "--json")
        rows = count(place, environment, "logto_users")
        assert rows == found["users"] == users, (rows, found)
        print(f"backfill {users}: {seconds:.1f} s, reading {reading:.1f} s, ", end="")
        print(f"ratio {seconds / reading:.2f}, peak {memory:.0f} MB", flush=True)
        place, environment = migrated(folder, "killed", url)
        found = killed("backfill", place, few_or_many | environment, seconds, "--json")
        rows = count(place, environment, "logto_users")
        print(f"killed {KILLS} times: {rows} rows, resumed: {found['resumed']}", flush=True)
        assert rows == users
        assert not found["doubts"], found["doubts"]


def recovered(entries: int, url: str, folder: Path) -> None:
    """Recover."""
    with logto(entries=entries) as few_or_many:
        reading = read_and_discard(few_or_many, "log")
        place, environment = migrated(folder, "whole", url)
        options = ("--since", "30d", "--api-budget", "1000", "--json")
        found, seconds, memory = measured("recover", place, few_or_many | environment, *options)
        assert found["recovered"] == entries, found
        print(f"recover {entries}: {seconds:.1f} s, reading {reading:.1f} s, ", end="")
        print(f"ratio {seconds / reading:.2f}, peak {memory:.0f} MB", flush=True)
        place, environment = migrated(folder, "killed", url)
        killed("recover", place, few_or_many | environment, seconds, *options)
        rows = count(place, environment, "logto_deliveries")
        print(f"killed {KILLS} times: {rows} rows", flush=True)
        assert rows == entries


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--url", default="sqlite:///bench.db")
    given = parser.parse_args()
    for work, amount in ((filled, given.users), (recovered, given.entries)):
        for size in (amount // 100, amount):
            if size:
                with tempfile.TemporaryDirectory() as folder:
                    work(size, given.url, Path(folder))


if __name__ == "__main__":
    main()
