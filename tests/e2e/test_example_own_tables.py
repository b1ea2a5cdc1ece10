"""The example with tables of its own, as its README runs it: real HTTP and PostgreSQL."""

from __future__ import annotations

import ast
import asyncio
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import SIGNING_KEY, make
from logto_webhooks.testing.fake import FakeLogto
from tests.support import postgres
from tests.support.doc_runner import Page
from tests.support.fake import credentials
from tests.support.mounted import soon
from tests.support.servers import free_port
from tests.support.service import PATH
from tests.support.waiting import until

FOLDER = Path(__file__).parents[2] / "examples/own_tables"
README = (FOLDER / "README.md").read_text()
SERVE = "uvicorn teams.main:app --port 8787 --timeout-keep-alive 75"
MOST_LINES = 25
EXISTING: list[dict[str, Any]] = [
    {"email": "Ana@example.com", "first_name": "Anna", "plan": "paid", "active": True},
    {"email": "nobody@example.com", "first_name": None, "plan": "paid", "active": True},
]


class Example:
    """The running application, and its database."""

    def __init__(self, page: Page, port: int, engine: sa.Engine) -> None:
        self._page = page
        self._engine = engine
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def run(self, line: str, before: str = "") -> str:
        """Run a line that the README has, until all that follows from it is done. `before` sets
        more variables."""
        assert f"\n{line}\n" in README, line
        return self._page.run(before + line)

    def send(self, *sent: SignedRequest) -> None:
        """As Logto does."""
        for each in sent:
            answer = self.http.post(PATH, content=each.body, headers=each.headers)
            assert answer.status_code == 200, answer.text
        self._page.run(":")  # until all is applied

    def users(self) -> dict[str, dict[str, Any]]:
        """What the application shows, by email."""
        return {row["email"]: row for row in self.http.get("/users").json()}

    def members(self) -> list[tuple[str, ...]]:
        """The team, the email and the role of each."""
        return [tuple(row.values()) for row in self.http.get("/members").json()]

    def insert(self, *rows: dict[str, Any]) -> None:
        """Add users to the application's table."""
        table = sa.table("users", *(sa.column(name) for name in rows[0]))
        with self._engine.begin() as connection:
            connection.execute(sa.insert(table), list(rows))


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Example]:
    """The application on a database and a port of its own."""
    with postgres.own_database() as url:
        exported = {
            "DATABASE_URL": url.render_as_string(hide_password=False),
            "LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY,
        }
        assert all(f"export {name}=" in README for name in exported)
        assert f"\n{SERVE}\n" in README
        port = free_port()
        engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
        page = Page(
            FOLDER,
            {"--port 8787": f"--port {port} --no-access-log"},
            logs=tmp_path,
            engine=engine,
            environment=exported | {"LOGTO_WEBHOOKS_PORT": str(port)},
        )
        running = Example(page, port, engine)
        try:
            running.run("logto-webhooks migrate")
            page.start("uvicorn", SERVE, "Uvicorn running")
            yield running
        finally:
            running.http.close()
            page.end()
            engine.dispose()


def changed(created: SignedRequest, email: str, at: int) -> SignedRequest:
    """What Logto sends when a new user changes the email."""
    user = json.loads(created.body)["data"] | {"primaryEmail": email, "updatedAt": at}
    return make.user_data_updated(id=user["id"], data=user, at=at)


def lines(block: str) -> list[str]:
    return [line for line in block.splitlines() if not line.startswith("curl ")]


def test_the_readme_says_what_happens(example: Example) -> None:
    """Ana's row is linked, Bo's is new, and stays when Bo is deleted."""
    _, insert, sign_up, deletion, _ = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in [*lines(insert), *lines(sign_up)]:
        example.run(line)
    users = example.users()
    ana, bo = users["ana@example.com"], users["bo@example.com"]
    assert (ana["logto_user_id"], ana["plan"], ana["first_name"]) == ("ana", "paid", "Anna")
    assert (bo["logto_user_id"], bo["plan"], bo["active"]) == ("bo", "free", True)
    assert [len(each["welcomes"]) for each in (ana, bo)] == [1, 1]
    assert example.members() == [
        ("Acme", "ana@example.com", "member"),
        ("Acme", "bo@example.com", "member"),
    ]
    for line in lines(deletion):
        printed = example.run(line)
    assert printed == "Your mapped tables match Logto's records in the database.\n"
    assert example.users()["bo@example.com"]["active"] is False
    assert example.members() == [("Acme", "ana@example.com", "member")]


@pytest.mark.parametrize("seed", range(3))
def test_order_and_duplicates_do_not_matter(example: Example, seed: int) -> None:
    """Each user has one row and one welcome; nobody gets the row of somebody else."""
    example.insert(*EXISTING)
    at, names = soon(), ["ana", "bo", "cleo", "dan"]
    sent = [make.user_created(id=name, email=f"{name}@example.com", at=at) for name in names]
    sent += [
        changed(sent[2], "dan@example.com", at + 2_000),
        changed(sent[3], "cleo@example.com", at + 2_000),
        make.organization_created(id="acme", name="Acme", at=at),
        make.organization_membership_updated(id="acme", addedUserIds=names, at=at),
        make.organization_membership_updated(id="acme", removedUserIds=["bo"], at=at + 1_000),
        make.user_deleted(id="bo", at=at + 3_000),
    ]
    sent += sent[:4]
    random.Random(seed).shuffle(sent)
    example.send(*sent)
    users = example.users()
    wanted = {"ana@example.com": "ana", "cleo@example.com": "dan", "dan@example.com": "cleo"}
    assert {email: users[email]["logto_user_id"] for email in wanted} == wanted
    assert users["nobody@example.com"]["logto_user_id"] is None
    assert users["nobody@example.com"]["welcomes"] == [None]
    assert all(
        len(users[email]["welcomes"]) == 1 and users[email]["welcomes"][0] for email in wanted
    )
    assert users["ana@example.com"]["plan"] == "paid"
    assert [email for _, email, _ in example.members()] == sorted(wanted)


def test_users_have_the_roles_that_they_have_in_logto(example: Example) -> None:
    """Those that the application knows."""

    async def live() -> None:
        async with FakeLogto() as logto:
            for name, roles in (("ana", ["editor"]), ("bo", ["editor", "auditor"]), ("cleo", [])):
                user = logto.create_user(primaryEmail=f"{name}@example.com")
                for role in roles:
                    logto.assign_role(user["id"], role)
            asking = " ".join(f"{name}={value}" for name, value in credentials(logto).items())
            await asyncio.to_thread(follow, asking)

    def follow(asking: str) -> None:
        *_, roles = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
        insert, reconcile = lines(roles)
        example.run(insert)
        example.run(reconcile, before=f"{asking} ")
        until(lambda: len(example.http.get("/roles").json()) == 2)

    asyncio.run(live())
    assert example.http.get("/roles").json() == [
        {"email": "ana@example.com", "name": "editor"},
        {"email": "bo@example.com", "name": "editor"},
    ]


def test_its_mappings_and_handlers_are_short() -> None:
    """At most 25 lines."""
    tree = ast.parse((FOLDER / "teams/logto.py").read_text())
    ours = [
        node
        for node in tree.body
        if isinstance(node, ast.AsyncFunctionDef)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    ]
    first = [
        min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        for node in ours
    ]
    count = sum((node.end_lineno or 0) - start + 1 for node, start in zip(ours, first, strict=True))
    assert 0 < count <= MOST_LINES
