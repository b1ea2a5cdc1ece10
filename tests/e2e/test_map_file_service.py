"""What a service and the commands do with a file of mapped tables, beside filling them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from logto_webhooks import LogtoWebhooks
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import DeliveryOutcome, DeliveryState
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.map_files import OwnDatabase, own_database
from tests.support.service import Service, command, one_line
from tests.support.stores import delivery
from tests.support.waiting import until

USERS = """
[map.users]
table = "people"
key = "logto_id"
columns = { email = "email" }
when_deleted = "unlink"
"""
PEOPLE = "CREATE TABLE people (id INTEGER PRIMARY KEY, logto_id TEXT UNIQUE, email TEXT)"
APP = f"""
import sqlalchemy as sa

from logto_webhooks import LogtoWebhooks

teams = sa.Table(
    "teams",
    sa.MetaData(),
    sa.Column("logto_id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text),
)
logto = LogtoWebhooks(signing_key="{SIGNING_KEY}", database_url="sqlite:///app.db")
logto.map_organizations(teams, key="logto_id", columns={{"name": "name"}}, when_deleted="delete")
"""


@pytest.fixture
def database(tmp_path: Path) -> Iterator[OwnDatabase]:
    """A migrated SQLite file with one own table."""
    with own_database("sqlite", tmp_path) as own:
        own.execute(PEOPLE)
        assert command("migrate", folder=tmp_path, **own.variables).returncode == 0
        yield own


def fail(database: OwnDatabase, *arguments: str) -> str:
    """Run a command that refuses to work; return the line that it printed."""
    variables: dict[str, Any] = database.variables | {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
    done = command(*arguments, folder=database.folder, **variables)
    assert done.returncode == 2, done.stdout
    return one_line(done.stderr)


@pytest.mark.parametrize(
    "line", ["serve --port 0", "worker", "worker --drain", "mapping check", "mapping apply"]
)
def test_a_file_that_cannot_be_is_refused_in_one_line(database: OwnDatabase, line: str) -> None:
    """With exit code 2, before anything is received or written."""
    database.write(USERS.replace("email =", "emial ="))
    refused = fail(database, *line.split())
    assert refused.endswith(
        "logto-webhooks.toml, [map.users]: columns: the table people has no column emial; its "
        "columns are id, logto_id, email."
    )


@pytest.mark.parametrize("line", ["serve --port 0", "worker", "mapping check", "reconcile"])
def test_a_file_that_is_named_must_exist(database: OwnDatabase, line: str) -> None:
    """The one in the current folder need not."""
    refused = fail(database, *line.split(), "--map-file", "other.toml")
    assert refused.endswith("--map-file can't be used: there is no file other.toml.")


def test_another_file_can_be_named(database: OwnDatabase) -> None:
    """By an option or a variable, instead of the one in the current folder."""
    database.write("nonsense")
    database.write(USERS, "other.toml")
    applied = command(
        *("mapping", "apply", "--json", "--map-file", "other.toml"),
        folder=database.folder,
        **database.variables,
    )
    assert '"mapping":"people"' in applied.stdout, applied.stderr
    variables: dict[str, Any] = database.variables | {"LOGTO_WEBHOOKS_MAP_FILE": "other.toml"}
    with Service(database.folder, **variables) as service:
        assert service.post(make.user_created(id="ana", email="a@b.c")).status_code == 200
        until(lambda: database.rows("SELECT logto_id FROM people") == [("ana",)])


def test_the_tables_of_an_application_and_of_a_file_are_mapped(database: OwnDatabase) -> None:
    """By one service. A table of both is refused."""
    database.execute("CREATE TABLE teams (logto_id TEXT PRIMARY KEY, name TEXT)")
    database.write(USERS)
    database.write(APP, "app.py")
    variables: dict[str, Any] = database.variables
    with Service(database.folder, "--app", "app:logto", **variables) as service:
        service.post(make.user_created(id="ana", email="a@b.c"))
        service.post(make.organization_created(id="acme", name="Acme"))
        until(lambda: database.rows("SELECT logto_id FROM people") == [("ana",)])
        until(lambda: database.rows("SELECT name FROM teams") == [("Acme",)])
    checked = command("mapping", "check", "--app", "app:logto", folder=database.folder)
    assert checked.stdout == "Your mapped tables match Logto's records in the database.\n", (
        checked.stderr
    )
    database.write(USERS.replace("users", "organizations").replace("people", "teams"))
    refused = fail(database, "serve", "--port", "0", "--app", "app:logto")
    assert "[map.organizations]: columns: the table teams has no column email" in refused
    text = '[map.organizations]\ntable = "teams"\nkey = "logto_id"\nwhen_deleted = "keep"'
    database.write(text)
    refused = fail(database, "serve", "--port", "0", "--app", "app:logto")
    assert refused.endswith("[map.organizations]: teams: it is mapped already.")


def test_a_replay_writes_rows_before_any_service_has_run(database: OwnDatabase) -> None:
    """A dry run registers nothing. The delivery is dead, as after an error."""

    def add_dead(store: Store) -> None:
        store.add([delivery(make.user_created(id="ana", email="ana@x").body)])
        [claimed] = store.claim("worker", 1, 2**20, 30)
        store.finish("worker", [DeliveryOutcome(id=claimed.id, state=DeliveryState.DEAD)])

    async def receive() -> None:
        logto = LogtoWebhooks(signing_key=SIGNING_KEY, database_url=database.url)
        await logto.migrate()
        await logto.database.host.run(add_dead)
        await logto.close()

    asyncio.run(receive())
    database.write(USERS)
    variables: dict[str, Any] = database.variables
    for options, mapped in ((["--dry-run"], []), ([], [("people",)])):
        replay = ("deliveries", "replay", "1", "--sync-only", *options)
        done = command(*replay, folder=database.folder, **variables)
        assert done.returncode == 0, done.stderr
        assert database.rows("SELECT name FROM logto_mappings") == mapped
    assert database.rows("SELECT logto_id, email FROM people") == [("ana", "ana@x")]


def test_a_unique_value_that_stays_is_warned_about(database: OwnDatabase) -> None:
    """As with code."""
    database.execute("CREATE UNIQUE INDEX people_email ON people (email)")
    database.write(USERS.replace("unlink", "keep"))
    variables: dict[str, Any] = database.variables
    with Service(database.folder, **variables) as service:
        service.wait_for_log('when_deleted="keep", and email is unique')


def test_doctor_says_what_is_wrong_with_the_file(database: OwnDatabase) -> None:
    """And nothing, if nothing is."""
    variables: dict[str, Any] = database.variables | {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
    database.write(USERS.replace("people", "poeple"))
    found = command("doctor", "--only", "mappings", folder=database.folder, **variables)
    assert "[map.users]: there is no table poeple; the closest is people." in found.stdout
    database.write(USERS)
    with Service(database.folder, **variables):
        found = command("doctor", "--only", "mappings", folder=database.folder, **variables)
    assert found.returncode == 0, found.stdout


@pytest.mark.postgres
def test_with_a_spool_the_tables_are_read_once_the_database_is_there(tmp_path: Path) -> None:
    """Deliveries are received meanwhile. A mistake is logged, and mended without a restart."""
    with own_database("asyncpg", tmp_path) as database:
        database.write(USERS)
        variables: dict[str, Any] = database.variables
        with Service(tmp_path, "--spool-dir", "spool", **variables) as service:
            assert service.post(make.user_created(id="ana", email="a@b.c")).status_code == 200
            assert command("migrate", folder=tmp_path, **variables).returncode == 0
            service.wait_for_log("there is no table people; there are no tables")
            assert service.post(make.user_created(id="bo", email="b@b.c")).status_code == 200
            database.execute(PEOPLE.replace("INTEGER", "SERIAL"))
            query = "SELECT logto_id FROM people ORDER BY logto_id"
            until(lambda: database.rows(query) == [("ana",), ("bo",)], lambda: service.log)


@pytest.mark.postgres
def test_a_file_changes_what_was_written(tmp_path: Path) -> None:
    """A changed section is applied to all records again, and only when it changed."""
    with own_database("asyncpg", tmp_path) as database:
        database.execute(
            "CREATE SCHEMA crm",
            "CREATE TYPE crm.standing AS ENUM ('active', 'blocked')",
            "CREATE TABLE crm.people (id UUID PRIMARY KEY, data JSONB, email TEXT, level INTEGER, "
            "name TEXT NOT NULL, standing crm.standing NOT NULL)",
            "CREATE TABLE crm.roles (id SERIAL PRIMARY KEY, code TEXT UNIQUE)",
            "INSERT INTO crm.roles (code) VALUES ('editor')",
        )
        variables: dict[str, Any] = database.variables
        assert command("migrate", folder=tmp_path, **variables).returncode == 0
        text = """
            [map.users]
            table = "crm.people"
            key = "data.logto.id"
            fill = { id = "id" }
            when_deleted = { standing = "blocked", email = { null = true } }
            where = { "custom_data.plan" = ["pro", "team"] }
            [map.users.columns]
            email = "email"
            name = ["name", "username", "logto_user_id"]
            level = "is_suspended"
            standing = { if = "is_suspended", then = "blocked", else = "active" }
        """
        database.write(text)
        query = "SELECT data, email, level, name, CAST(standing AS TEXT) FROM crm.people"
        with Service(tmp_path, **variables) as service:
            for user, plan in (("ana", "pro"), ("bo", "free")):
                created = json.loads(make.user_created(id=user, email="a@b.c").body)["data"]
                changed = created | {"customData": {"plan": plan}, "name": None, "username": None}
                body = make.user_created(id=user, data=changed)
                assert service.post(body).status_code == 200
            wanted = [({"logto": {"id": "ana"}}, "a@b.c", 0, "ana", "active")]
            until(lambda: database.rows(query) == wanted, lambda: str(database.rows(query)))
        database.write(text.replace('level = "is_suspended"', 'level = "not is_suspended"'))
        assert command("worker", "--drain", folder=tmp_path, **variables).returncode == 0
        [(_, _, level, _, _)] = database.rows(query)
        assert level == 1
