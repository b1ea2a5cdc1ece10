"""Tables that a file maps: `serve` over real HTTP, on real databases, without an application."""

from __future__ import annotations

import asyncio
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.testing import SIGNING_KEY, make
from logto_webhooks.testing.fake import FakeLogto
from tests.support import postgres
from tests.support.doc_runner import Page
from tests.support.fake import credentials
from tests.support.map_files import KINDS, OwnDatabase, own_database
from tests.support.mounted import soon
from tests.support.service import Service, command
from tests.support.waiting import until

EXAMPLE = Path(__file__).parents[2] / "examples/own_tables"
PAGE = EXAMPLE.parents[1] / "docs/how-to/your-own-tables-without-code.md"
FILE = (EXAMPLE / "without_code/logto-webhooks.toml").read_text()
ANA = (
    "INSERT INTO users (email, first_name, plan, active) "
    "VALUES ('Ana@example.com', 'Anna', 'paid', true)"
)
MEMBERS = (
    "SELECT teams.name, users.email, team_members.role FROM team_members "
    "JOIN teams ON teams.id = team_id JOIN users ON users.id = user_id ORDER BY 1, 2"
)


@pytest.fixture(params=KINDS)
def database(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OwnDatabase]:
    """The tables of the example, with a user from before Logto."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1/none")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from teams.models import Base

    with own_database(request.param, tmp_path) as own:
        Base.metadata.create_all(own.engine)
        own.execute(ANA)
        assert command("migrate", folder=tmp_path, **own.variables).returncode == 0
        yield own
    for name in [name for name in sys.modules if name.partition(".")[0] == "teams"]:
        del sys.modules[name]


def serve(database: OwnDatabase, *options: str) -> Service:
    variables: dict[str, Any] = database.variables
    return Service(database.folder, *options, **variables)


def users(database: OwnDatabase) -> dict[str, tuple[Any, ...]]:
    rows = database.rows("SELECT email, logto_user_id, first_name, plan, active FROM users")
    return {email: tuple(row) for email, *row in rows}


@pytest.mark.parametrize("seed", range(2))
def test_an_application_in_any_language_gets_its_tables_filled(
    database: OwnDatabase, seed: int
) -> None:
    """Users are linked, teams and members written, in any order, with a file alone."""
    database.write(FILE)
    at = soon()
    sent = [
        make.organization_membership_updated(id="acme", addedUserIds=["ana", "bo", "cleo"], at=at),
        make.user_created(id="ana", email="ana@example.com", at=at),
        make.user_created(id="bo", email="bo@example.com", at=at),
        make.user_created(id="cleo", email="cleo@example.com", at=at),
        make.organization_created(id="acme", name="Acme", at=at),
        make.organization_membership_updated(
            id="acme", addedUserIds=[], removedUserIds=["cleo"], at=at + 1_000
        ),
    ]
    sent += sent[:3]
    random.Random(seed).shuffle(sent)
    with serve(database) as service:
        for delivery in sent:
            assert service.post(delivery).status_code == 200
        wanted = [("Acme", f"{name}@example.com", "member") for name in ("ana", "bo")]
        until(lambda: len(users(database)) == 3, lambda: service.log)
        until(lambda: database.rows(MEMBERS) == wanted, lambda: str(database.rows(MEMBERS)))
        service.post(make.user_deleted(id="bo", at=at + 2_000))
        until(lambda: database.rows(MEMBERS) == wanted[:1], lambda: str(database.rows(MEMBERS)))
        until(lambda: not users(database)["bo@example.com"][-1])
    assert users(database)["ana@example.com"] == ("ana", "Anna", "paid", 1)
    assert users(database)["cleo@example.com"][0::2] == ("cleo", "free")
    checked = command("mapping", "check", folder=database.folder, **database.variables)
    assert checked.stdout == "Your mapped tables match Logto's records in the database.\n", (
        checked.stderr
    )


def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    """Block by block, until it describes the sections."""
    with postgres.own_database() as url:
        mine = url.render_as_string(hide_password=False)
        engine = sa.create_engine(url.set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
        variables = {"DATABASE_URL": mine, "LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
        theirs = "postgresql://postgres@127.0.0.1/app"
        page = Page(tmp_path, {theirs: f"'{mine}'"}, engine=engine, environment=variables)
        try:
            page.follow(PAGE.read_text().partition("\n## The sections\n")[0])
        finally:
            page.end()


def test_a_handler_beside_the_file_welcomes_each_user_once(database: OwnDatabase) -> None:
    """As the page shows it. It waits for a row that is a conflict."""
    database.write(FILE)
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    database.write(code, "welcome.py")
    database.execute(
        "INSERT INTO users (email, plan, active) VALUES ('bo@x.example', 'free', true)"
    )
    database.execute("UPDATE users SET logto_user_id = 'other' WHERE email = 'bo@x.example'")
    ana = make.user_created(id="ana", email="ana@example.com")
    bo = make.user_created(id="bo", email="bo@x.example")
    welcomes = "SELECT text FROM welcomes ORDER BY text"
    with serve(database, "--app", "welcome:logto") as service:
        for delivery in [ana, bo, ana]:
            assert service.post(delivery).status_code == 200
        until(lambda: bool(database.rows(welcomes)), lambda: service.log)
        service.wait_for_log("a handler asked for a retry")
        assert database.rows(welcomes) == [("Welcome, ana@example.com!",)]
        database.execute("UPDATE users SET email = 'other@x.example' WHERE email = 'bo@x.example'")
        command("mapping", "apply", folder=database.folder, **database.variables)
        until(lambda: len(database.rows(welcomes)) == 2, lambda: service.log)
    assert database.rows(welcomes)[1] == ("Welcome, bo@x.example!",)


@pytest.mark.parametrize("name", ["backfill", "reconcile"])
def test_members_and_users_have_their_roles(database: OwnDatabase, name: str) -> None:
    """A command writes them by itself, before any service has run: it reads the same file."""
    database.write(FILE)
    database.execute("INSERT INTO roles (name) VALUES ('editor')")

    async def live() -> None:
        async with FakeLogto() as logto:
            ana = logto.create_user(primaryEmail="ana@example.com")["id"]
            bo = logto.create_user(primaryEmail="bo@example.com")["id"]
            acme = logto.create_organization(name="Acme")["id"]
            logto.add_members(acme, [ana, bo])
            logto.assign_organization_role(acme, bo, "admin")
            logto.assign_role(ana, "editor")
            asking = credentials(logto) | database.variables
            await asyncio.to_thread(fill, asking)

    def fill(asking: dict[str, str]) -> None:
        done = command(name, folder=database.folder, **asking)
        assert done.returncode == 0, done.stderr

    asyncio.run(live())
    assert database.rows(MEMBERS) == [
        ("Acme", "ana@example.com", "member"),
        ("Acme", "bo@example.com", "admin"),
    ]
    roles = (
        "SELECT email, name FROM user_roles JOIN users ON users.id = user_id "
        "JOIN roles ON roles.id = role_id"
    )
    assert database.rows(roles) == [("ana@example.com", "editor")]
