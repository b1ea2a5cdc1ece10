"""`logto-webhooks mapping …`, as the reader of its output sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from logto_webhooks import LogtoWebhooks
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.service import command, one_line
from tests.support.stores import Copy

OURS = "sqlite:///app.db"
APP = """
import os

import sqlalchemy as sa

from logto_webhooks import LogtoWebhooks

metadata = sa.MetaData()
people = sa.Table(
    "people",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("logto_id", sa.Text, unique=True),
    sa.Column("email", sa.Text, unique=True),
)
logto = LogtoWebhooks(
    signing_key="KEY",
    engine=sa.create_engine(os.environ.get("APP_URL", "sqlite:///app.db")),
    schema=os.environ.get("APP_SCHEMA"),
)
logto.map_users(people, key="logto_id", columns={"email": "email"}, when_deleted="delete")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An application that maps users, and its database."""
    (tmp_path / "app.py").write_text(APP.replace("KEY", SIGNING_KEY))
    columns = "id INTEGER PRIMARY KEY, logto_id TEXT UNIQUE, email TEXT UNIQUE"
    execute(tmp_path, f"CREATE TABLE people ({columns})")
    assert command("migrate", folder=tmp_path, DATABASE_URL=OURS).returncode == 0
    return tmp_path


def execute(folder: Path, *statements: str) -> None:
    """Run SQL in the application's database."""
    engine = sa.create_engine(f"sqlite:///{folder / 'app.db'}")
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    engine.dispose()


def take(folder: Path, *sent: SignedRequest) -> None:
    """Apply deliveries in a process that doesn't have the mapping."""

    async def run() -> None:
        application = LogtoWebhooks(
            signing_key=SIGNING_KEY, database_url=f"sqlite:///{folder / 'app.db'}"
        )
        await Copy(application.database.host).take([delivery.body for delivery in sent])
        await application.close()

    asyncio.run(run())


def run(
    folder: Path, *arguments: str, code: int = 0, app: str = "app:logto", **variables: Any
) -> Any:
    """Run a `mapping` command with `--json`; return what it printed."""
    done = command("mapping", *arguments, "--app", app, "--json", folder=folder, **variables)
    assert done.returncode == code, done.stderr
    return msgspec.json.decode(done.stdout)


def fail(folder: Path, *arguments: str, code: int = 2, **variables: Any) -> str:
    """Run a `mapping` command that fails; return the line that it printed."""
    done = command("mapping", *arguments, folder=folder, **variables)
    assert done.returncode == code, done.stdout
    return one_line(done.stderr)


@pytest.mark.parametrize("name", ["check", "apply"])
def test_without_an_application_it_says_what_to_pass(folder: Path, name: str) -> None:
    """In the words of the other commands."""
    assert fail(folder, name) == (
        "error: No tables are mapped. Pass --app module:name, or write the file "
        "logto-webhooks.toml."
    )


@pytest.mark.parametrize("name", ["check", "apply"])
def test_another_database_is_never_used_without_a_word(folder: Path, name: str) -> None:
    """An option for it is refused. A variable may be for something else, so that is a warning."""
    with_app = (name, "--app", "app:logto")
    own = str(folder / "app.db")
    refused = fail(folder, *with_app, "--database-url", "sqlite:///other.db")
    assert refused == (
        f"error: --database-url can't be used: the application has its own, {own}: "
        "leave the option out."
    )
    warned = command("mapping", *with_app, folder=folder, DATABASE_URL="sqlite:///other.db")
    assert warned.returncode == 0, warned.stderr
    assert f"DATABASE_URL has no effect here: the application uses {own}" in warned.stderr
    assert not (folder / "other.db").exists()
    same = command("mapping", *with_app, "--database-url", OURS, folder=folder)
    assert (same.returncode, same.stderr) == (0, "")


@pytest.mark.postgres
@pytest.mark.parametrize("name", ["check", "apply"])
def test_another_schema_is_never_used_without_a_word(folder: Path, name: str) -> None:
    """As another database."""
    url = postgres.server_url().set(drivername="postgresql+psycopg")
    own: dict[str, Any] = {
        "APP_URL": url.render_as_string(hide_password=False),
        "APP_SCHEMA": "theirs",
    }
    refused = fail(folder, name, "--app", "app:logto", "--schema", "other", **own)
    assert refused == (
        "error: --schema can't be used: the application has its own, theirs: leave the option out."
    )


def test_an_unknown_mapping_is_not_found(folder: Path) -> None:
    """As other unknown names: exit code 1."""
    run(folder, "apply")
    here: dict[str, Any] = {"DATABASE_URL": OURS}
    line = fail(folder, "forget", "nix", code=1, **here)
    assert line == "There is no mapping named 'nix'. See: logto-webhooks mapping list"
    assert fail(folder, "list", "--schema", "1", **here).startswith("error: --schema")
    assert command("mapping", "forget", "people", folder=folder, **here).returncode == 0


def test_check_shows_the_reason_and_what_is_in_the_way(folder: Path) -> None:
    """As many rows are refused as by `mapping apply`, really or not."""
    execute(folder, "INSERT INTO people (id, email) VALUES (61, 'ana@x')")
    take(folder, make.user_created(id="ana", email="ana@x"), make.user_created(id="bo"))
    [ana, bo] = run(folder, "check", code=1)
    assert ana == {
        "mapping": "people",
        "problem": "missing",
        "logto_id": "ana",
        "columns": [],
        "state": "refused",
        "reason": "another row has the value of email",
        "blocked_by": "[61]",
    }
    assert (bo["logto_id"], bo["problem"], bo["state"]) == ("bo", "missing", None)
    printed = command("mapping", "check", "--app", "app:logto", folder=folder)
    assert "another row has the value of email (row 61)" in printed.stdout
    assert "2 differences: 2 missing. Not written by mapping apply: 1 refused." in printed.stderr
    for options in (["--dry-run"], []):
        [applied] = run(folder, "apply", *options, code=1)
        assert (applied["refused"], applied["created"]) == (1, 1)


