"""What the application's database makes of a row that is written: it skips the change, refuses it
in unusual ways, ends the transaction or the session. Others go on, and what is wrong is marked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.database import runner
from logto_webhooks.database.mapped_rows import UnwrittenRows
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.statement_limits import read_waits
from logto_webhooks.database.store import Store
from logto_webhooks.mapping import row_limits
from logto_webhooks.mapping.apply import OWED, UNSETTLED, SlowRows, retry_unsettled
from logto_webhooks.mapping.table_writer import NO_KEY, NOT_CHANGED
from logto_webhooks.records.record import Key
from logto_webhooks.testing import make
from tests.integration.test_mapping_slow_rows import check_done, created, renamed
from tests.support.mapped_application import KINDS, Application
from tests.support.stores import Copy, StoreKind, delivery
from tests.support.waiting import eventually

OTHERS = [f"u{n}" for n in range(20)]
NAMES = [*OTHERS[:9], "odd", *OTHERS[9:]]


def add_trigger(application: Application, table: sa.Table, event: str, body: str) -> None:
    """Let a trigger do something before a row is written: in PL/pgSQL, or for SQLite in SQL."""
    with application.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            trigger = f"CREATE TRIGGER odd BEFORE {event} ON {table} {body}"
            connection.execute(sa.text(trigger))
            return
        function = "CREATE OR REPLACE FUNCTION app.odd() RETURNS trigger LANGUAGE plpgsql AS"
        row = "OLD" if event == "DELETE" else "NEW"
        connection.execute(sa.text(f"{function} $$ BEGIN {body} RETURN {row}; END $$"))
        trigger = f"CREATE TRIGGER odd BEFORE {event} ON {table} FOR EACH ROW"
        connection.execute(sa.text(f"{trigger} EXECUTE FUNCTION app.odd()"))


async def find_unwritten(host: HandlerRunner) -> list[UnwrittenRows]:
    return await host.read(lambda store: store.mappings.list_unwritten(UNSETTLED))


@pytest.mark.parametrize("event", ["UPDATE", "DELETE"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_that_the_database_skips_is_a_conflict(
    kind: StoreKind, event: str, tmp_path: Path
) -> None:
    """Such as a trigger, a rule or a policy, without an error. Others are changed."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        await copy.take(created(*NAMES))
        is_odd = "OLD.logto_user_id = 'odd'"
        if kind == "sqlite":
            body = f"WHEN {is_odd} BEGIN SELECT RAISE(IGNORE); END"
        else:
            body = f"IF {is_odd} THEN RETURN NULL; END IF;"
        add_trigger(application, application.users, event, body)
        if event == "UPDATE":
            await copy.take(renamed(*NAMES))
        else:
            await copy.take([make.user_deleted(id=name, at=3_000).body for name in NAMES[5:12]])
        await check_done(host)
        [skipped] = await find_unwritten(host)
        assert (skipped.state, skipped.reason, skipped.count) == ("conflict", NOT_CHANGED, 1)
        rows = dict(application.rows(application.users, "logto_user_id", "email"))
        assert rows["odd"] == "odd@x"
        expected = dict.fromkeys(NAMES, "y") if event == "UPDATE" else dict.fromkeys(NAMES, "x")
        for name in NAMES[5:12] if event == "DELETE" else ():
            del expected[name]
        expected["odd"] = "x"
        assert rows == {name: f"{name}@{place}" for name, place in expected.items()}
        with application.engine.begin() as connection:
            on = "" if kind == "sqlite" else f" ON {application.users}"
            connection.execute(sa.text(f"DROP TRIGGER odd{on}"))
        await retry_unsettled(host, application.mappings)
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_deletion_of_a_member_is_a_conflict(kind: StoreKind, tmp_path: Path) -> None:
    """Somebody would keep access, and nothing would say so."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        told = make.organization_membership_updated
        team = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
        joined = told(id="acme", addedUserIds=OTHERS, at=1_500).body
        await copy.take([team, *created(*OTHERS), joined])
        body = "BEGIN SELECT RAISE(IGNORE); END" if kind == "sqlite" else "RETURN NULL;"
        add_trigger(application, application.members, "DELETE", body)
        await copy.take(
            [told(id="acme", addedUserIds=[], removedUserIds=OTHERS[:3], at=2_000).body]
        )
        await check_done(host)
        [skipped] = await find_unwritten(host)
        assert (skipped.state, skipped.reason, skipped.count) == ("conflict", NOT_CHANGED, 3)

    Application.run(kind, tmp_path, live)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", ["asyncpg", "postgres-thread"])
def test_a_trigger_that_changes_what_is_written_is_no_fault(
    kind: StoreKind, tmp_path: Path
) -> None:
    """Such as one that makes e-mail addresses lower case."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        add_trigger(application, application.users, "UPDATE", "NEW.email := upper(NEW.email);")
        await copy.take(created(*OTHERS))
        await copy.take(renamed(*OTHERS))
        assert await find_unwritten(host) == []
        rows = application.rows(application.users, "email")
        assert set(rows) == {(f"{name}@y".upper(),) for name in OTHERS}

    Application.run(kind, tmp_path, live)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", ["asyncpg", "postgres-thread"])
