"""`handlers run` and `backfill --run-handlers`: real processes, and handlers that are new."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import sqlalchemy as sa

from logto_webhooks.database import open_database
from logto_webhooks.testing import make
from logto_webhooks.testing.fake import FakeLogto
from tests.support import postgres
from tests.support.fake import credentials
from tests.support.forked import Forked
from tests.support.service import clean_environment, command, one_line
from tests.support.stores import Copy
from tests.support.waiting import until

Kind = Literal["sqlite", "postgres"]
COUNT = 150
T0 = 1_795_485_335_917
APP = """
from sqlalchemy import text
from sqlalchemy.orm import Session
from logto_webhooks import Delivery, LogtoWebhooks, events

logto = LogtoWebhooks.from_env()


@logto.on("LocalUserCreated", "LocalMemberAdded", name="welcome", max_attempts=1)
def welcome(event: events.LocalUserCreated | events.LocalMemberAdded, delivery: Delivery):
    with open("effects", "a") as file:
        file.write(f"{event.name} {delivery.subject} {event.source}\\n")


@logto.on("User.*", name="raw")
def raw(): ...
"""


@pytest.fixture(params=["sqlite", "postgres"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """An empty database, and the settings with which a command uses it."""
    kind: Kind = request.param
    if kind == "sqlite":
        given = {"LOGTO_WEBHOOKS_DATABASE_URL": f"sqlite:///{tmp_path}/rows.db"}
        assert command("migrate", folder=tmp_path, **given).returncode == 0
        return given
    schema = postgres.emptied_schema()
    url = postgres.server_url().render_as_string(hide_password=False)
    return {"LOGTO_WEBHOOKS_DATABASE_URL": url, "LOGTO_WEBHOOKS_SCHEMA": schema}


def fill(given: dict[str, str], count: int) -> None:
    """Add users, an organization, and its members."""
    users = [f"u{number:04}" for number in range(count)]
    sent = [make.user_created(id=user, email=f"{user}@example.com", at=T0) for user in users]
    sent.append(make.organization_created(id="acme", name="Acme", at=T0))
    joined = make.organization_membership_updated(id="acme", addedUserIds=users[:3], at=T0 + 1)
    database = open_database(
        given["LOGTO_WEBHOOKS_DATABASE_URL"], given.get("LOGTO_WEBHOOKS_SCHEMA")
    )

    async def take() -> None:
        await Copy(database.host).take([request.body for request in (*sent, joined)])
        await database.host.close()

    asyncio.run(take())


def register(folder: Path, given: dict[str, str]) -> None:
    """Let a process register the application's handlers, and run what waits for them."""
    (folder / "app.py").write_text(APP)
    drained = command("worker", "--drain", "--app", "app:logto", folder=folder, **given)
    assert drained.returncode == 0, drained.stderr


def effects(folder: Path) -> Counter[str]:
    file = folder / "effects"
    return Counter(file.read_text().splitlines() if file.exists() else [])


def count_jobs(given: dict[str, str]) -> int:
    schema = given.get("LOGTO_WEBHOOKS_SCHEMA")
    table = f"{schema}.logto_jobs" if schema else "logto_jobs"
    url = given["LOGTO_WEBHOOKS_DATABASE_URL"]
    engine = postgres.sync_engine() if schema else sa.create_engine(url)
    with engine.connect() as connection:
        count = connection.scalar(sa.text(f"SELECT count(*) FROM {table}"))
    engine.dispose()
    return int(count or 0)


def test_each_row_once_however_often_it_is_killed(given: dict[str, str], tmp_path: Path) -> None:
    """kill -9 in the middle, three times; then it is run to its end, and then once more."""
    fill(given, COUNT)
    register(tmp_path, given)
    assert effects(tmp_path) == Counter()
    environment, before = clean_environment(given), 0
    for _ in range(3):
        slow = ["handlers", "run", "welcome", "--rate", "20"]
        running = Forked(slow, tmp_path, environment, errors=tmp_path / "errors")
        running.stderr.close()
        until(lambda: count_jobs(given) > before)  # noqa: B023
        running.kill()
        running.wait()
        before = count_jobs(given)
        assert 0 < before < COUNT + 3
        command("worker", "--drain", "--app", "app:logto", folder=tmp_path, **given)
    whole = ("handlers", "run", "welcome", "--rate", "10000", "--json")
    for made in (COUNT + 3 - before, 0):
        done = command(*whole, folder=tmp_path, **given)
        assert done.returncode == 0, done.stderr
        users, members = msgspec.json.decode(done.stdout)
        assert (users["event"], users["rows"]) == ("LocalUserCreated", COUNT)
        assert (members["event"], members["rows"]) == ("LocalMemberAdded", 3)
        assert users["jobs"] + members["jobs"] == made
        assert users["skipped"] + members["skipped"] == COUNT + 3 - made
        command("worker", "--drain", "--app", "app:logto", folder=tmp_path, **given)
    expected = [f"LocalUserCreated user:u{number:04} existing" for number in range(COUNT)]
    expected += [f"LocalMemberAdded user:u{number:04} existing" for number in range(3)]
    assert effects(tmp_path) == Counter(expected)


