"""The example with FastAPI, as its README runs it: real processes, HTTP and PostgreSQL."""

from __future__ import annotations

import json
import re
import shlex
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.doc_runner import Page
from tests.support.mounted import soon
from tests.support.service import PATH
from tests.support.waiting import until

FOLDER = Path(__file__).parents[2] / "examples/fastapi"
README = (FOLDER / "README.md").read_text()
MIGRATIONS = ("alembic upgrade head", "logto-webhooks migrate")
OWN_TABLES = {"workspaces", "sign_ins", "greetings", "notes"}


@pytest.fixture
def database() -> Iterator[sa.URL]:
    """An empty database, dropped afterwards."""
    with postgres.own_database() as url:
        yield url


@pytest.fixture
def page(database: sa.URL, tmp_path: Path) -> Page:
    """The README, with what it exports, and a server on a port of its own."""
    exported = {
        "DATABASE_URL": database.render_as_string(hide_password=False),
        "LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY,
        "TOKEN_SECRET": uuid.uuid4().hex,
    }
    assert all(f"export {name}=" in README for name in exported)
    port = {"--port 8787": "--port 0 --no-access-log"}
    return Page(FOLDER, port, logs=tmp_path, environment=exported)


def run(page: Page, *lines: str) -> None:
    """Run lines that the README has."""
    for line in lines:
        assert f"\n{line}\n" in README, line
        page.run(line)


def tables(database: sa.URL) -> set[str]:
    engine = sa.create_engine(database.set(drivername="postgresql+psycopg"))
    try:
        return set(sa.inspect(engine).get_table_names())
    finally:
        engine.dispose()


class Application:
    """The example's own server; killed at the end of the block, unless it has ended."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def __enter__(self) -> Application:
        line = "uvicorn app.main:app --port 8787 --timeout-keep-alive 75"
        assert f"\n{line}\n" in README
        self._started = self._page.start("uvicorn", line, "Uvicorn running")
        self.process = self._started.process
        found = re.search(r"running on (http://127\.0\.0\.1:\d+)", self.log)
        assert found, self.log
        self.http = httpx2.Client(base_url=found[1], timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        """What the server wrote so far."""
        return self._started.log

    def send(self, delivery: SignedRequest, path: str = PATH) -> None:
        """As Logto does; anything but 200 from there, without a redirect, is a failure."""
        answer = self.http.post(path, content=delivery.body, headers=delivery.headers)
        assert answer.status_code == 200, answer.text
        assert not answer.history

    def ask(self, method: str, path: str, token: str, **more: Any) -> httpx2.Response:
        """As a user with a token does."""
        headers = {"Authorization": f"Bearer {token}"}
        return self.http.request(method, path, headers=headers, **more)

    def wait_for_workspace(self, token: str, **wanted: object) -> None:
        """Wait until a user's workspace has these values."""

        def holds() -> bool:
            answer = self.ask("GET", "/workspace", token)
            return answer.status_code == 200 and wanted.items() <= answer.json().items()

        until(holds, lambda: self.ask("GET", "/workspace", token).text + self.log, seconds=60)


def token_of(page: Page, claims: str) -> str:
    """A token as the README makes it."""
    assert "$(python -m app.auth '" in README
    return page.run(f"python -m app.auth '{claims}'").strip()


def tokens_of(page: Page, people: list[str]) -> list[str]:
    """A token for each, made in one process."""
    code = "import sys; from app.auth import token_of\n"
    code += "for person in sys.argv[1:]: print(token_of({'sub': person}))"
    return page.run(shlex.join(["python", "-c", code, *people])).split()


def signed_up(person: str, at: int) -> tuple[SignedRequest, SignedRequest]:
    """What Logto sends of a sign-up: both tell the same user."""
    created = make.user_created(id=person, name=person, at=at)
    user = json.loads(created.body)["data"]
    return created, make.post_sign_in(id=person, user=user, at=at)


def test_each_migrates_its_own(database: sa.URL, page: Page) -> None:
    """Alembic finds nothing to do about our tables, and goes back without them; so do we."""
    run(page, *MIGRATIONS, "alembic check")
    both = tables(database)
    assert both >= OWN_TABLES | {"alembic_version", "logto_users", "logto_schema_version"}
    page.run("alembic downgrade base")
    assert tables(database) == both - OWN_TABLES
    run(page, *MIGRATIONS)
    assert tables(database) == both


def test_nothing_is_lost_when_it_is_killed(page: Page) -> None:
    """What was answered 200 has all its effects, each once; then it ends when it is told to."""
    run(page, *MIGRATIONS)
    at, people = soon(), [f"person-{number}" for number in range(8)]
    tokens = tokens_of(page, people)
    with Application(page) as application:
        for number, person in enumerate(people):
            for delivery in signed_up(person, at + number):
                application.send(delivery, PATH + "/" * (number % 2))
        application.process.send_signal(signal.SIGKILL)
        application.process.wait()

    with Application(page) as application:
        for person, token in zip(people, tokens, strict=True):
            application.wait_for_workspace(
                token,
                title=f"Workspace of {person}",
                name=person,
                sign_ins=1,
                greetings=[f"Welcome, {person}!"],
            )
        application.process.terminate()
        assert application.process.wait(timeout=20) in (0, -signal.SIGTERM)
        assert "The application has stopped" in application.log
        assert "Finished server process" in application.log


def test_what_the_readme_shows(page: Page) -> None:
    """A user whom a webhook told of, one who was early, and one who has left."""
    run(page, *MIGRATIONS)
    ana = token_of(page, '{"sub": "ana"}')
    bo = token_of(page, '{"sub": "bo", "name": "Bo"}')
    forged = ana[:-1] + ("0" if ana[-1] != "0" else "1")
    with Application(page) as application:
        assert application.http.get("/workspace").status_code == 401
        for bad in (forged, "nonsense", "WzVd."):
            assert application.ask("GET", "/workspace", bad).status_code == 401
        assert application.ask("GET", "/workspace", ana).status_code == 404

        to = f"{application.http.base_url}".rstrip("/") + PATH
        for line in re.findall(r"^logto-webhooks trigger .*$", README, re.MULTILINE):
            page.run(f"{line} --to {to}")
            until(lambda: application.ask("GET", "/workspace", ana).status_code == 200)
        application.wait_for_workspace(
            ana, name="Ana", email="ana@example.com", sign_ins=1, greetings=["Welcome, Ana!"]
        )

        written = application.ask("POST", "/notes", bo, json={"text": "Bread"})
        assert (written.status_code, written.json()["author"]) == (201, "bo")
        application.wait_for_workspace(bo, title="Workspace of Bo", notes=["Bread"])

        application.send(make.user_deleted(id="bo", at=soon()))
        until(lambda: application.ask("GET", "/workspace", bo).status_code == 404)
        assert application.ask("POST", "/notes", bo, json={"text": "Milk"}).status_code == 403

        operation = application.http.get("/openapi.json").json()["paths"][PATH]["post"]
        schemas = {
            status: answer["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            for status, answer in operation["responses"].items()
        }
        assert schemas == {"200": "AcceptedBody"} | dict.fromkeys(
            ("400", "401", "413", "503"), "RefusedBody"
        )
