"""An old and a new release, and a worker without the application, on one database."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tests.support.app_sources import BARE
from tests.support.servers import Application, Server, gone, people
from tests.support.service import command
from tests.support.waiting import until

HANDLER = """

@logto.on("User.Created", name="NAME")
async def NAME(event: events.UserCreated, delivery: Delivery, session: AsyncSession):
    await session.execute(INSERT, effect("NAME", delivery))
"""


def test_no_job_is_missing_while_releases_change(tmp_path: Path) -> None:
    """Each delivery has a job of each handler that was known by then, whoever applied it."""
    app = Application(tmp_path, "asyncpg")
    app.write(release("a", "b"), name="old")
    app.write(release("b", "c"), name="new")
    with worker(app) as without:
        with Server(app, "uvicorn", "old:api", "--port", "PORT") as old:
            early = old.send(*people(10))
            with Server(app, "uvicorn", "new:api", "--port", "PORT") as new:
                both = {each for one in range(10) for each in sent_by_turns(old, new, one)}
                until(lambda: done(app) == Counter(a=30, b=30, c=20), lambda: str(app.jobs()))
                old.stop()
                late = new.send(*people(10, since=1_000))
                until(lambda: done(app) == Counter(a=30, b=40, c=30), lambda: str(app.jobs()))
                assert new.stop() < 1
        assert without.stop() == 0
    assert (len(early), len(both), len(late)) == (10, 20, 10)
    assert app.jobs() - Counter({("a", "waiting"): 10}) == Counter(
        {("a", "done"): 30, ("b", "done"): 40, ("c", "done"): 30}
    )
    expected = {("a", each) for each in early | both} | {("b", each) for each in app.stored()}
    assert app.effects() == Counter(expected | {("c", each) for each in both | late})
    forgotten(app)


def forgotten(app: Application) -> None:
    """Who has no code for what waits says so; a handler whose code is gone can be forgotten."""
    said = command("worker", "--drain", folder=app.folder, **app.environment).stderr
    assert re.search(r"check --app .*\ba\b.*jobs=10", said), said
    assert waiting_handlers(app) == {"a": 10}
    assert command("handlers", "forget", "a", folder=app.folder, **app.environment).returncode == 0
    assert waiting_handlers(app) == {}
    assert app.jobs()["a", "discarded"] == 10


def release(*handlers: str) -> str:
    return "".join(HANDLER.replace("NAME", each) for each in handlers) + BARE


@contextlib.contextmanager
def worker(app: Application) -> Iterator[Server]:
    """One that begins before any handler is known."""
    with Server(app, "logto_webhooks", "worker", workers=0) as server:
        until(lambda: "working on" in server.log, lambda: server.log)
        yield server


def sent_by_turns(old: Server, new: Server, one: int) -> set[int]:
    first, second = people(2, since=100 + 2 * one)
    return old.send(first) | new.send(second)


def done(app: Application) -> Counter[str]:
    return Counter(
        {handler: count for (handler, state), count in app.jobs().items() if state == "done"}
    )


def waiting_handlers(app: Application) -> dict[str, int]:
    listed = command("handlers", "list", "--json", folder=app.folder, **app.environment)
    found = msgspec.json.decode(listed.stdout)
    return {each["handler"]: each["waiting"] for each in found if each["waiting"]}


WIDER = """

@logto.on("User.Created", "User.Deleted", name="grows", max_attempts=1)
async def grows(event: events.UserCreated | events.UserDeleted, delivery: Delivery):
    noted("new", delivery)
"""
NARROWER = """

@logto.on("User.Created", name="grows", max_attempts=1)
async def grows(event: events.UserCreated, delivery: Delivery):
    noted("old", delivery)
"""


def test_no_release_calls_a_handler_for_events_of_another(tmp_path: Path) -> None:
    """The old one leaves what only the new one's handler of that name is for, however often it
    may fail."""
    app = Application(tmp_path, "asyncpg")
    app.write(NARROWER, BARE, name="old")
    app.write(WIDER, BARE, name="new")
    with Server(app, "uvicorn", "old:api", "--port", "PORT") as old:
        with Server(app, "uvicorn", "new:api", "--port", "PORT"):
            """It makes its handler known, and ends."""
        old.send(*people(3))
        until(lambda: app.jobs() == {("grows", "done"): 3}, lambda: str(app.jobs()))
        old.send(*gone(3))
        errors = "SELECT error FROM {}logto_jobs WHERE event = 'User.Deleted' AND error <> ''"
        until(lambda: len(app.rows(errors)) == 3, lambda: str(app.jobs()))
        assert all("in another release" in error for (error,) in app.rows(errors))
        assert app.jobs() == {("grows", "done"): 3, ("grows", "waiting"): 3}
        with Server(app, "uvicorn", "new:api", "--port", "PORT"):
            old.stop()
            until(lambda: app.jobs() == {("grows", "done"): 6}, lambda: str(app.jobs()))
    assert Counter(name for name, _ in app.effects()) == {"old": 3, "new": 3}
