"""Handlers that misbehave under a real server: only their own jobs suffer, and it ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.testing import SIGNING_KEY
from tests.support.app_sources import AWAITED, BARE, PLAIN
from tests.support.servers import UVICORN, Application, Kind, Server, gone, people
from tests.support.service import command
from tests.support.waiting import until

BAD = """

ONCE = dict(max_attempts=1, time_limit=0.5)


@logto.on("User.Deleted", name="exits", **ONCE)
async def exits(event, session: AsyncSession):
    sys.exit(3)


@logto.on("User.Deleted", name="interrupts", **ONCE)
def interrupts(event):
    raise KeyboardInterrupt


@logto.on("User.Deleted", name="deep", **ONCE)
async def deep(event):
    await deep(event)


@logto.on("User.Deleted", name="stuck", **ONCE)
def stuck(event):
    time.sleep(10**6)


@logto.on("User.Deleted", name="leaves", **ONCE)
async def leaves(event):
    asyncio.create_task(asyncio.sleep(10**6))
    await asyncio.sleep(10**6)


@logto.on("User.Deleted", name="unspeakable", **ONCE)
async def unspeakable(event):
    raise ValueError("\\udc80\\0")
"""
POISON = """

@logto.on("User.Deleted", name="poison")
async def poison(event):
    os._exit(1)
"""
THIRTY = """

for number in range(30):
    logto.on("User.Deleted", name=f"holds {number}")(holds)
"""
BLOCKS = """

@logto.on("User.Deleted", name="blocks")
async def blocks(event):
    if not os.path.exists("blocked"):
        open("blocked", "w").close()
        time.sleep(10**6)
"""
HOLDS_AWAITED = """

async def holds(event, session: AsyncSession):
    await session.execute(sa.text("SELECT 1"))
    await asyncio.sleep(600)
"""
HOLDS = """

def holds(event, session: Session):
    session.execute(sa.text("SELECT 1"))
    time.sleep(HOLD_S)
"""


def test_only_its_own_job_suffers(tmp_path: Path) -> None:
    """Whatever it does; what it left behind doesn't keep the server from its end."""
    app = Application(tmp_path, "asyncpg", BAD, AWAITED, PLAIN, BARE)
    with Server(app, *UVICORN) as server:
        answered = server.send(*people(10), *gone(), *people(10, since=100))
        bad = ("exits", "interrupts", "deep", "stuck", "leaves", "unspeakable")
        good = {("awaited", "done"): 20, ("plain", "done"): 20}
        expected = good | {(each, "dead"): 1 for each in bad}
        until(lambda: app.jobs() == expected, lambda: str(app.jobs()))
        assert set(app.effects().values()) == {1}
        assert len(answered) == 21
        assert server.stop() < 1  # uvicorn's own: the signal


def test_a_job_that_ends_its_process_is_given_up(tmp_path: Path) -> None:
    """After three processes; what these were at, too, is done once by others."""
    app = Application(tmp_path, "asyncpg", POISON, AWAITED, BARE)
    with Server(app, *UVICORN, "--workers", "2", workers=2) as server:
        answered = server.send(*people(5), *gone(), *people(5, since=100))
        for begun in (3, 4, 5):
            until(partial(server.has_begun, begun), lambda: server.log)
            app.leases_end()
        # What a process was just reading as it died is neither answered nor stored.
        stored = app.rows("SELECT id FROM {}logto_deliveries WHERE event = 'User.Created'")
        over = {("poison", "dead"): 1, ("awaited", "done"): len(stored)}
        until(lambda: app.jobs() == over, lambda: f"{app.jobs()}\n{server.log}")
        assert app.effects() == Counter(("awaited", number) for (number,) in stored)
        assert answered <= app.stored()
        [(error,)] = app.rows("SELECT error FROM {}logto_jobs WHERE handler = 'poison'")
        assert "3 times" in error
        assert server.has_begun(5)
        assert server.stop() == 0


def test_a_blocked_event_loop_is_one_process_lost(tmp_path: Path) -> None:
    """Another does what it was at, that job included."""
    app = Application(tmp_path, "asyncpg", BLOCKS, AWAITED, BARE)
    with Server(app, *UVICORN, "--workers", "2", workers=2) as server:
        server.send(*gone())
        until((tmp_path / "blocked").exists)
        app.leases_end()
        until(lambda: app.jobs() == {("blocks", "done"): 1}, lambda: str(app.jobs()))


@pytest.mark.parametrize("kind", ["asyncpg", "psycopg", "sqlite"])
def test_accepting_goes_on_while_transactions_are_held(kind: Kind, tmp_path: Path) -> None:
    """By more handlers than there are connections; or, where one writes, in a long line."""
    holds = HOLDS_AWAITED if kind == "asyncpg" else HOLDS
    hold_s = "0.5" if kind == "sqlite" else "600"
    app = Application(tmp_path, kind, holds.replace("HOLD_S", hold_s), THIRTY, BARE)
    if kind == "sqlite":
        assert command("migrate", folder=tmp_path, **app.environment).returncode == 0
    with Server(app, *UVICORN) as server:
        server.send(*gone())
        until(lambda: app.jobs().total() == 30)
        assert len(server.send(*people(5))) == 5
        if kind == "psycopg":
            assert server.stop() < 1


def test_a_stuck_writer_does_not_keep_the_server(tmp_path: Path) -> None:
    """A handler that never gives SQLite's transaction back is left behind; its job is not lost."""
    app = Application(tmp_path, "sqlite", HOLDS.replace("HOLD_S", "600"), THIRTY, BARE)
    assert command("migrate", folder=tmp_path, **app.environment).returncode == 0
    with Server(app, *UVICORN) as server:
        server.send(*gone())
        until(lambda: app.jobs().total() == 30)
        assert server.stop(seconds=60) < 1
    assert app.waiting() == 30


def test_who_only_receives_makes_its_handlers_known(tmp_path: Path) -> None:
    """Or jobs would be missing until a worker with their code begins."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, worker=False)

    @logto.on("User.Created", name="later")
    def later(event: events.UserCreated) -> None:
        """Do nothing."""

    async def names() -> list[str]:
        async with logto.lifespan():
            known = await logto.database.host.read(lambda store: store.jobs.handlers())
        return [each.name for each in known]

    assert asyncio.run(names()) == ["later"]
    assert asyncio.run(names()) == ["later"]  # started again