@pytest.mark.parametrize(
    "fault",
    [
        "INSERT INTO app.missing VALUES (1);",
        "EXECUTE 'no SQL';",
        "PERFORM currval('app.users_id_seq'), lo_unlink(1);",
    ],
)
def test_a_trigger_that_fails_for_a_row_holds_back_that_row_alone(
    kind: StoreKind, fault: str, tmp_path: Path
) -> None:
    """Whatever the error's code is: the table itself can be used."""

    async def live(application: Application) -> None:
        host = await application.map()
        body = f"IF NEW.logto_user_id = 'odd' THEN {fault} END IF;"
        add_trigger(application, application.users, "INSERT", body)
        await Copy(host).take(created(*NAMES))
        await check_done(host)
        [refused] = await find_unwritten(host)
        assert (refused.state, refused.count) == ("conflict", 1)
        assert "trigger or function" in str(refused.reason)
        assert len(application.rows(application.users, "id")) == len(OTHERS)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("odd", [["odd"], [f"odd{n}" for n in range(12)]])
@pytest.mark.parametrize("how", ["trigger", "constraint"])
def test_a_row_that_rolls_back_the_transaction_holds_back_that_row_alone(
    how: str, odd: list[str], tmp_path: Path
) -> None:
    """SQLite: `RAISE(ROLLBACK)`, and `ON CONFLICT ROLLBACK`."""

    async def live(application: Application) -> None:
        host = await application.map()
        if how == "trigger":
            body = "WHEN NEW.logto_user_id LIKE 'odd%' BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
            add_trigger(application, application.users, "INSERT", body)
        else:
            with application.engine.begin() as connection:
                for statement in (
                    "DROP TABLE users",
                    "CREATE TABLE users (id INTEGER PRIMARY KEY, logto_user_id TEXT UNIQUE,"
                    " email TEXT UNIQUE, first_name TEXT, plan TEXT NOT NULL,"
                    " active BOOLEAN NOT NULL, place TEXT DEFAULT 'here',"
                    " odd TEXT AS (CASE WHEN logto_user_id LIKE 'odd%' THEN 'odd' ELSE id END),"
                    " UNIQUE (odd) ON CONFLICT ROLLBACK)",
                ):
                    connection.execute(sa.text(statement))
                connection.execute(
                    sa.text("INSERT INTO users (logto_user_id, plan, active) VALUES (:id, 'x', 1)"),
                    {"id": "odd-before"},
                )
        await Copy(host).take(created(*OTHERS[:9], *odd, *OTHERS[9:]))
        for _ in "123":
            await retry_unsettled(host, application.mappings, OWED)
            await SlowRows(host, application.mappings).write_due()
        await check_done(host)
        unwritten = await find_unwritten(host)
        assert {rows.state for rows in unwritten} == {"conflict"}
        assert sum(rows.count for rows in unwritten) == len(odd)
        written = {row[0] for row in application.rows(application.users, "logto_user_id")}
        assert written - {"odd-before"} == set(OTHERS)

    Application.run("sqlite", tmp_path, live)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", ["asyncpg", "postgres-thread"])
