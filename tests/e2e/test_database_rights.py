"""The roles of docs/how-to/database-rights.md, on a real server; and what a missing right says."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.testing import make
from logto_webhooks.testing.fake import FakeLogto
from tests.support import postgres
from tests.support.service import Service, command, one_line
from tests.support.waiting import until

PAGE = Path(__file__).parents[2] / "docs/how-to/database-rights.md"
ADMINISTRATOR, OWNER, EXISTING = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)


class Roles:
    """A database with the page's two roles, whose names are of this test alone."""

    def __init__(self, url: sa.URL) -> None:
        mark = uuid.uuid4().hex[:8]
        self._url = url
        self.owner, self.app = f"owner_{mark}", f"app_{mark}"
        self.environment = {"LOGTO_WEBHOOKS_SCHEMA": "logto"}

    def url(self, role: str) -> str:
        return self._url.set(username=role).render_as_string(hide_password=False)

    def run(self, statements: str, role: str | None = None) -> None:
        """Run some of the page's statements as a role, else as the administrator."""
        named = statements.replace("logto_owner", self.owner).replace("logto_app", self.app)
        url = self._url if role is None else self._url.set(username=role)
        engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
        with engine.begin() as connection:
            for statement in filter(str.strip, named.split(";")):
                connection.exec_driver_sql(statement)
        engine.dispose()

    def scalar(self, query: str) -> object:
        engine = sa.create_engine(self._url.set(drivername="postgresql+psycopg"))
        with engine.connect() as connection:
            found: object = connection.scalar(sa.text(query))
        engine.dispose()
        return found


@pytest.fixture
def roles() -> Iterator[Roles]:
    with postgres.own_database() as url:
        made = Roles(url)
        made.run(ADMINISTRATOR)
        yield made
        for role in (made.app, made.owner):
            made.run(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_the_pages_grants_are_enough(roles: Roles, tmp_path: Path) -> None:
    """To migrate as the owner, and to receive, apply and reconcile as the other role."""
    roles.run(OWNER, roles.owner)
    for _ in range(2):
        done = command(
            "migrate",
            "--database-url",
            roles.url(roles.owner),
            folder=tmp_path,
            **roles.environment,
        )
        assert done.returncode == 0, done.stderr
    environment = {"LOGTO_WEBHOOKS_DATABASE_URL": roles.url(roles.app), **roles.environment}
    options = ("--database-url", roles.url(roles.app), "--schema", "logto")
    with Service(tmp_path, "--no-worker", *options) as service:
        assert service.post(make.user_created(id="ana")).status_code == 200
        worked = command("worker", "--drain", folder=tmp_path, **environment)
        assert worked.returncode == 0, worked.stderr
        found = roles.scalar("SELECT logto_user_id FROM logto.logto_users")
        assert found == "ana"
        assert "permission denied" not in service.log
    with Service(tmp_path, *options) as service:
        assert service.post(make.user_deleted(id="ana")).status_code == 200
        until(
            lambda: roles.scalar("SELECT deleted_at FROM logto.logto_users") is not None,
            lambda: service.log,
        )
    asyncio.run(_reconciled(environment, tmp_path))
    assert roles.scalar("SELECT count(*) FROM logto.logto_users") == 2


async def _reconciled(environment: dict[str, str], folder: Path) -> None:
    async with FakeLogto() as logto:
        logto.create_user(name="Bo")
        credentials = {
            "LOGTO_ENDPOINT": logto.url,
            "LOGTO_M2M_APP_ID": logto.app_id,
            "LOGTO_M2M_APP_SECRET": logto.app_secret,
        }

        def run() -> None:
            done = command("reconcile", folder=folder, **environment, **credentials)
            assert done.returncode == 0, done.stderr

        await asyncio.to_thread(run)


def test_a_missing_right_is_one_line_with_who_gives_it(roles: Roles, tmp_path: Path) -> None:
    """Step by step, until nothing is missing."""

    def told(name: str, role: str, **environment: str) -> str:
        url = roles.url(role)
        ended = command(name, "--database-url", url, folder=tmp_path, **environment)
        assert ended.returncode == 2, ended.stdout
        return one_line(ended.stderr)

    ours = roles.environment
    absent = told("migrate", roles.app, LOGTO_WEBHOOKS_SCHEMA="absent")
    assert f"CREATE SCHEMA name AUTHORIZATION {roles.app}" in absent
    denied = told("migrate", roles.app, **ours)
    assert f"GRANT USAGE, CREATE ON SCHEMA logto TO {roles.app}" in denied
    done = command(
        "migrate", "--database-url", roles.url(roles.owner), folder=tmp_path, **roles.environment
    )
    assert done.returncode == 0, done.stderr
    assert f"GRANT USAGE ON SCHEMA logto TO {roles.app}" in told("status", roles.app, **ours)
    roles.run("GRANT USAGE ON SCHEMA logto TO logto_app", roles.owner)
    assert "GRANT SELECT, INSERT, UPDATE, DELETE ON logto_" in told("status", roles.app, **ours)
    roles.run(EXISTING, roles.owner)
    well = command("status", "--database-url", roles.url(roles.app), folder=tmp_path, **ours)
    assert well.returncode == 0, well.stderr


def test_the_printed_statements_need_no_right_on_the_database_either(
    roles: Roles, tmp_path: Path
) -> None:
    """Where the schema exists."""
    url = roles.url(roles.owner)
    printed = command(
        "migrate", "--sql", "--database-url", url, folder=tmp_path, **roles.environment
    )
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql(printed.stdout.replace("%", "%%"))
    engine.dispose()
    assert roles.scalar("SELECT count(*) FROM logto.logto_users") == 0