def test_the_command_says_what_it_does(tmp_path: Path) -> None:
    """Dry runs, filters, and each kind of bad input."""
    url = f"sqlite:///{tmp_path}/rows.db"
    given = {"LOGTO_WEBHOOKS_DATABASE_URL": url}
    command("migrate", folder=tmp_path, **given)
    fill(given, 5)

    def said(*arguments: str, code: int = 0) -> str:
        done = command("handlers", "run", *arguments, folder=tmp_path, **given)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    nobody = one_line(said("welcome", code=2))
    assert nobody == "error: There is no handler named 'welcome'. No handlers are registered."
    register(tmp_path, given)
    unknown = one_line(said("welcom", code=2))
    assert unknown.endswith("Known handlers: welcome (did you mean this?), raw.")
    assert "because it is for User.*. Only handlers of Local" in one_line(said("raw", code=2))
    assert "the rate can't be used: 0.0 isn't" in one_line(said("welcome", "--rate", "0", code=2))
    assert "--since can't be used" in one_line(said("welcome", "--since", "soon", code=2))
    several = one_line(said("welcome", "--user", "example", code=2))
    assert "several records match" in several
    assert said("welcome", "--user", "nobody", code=1).endswith("No rows match.\n")
    table = [line.split() for line in said("welcome", "--dry-run").splitlines()]
    assert table == [
        ["event", "rows", "would", "run", "skipped"],
        ["LocalUserCreated", "5", "5", "0"],
        ["LocalMemberAdded", "3", "3", "0"],
    ]
    assert count_jobs(given) == 0
    one = msgspec.json.decode(said("welcome", "--user", "u0004@example.com", "--json"))
    assert [(each["event"], each["jobs"]) for each in one] == [
        ("LocalUserCreated", 1),
        ("LocalMemberAdded", 0),
    ]
    of_members = [line.split() for line in said("welcome", "--organization", "Acme").splitlines()]
    assert of_members[1:] == [
        ["LocalUserCreated", "3", "3", "0"],
        ["LocalMemberAdded", "3", "3", "0"],
    ]


def test_a_backfill_runs_handlers_if_asked(given: dict[str, str], tmp_path: Path) -> None:
    """For users from before the installation; not without the option, and only if there are any.
    Whom it ran them for isn't told again."""

    async def live() -> None:
        async with FakeLogto() as logto:
            acme = logto.create_organization(name="Acme")["id"]
            people = [logto.create_user()["id"] for _ in range(3)]
            logto.add_members(acme, people[:2])
            await asyncio.to_thread(backfill_and_check, credentials(logto), people)

    def backfill_and_check(api: dict[str, str], people: list[str]) -> None:
        asked = ("backfill", "--run-handlers", "--json")
        (tmp_path / "app.py").write_text(APP)
        none = command(*asked, folder=tmp_path, **given, **api)
        assert none.returncode == 1
        assert one_line(none.stderr).startswith("No handlers are registered, so a backfill would")
        register(tmp_path, given)
        done = command(*asked, folder=tmp_path, **given, **api)
        assert done.returncode == 0, done.stderr
        assert msgspec.json.decode(done.stdout)["users"] == 3
        register(tmp_path, given)
        expected = [f"LocalUserCreated user:{person} backfill" for person in people]
        expected += [f"LocalMemberAdded user:{person} backfill" for person in people[:2]]
        assert effects(tmp_path) == Counter(expected)
        run: Any = command("handlers", "run", "welcome", "--json", folder=tmp_path, **given)
        assert [each["jobs"] for each in msgspec.json.decode(run.stdout)] == [0, 0]

    asyncio.run(live())


def test_a_backfill_with_handlers_of_other_events(tmp_path: Path) -> None:
    """Says which there are, and does nothing."""
    command("migrate", folder=tmp_path)
    (tmp_path / "app.py").write_text(APP.replace('"LocalUserCreated", "LocalMemberAdded"', '"*"'))
    drained = command("worker", "--drain", "--app", "app:logto", folder=tmp_path)
    assert drained.returncode == 2, "an event's type is checked"
    source = APP.replace('"LocalUserCreated", "LocalMemberAdded"', '"*"')
    source = source.replace(
        "event: events.LocalUserCreated | events.LocalMemberAdded", "event: events.Event"
    )
    (tmp_path / "app.py").write_text(source)
    drained = command("worker", "--drain", "--app", "app:logto", folder=tmp_path)
    assert drained.returncode == 0, drained.stderr
    api = {"LOGTO_ENDPOINT": "http://127.0.0.1:9", "LOGTO_M2M_APP_ID": "a"}
    api["LOGTO_M2M_APP_SECRET"] = "b"
    none = command("backfill", "--run-handlers", folder=tmp_path, **api)
    assert none.returncode == 1
    assert "None of the registered handlers (raw, welcome) is for local" in one_line(none.stderr)