def test_a_row_that_ends_the_session_keeps_back_no_delivery(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the system ended the server's process because of it."""

    async def live(application: Application) -> None:
        host = await application.map()
        body = (
            "IF NEW.logto_user_id = 'odd' THEN"
            " PERFORM pg_terminate_backend(pg_backend_pid()); END IF;"
        )
        add_trigger(application, application.users, "INSERT", body)
        copy = Copy(host)
        deliveries = [delivery(body) for body in created(*NAMES)]
        await host.run(lambda store: store.add(deliveries))
        working = asyncio.create_task(copy.worker.run())

        async def is_done() -> bool:
            status = await host.read(lambda store: store.status())
            return status.deliveries["done"] == len(NAMES)

        await eventually(is_done)
        copy.worker.stop()
        await working

    Application.run(kind, tmp_path, live)


@pytest.mark.postgres
@pytest.mark.parametrize("is_careful", [False, True])
def test_a_row_that_is_refused_leaves_no_short_limits(is_careful: bool, tmp_path: Path) -> None:
    """What comes later in the transaction isn't about that row."""

    async def live(application: Application) -> None:
        host = await application.map()
        await Copy(host).take(created("ana"))
        body = "IF NEW.logto_user_id = 'odd' THEN RAISE EXCEPTION 'no'; END IF;"
        add_trigger(application, application.users, "INSERT", body)
        await Copy(host).take(created("odd"))
        if is_careful:
            application.mappings.caution.renew()

        def write(store: Store) -> None:
            before = read_waits(store.connection)
            store.mark_changed(store.lock_free([Key("user", "ana"), Key("user", "odd")]))
            store.project_changes()
            assert read_waits(store.connection) == before

        await host.run(write)

    Application.run("postgres-thread", tmp_path, live)


@pytest.mark.postgres
def test_reads_that_take_long_together_keep_back_no_delivery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is within the limit of a statement, but all of them aren't within a transaction's."""
    monkeypatch.setattr(runner, "RUN_S", 2.0)
    monkeypatch.setattr(row_limits, "SERVER_S", 1.0)

    async def live(application: Application) -> None:
        host = await application.map()
        with application.engine.begin() as connection:
            for statement in (
                "ALTER TABLE app.users RENAME TO all_users",
                "CREATE VIEW app.users AS SELECT * FROM app.all_users"
                " WHERE (SELECT pg_sleep(0.4)::text IS NOT NULL)",
            ):
                connection.execute(sa.text(statement))
        await Copy(host).take(created("ana"))
        await check_done(host)
        [owed] = await find_unwritten(host)
        assert owed.state == "owed"

    Application.run("postgres-thread", tmp_path, live)


def test_an_error_in_a_trigger_of_sqlite_holds_back_that_row_alone(tmp_path: Path) -> None:
    """Such as of JSON that can't be read."""

    async def live(application: Application) -> None:
        host = await application.map()
        body = "WHEN NEW.logto_user_id = 'odd' BEGIN SELECT json_extract('{', '$.a'); END"
        add_trigger(application, application.users, "INSERT", body)
        await Copy(host).take(created(*NAMES))
        await check_done(host)
        [owed] = await find_unwritten(host)
        assert owed.count == 1
        assert "malformed JSON" in str(owed.reason)
        assert len(application.rows(application.users, "id")) == len(OTHERS)

    Application.run("sqlite", tmp_path, live)


def test_a_deferred_foreign_key_of_sqlite_holds_back_that_row_alone(tmp_path: Path) -> None:
    """If the application lets SQLite enforce foreign keys, it refuses the commit of all."""

    async def live(application: Application) -> None:
        host = await application.map(create_defaults={application.users.c.plan: "free"})
        application.enforce_foreign_keys()
        with application.engine.begin() as connection:
            for statement in (
                "DROP TABLE users",
                "CREATE TABLE emails (email TEXT PRIMARY KEY)",
                "CREATE TABLE users (id INTEGER PRIMARY KEY, logto_user_id TEXT UNIQUE,"
                " email TEXT REFERENCES emails (email) DEFERRABLE INITIALLY DEFERRED,"
                " first_name TEXT, plan TEXT NOT NULL, active BOOLEAN NOT NULL)",
            ):
                connection.execute(sa.text(statement))
            known = [{"email": f"{name}@x"} for name in OTHERS]
            connection.execute(sa.text("INSERT INTO emails VALUES (:email)"), known)
        await Copy(host).take(created(*NAMES))
        await check_done(host)
        [refused] = await find_unwritten(host)
        assert (refused.state, refused.reason, refused.count) == ("conflict", NO_KEY, 1)
        assert len(application.rows(application.users, "id")) == len(OTHERS)

    Application.run("sqlite", tmp_path, live)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", ["psycopg", "postgres-thread"])
def test_no_value_is_in_a_log(
    kind: StoreKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of psycopg either, which logs an error of the server that it ignores: the next row of the
    batch can't be sent."""

    async def live(application: Application) -> None:
        own = application.users.c
        host = await application.map(
            columns={own.email: "email", own.first_name: choose_name},
            create_defaults={own.plan: "free", own.active: True},
        )
        body = "IF NEW.logto_user_id = 'odd' THEN RAISE EXCEPTION 'no %', NEW.email; END IF;"
        add_trigger(application, application.users, "INSERT", body)
        await Copy(host).take(created("odd", *OTHERS))
        assert sum(rows.count for rows in await find_unwritten(host)) == 2

    Application.run(kind, tmp_path, live)
    assert "odd@x" not in caplog.text


def choose_name(user: Any) -> Any:
    """Return what can't be sent for one user."""
    return {"first": "name"} if user.email == f"{OTHERS[-1]}@x" else "name"