def test_a_mapping_that_cannot_be_checked_is_a_failure(folder: Path) -> None:
    """With what to do."""
    execute(folder, "ALTER TABLE people RENAME COLUMN email TO mail")
    printed = command("mapping", "check", "--app", "app:logto", folder=folder)
    assert (printed.returncode, printed.stdout) == (2, "")
    assert one_line(printed.stderr) == (
        "The mapping people can't be checked: The column people.email doesn't exist. Run your "
        "migrations."
    )
    [unchecked] = run(folder, "check", code=2)
    assert (unchecked["problem"], unchecked["logto_id"]) == ("unchecked", None)


def test_rows_that_wait_are_no_failure_of_apply(folder: Path) -> None:
    """It says where to see for what they wait."""
    app = (folder / "app.py").read_text()
    (folder / "app.py").write_text(
        app.replace('"email", sa.Text,', '"email", sa.Text, nullable=False,')
    )
    take(folder, make.user_created(id="ana", primaryEmail=None))
    [applied] = run(folder, "apply")
    assert (applied["waiting"], applied["refused"]) == (1, 0)
    printed = command("mapping", "apply", "--app", "app:logto", folder=folder)
    assert "Some rows wait. To see for what, run: logto-webhooks mapping check" in printed.stderr
    [waiting] = run(folder, "check", code=1)
    assert (waiting["problem"], waiting["state"]) == ("waiting", "waiting")
    assert waiting["reason"] == "email is NOT NULL, but Logto has no value"


def test_users_whom_where_excludes_are_shown(folder: Path) -> None:
    """By `mapping check` and `mapping apply`, also before it writes, by `mapping list` and
    `status`; `doctor` warns."""
    app = (folder / "app.py").read_text()
    changed = app.replace(
        'when_deleted="delete"', 'when_deleted="delete", where=lambda user: False'
    )
    (folder / "app.py").write_text(changed)
    take(folder, make.user_created(id="ana"), make.user_created(id="bo"))
    checked = command("mapping", "check", "--app", "app:logto", folder=folder)
    assert checked.returncode == 0
    assert "people: 2 records get no row, because of `where` or create=False." in checked.stderr
    for options in (["--dry-run"], []):
        [applied] = run(folder, "apply", *options)
        assert (applied["records"], applied["excluded"], applied["created"]) == (2, 2, 0)
    for name in (["mapping", "list"], ["status"]):
        printed = command(*name, folder=folder, DATABASE_URL=OURS)
        lines = [line.split() for line in printed.stdout.splitlines()]
        [header] = [line for line in lines if "excluded" in line and "mapping" in line]
        [row] = [line for line in lines if line and line[0] == "people"]
        assert row[header.index("excluded")] == "2", printed.stdout
    found = command("doctor", "--only", "mappings", "--json", folder=folder, DATABASE_URL=OURS)
    codes = [finding["code"] for finding in msgspec.json.decode(found.stdout)]
    assert "mapping_excludes_all" in codes


def test_advice_names_the_options_of_the_command(folder: Path) -> None:
    """So what it says can be run as it is. What comes from a variable needn't be repeated."""
    execute(folder, "INSERT INTO people (id, email) VALUES (61, 'ana@x')")
    take(folder, make.user_created(id="ana", email="ana@x"))
    see = "To see why, run: logto-webhooks mapping check"
    printed = command("mapping", "apply", "--app", "app:logto", folder=folder)
    assert printed.stderr.splitlines()[-1].endswith(f"{see} --app app:logto")
    set_app: dict[str, Any] = {"LOGTO_WEBHOOKS_APP": "app:logto"}
    printed = command("mapping", "apply", folder=folder, **set_app)
    assert printed.stderr.splitlines()[-1].endswith(see)
    doctor = ("doctor", "--only", "mappings", "--app")
    found = command(*doctor, "app:logto", folder=folder, DATABASE_URL=OURS)
    assert "To see all, run logto-webhooks mapping check --app app:logto. After" in found.stdout
    found = command(*doctor[:-1], folder=folder, DATABASE_URL=OURS)
    assert "mapping check, with --app if your application has the mappings." in found.stdout


@pytest.mark.parametrize("name", ["check", "apply"])
def test_an_application_that_could_not_start_is_refused(folder: Path, name: str) -> None:
    """Its members refer to teams that it doesn't map."""
    members = """
teams = sa.Table("teams", metadata, sa.Column("id", sa.Integer, primary_key=True))
seats = sa.Table(
    "seats",
    metadata,
    sa.Column("team", sa.ForeignKey("teams.id"), primary_key=True),
    sa.Column("person", sa.ForeignKey("people.id"), primary_key=True),
)
logto.map_members(seats, organization="team", user="person")
"""
    (folder / "app.py").write_text(APP.replace("KEY", SIGNING_KEY) + members)
    refused = command("mapping", name, "--app", "app:logto", folder=folder)
    assert refused.returncode != 0
    assert "refers to teams, which isn't mapped: call map_organizations" in one_line(refused.stderr)
