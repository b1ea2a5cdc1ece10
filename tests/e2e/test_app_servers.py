"""The servers that people run: several processes, reloads, forks and kills. Each effect is there
once, and each server ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from logto_webhooks.samples.request import SignedRequest
from tests.support.app_sources import AWAITED, BARE, BESIDE, FASTAPI, PLAIN, STARLETTE
from tests.support.servers import UVICORN, Application, Kind, Server, gone, people
from tests.support.service import command
from tests.support.waiting import until

MIGRATED = """

asyncio.run(logto.migrate())
"""
LONG = """

@logto.on("User.Created", name="long")
async def long(event: events.UserCreated, delivery: Delivery, session: AsyncSession):
    await session.execute(INSERT, effect("long", delivery))
    print("long begins", os.getpid(), flush=True)
    while not os.path.exists("go"):
        await asyncio.sleep(0.05)
"""
SLOW = """

@logto.on("User.Deleted", name="slow")
async def slow(event: events.UserDeleted):
    print("slow begins", flush=True)
    await asyncio.sleep(600)


@logto.on("User.Deleted", name="stuck")
def stuck(event: events.UserDeleted):
    print("stuck begins", flush=True)
    time.sleep(600)
"""
GUNICORN = ("gunicorn", "app:api", "-b", "127.0.0.1:PORT", "-k", "uvicorn_worker.UvicornWorker")


def application(folder: Path, kind: Kind, *source: str) -> Application:
    app = Application(folder, kind, *source)
    if kind == "sqlite":
        assert command("migrate", folder=folder, **app.environment).returncode == 0
    return app


@pytest.mark.parametrize(
    ("kind", "workers", "source", "handlers"),
    [
        ("asyncpg", 3, (AWAITED, PLAIN, BESIDE, FASTAPI), ("awaited", "plain", "beside")),
        ("psycopg", 2, (PLAIN, BESIDE, STARLETTE), ("plain", "beside")),
        ("sqlite", 2, (PLAIN, BESIDE, BARE), ("plain", "beside")),
    ],
)
def test_several_processes_do_nothing_twice(
    kind: Kind, workers: int, source: tuple[str, ...], handlers: tuple[str, ...], tmp_path: Path
) -> None:
    """All of them end while handlers are at it; those are given back as if never begun."""
    app = application(tmp_path, kind, SLOW, *source)
    with Server(app, *UVICORN, "--workers", str(workers), workers=workers) as server:
        answered = server.send(*people(30))
        assert len(answered) == 30
        app.once(answered, *handlers)
        server.send(*gone())
        begun = ("slow begins", "stuck begins")  # perhaps on one line: two processes write them
        until(lambda: all(text in server.log for text in begun), lambda: server.log)
        assert server.stop() == 0
    jobs = "SELECT handler, state, attempts FROM {}logto_jobs WHERE event = 'User.Deleted'"
    assert sorted(app.rows(jobs)) == [("slow", "waiting", 0), ("stuck", "waiting", 0)]


def test_a_reload_loses_nothing(tmp_path: Path) -> None:
    """What was answered while the code changes is handled once; Ctrl-C ends it."""
    app = application(tmp_path, "asyncpg", AWAITED, BESIDE, FASTAPI)
    with Server(app, *UVICORN, "--reload") as server:
        [old] = server.serving()
        answered = server.send(*people(10))
        app.write(AWAITED, BESIDE, FASTAPI, "\n# changed\n")
        while server.serving() == [old]:
            answered |= server.send(new())
        until(lambda: len(server.serving()) == 1, lambda: server.log)
        answered |= server.send(*people(10, since=1_000))
        app.once(answered, "awaited", "beside")
        assert server.stop(signal.SIGINT) == 0


def test_all_can_be_made_before_a_fork(tmp_path: Path) -> None:
    """Children share no connection and miss no thread; new ones take over when told."""
    app = application(tmp_path, "asyncpg", AWAITED, PLAIN, BESIDE, MIGRATED, STARLETTE)
    with Server(app, *GUNICORN, "--preload", "-w", "2", workers=2) as server:
        answered = server.send(*people(20))
        before = set(server.serving())
        server.process.send_signal(signal.SIGHUP)
        until(lambda: len(set(server.serving()) - before) == 2, lambda: server.log)
        answered |= server.send(*people(20, since=100))
        assert len(answered) == 40
        app.once(answered, "awaited", "plain", "beside")
        assert server.stop() == 0
        assert "Traceback" not in server.log


def test_a_killed_process_leaves_its_jobs_to_others(tmp_path: Path) -> None:
    """The server starts another; what it was at is rolled back, and done once."""
    app = application(tmp_path, "asyncpg", LONG, AWAITED, STARLETTE)
    with Server(app, *UVICORN, "--workers", "2", workers=2) as server:
        before = server.serving()
        answered = server.send(*people(10))
        until(lambda: "long begins" in server.log, lambda: server.log)
        victim = int(server.log.partition("long begins ")[2].split()[0])
        assert victim in before
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(server.serving()) == 3, lambda: server.log)
        app.leases_end()
        answered |= server.send(*people(10, since=100))
        (tmp_path / "go").touch()
        app.once(answered, "long", "awaited")
        assert server.stop() == 0


def new() -> SignedRequest:
    """Somebody nobody saw before."""
    return people(1, since=time.time_ns())[0]
