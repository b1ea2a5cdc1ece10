"""What the database says of a row harms no other row, and what it says of a session no other."""

from __future__ import annotations

import asyncio
import traceback
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from logto_webhooks.database import Database, open_database, wrap_engine
from logto_webhooks.database.errors import translate_errors
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import DeliveryFilter
from logto_webhooks.errors import (
    LogtoWebhooksError,
    SchemaMismatch,
    SettingInvalid,
    StoreUnavailable,
)
from logto_webhooks.ingest.group_commit import GroupCommit, Readiness
from logto_webhooks.instrumentation import DeliveryFailed, NotStored, Stalled, TelemetryEvent
from logto_webhooks.jobs import NewJob
from logto_webhooks.testing import FrozenClock, make
from tests.support import postgres
from tests.support.stores import Copy, delivery

DRIVERS = ("own asyncpg", "psycopg")
SECRET = "mary.person@example.com"


# Before what ALTER DATABASE says, which is tested here.
_USUAL = "-c role=none -c default_transaction_read_only=off -c search_path=public"


def _execute(url: sa.URL, *statements: str) -> None:
    there = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(there, autocommit=True, options=_USUAL) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@contextmanager
def _migrated() -> Iterator[sa.URL]:
    with postgres.own_database() as url:
        postgres.migrate_database(url)
        yield url


@contextmanager
def _role(url: sa.URL) -> Iterator[str]:
    """A role of its own, without any rights."""
    name = f"logto_test_{uuid.uuid4().hex[:12]}"
    _execute(url, f"CREATE ROLE {name}")
    try:
        yield name
    finally:
        _execute(url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


@asynccontextmanager
async def _opened(kind: str, url: sa.URL) -> AsyncIterator[Database]:
    database, engine = postgres.open_as(kind, url)
    try:
        yield database
    finally:
        await database.host.close()
        if isinstance(engine, AsyncEngine):
            await engine.dispose()
        elif engine is not None:
            engine.dispose()


def _all_at_once(database: Database) -> list[Coroutine[Any, Any, Any]]:
    """What is written by who accepts, and by the worker, on several connections."""
    adding = [_add(database) for _ in range(3)]
    return [*adding, *(database.host.run(lambda store: store.claim("t", 9, 9, 9)) for _ in "123")]


async def _add(database: Database) -> None:
    new = [delivery(make.user_created().body)]
    await database.host.accept(lambda store: store.add(new), 5)


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("nope", "schema nope (LOGTO_WEBHOOKS_SCHEMA), has none"),
        (None, "default schema (LOGTO_WEBHOOKS_SCHEMA isn't set), has none"),
    ],
)
def test_tables_that_are_not_there_are_told_with_the_place(
    driver: str, schema: str | None, says: str
) -> None:
    """The database without its user and password, and the setting of the schema."""

    async def run(url: sa.URL) -> None:
        text = url.set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
        database = open_database(text, schema)
        with pytest.raises(SchemaMismatch) as raised:
            await database.check()
        place = f"{database.name}, {says} of the tables. Run: logto-webhooks migrate"
        assert str(raised.value) == place
        await database.host.close()

    with postgres.own_database() as url:
        asyncio.run(run(url))


@pytest.mark.postgres
@pytest.mark.parametrize("kind", postgres.ENGINES)
@pytest.mark.parametrize(
    "setting", ["default_transaction_read_only = on", "search_path = nowhere", "role = {role}"]
)
def test_what_a_session_has_from_its_beginning_ends_with_it(kind: str, setting: str) -> None:
    """Once the setting is right, nothing fails any more: neither accepting, nor the worker, nor
    the checks, however many connections are in the pool."""

    async def run(url: sa.URL, role: str) -> None:
        async with _opened(kind, url) as database:
            group = GroupCommit(database.host, lambda report: None, lambda: None)
            ready = Readiness(database.check, database.host, FrozenClock(), group)
            name = setting.partition(" ")[0]
            _execute(url, f"ALTER DATABASE {url.database} SET {setting.format(role=role)}")
            for error in await asyncio.gather(*_all_at_once(database), return_exceptions=True):
                assert isinstance(error, StoreUnavailable)
            with pytest.raises((StoreUnavailable, SchemaMismatch)):
                await ready.check()
            _execute(url, f"ALTER DATABASE {url.database} RESET {name}")
            assert await group.add(delivery(make.user_created().body))
            with suppress(StoreUnavailable):  # the first to have such a session
                await asyncio.gather(*_all_at_once(database))
            await asyncio.gather(*_all_at_once(database))
            ready._checked_at = float("-inf")  # not in a second
            await ready.check()

    with _migrated() as url, _role(url) as role:
        asyncio.run(run(url, role))


@pytest.mark.postgres
def test_a_database_that_cannot_store_every_name_is_refused() -> None:
    """Else records with other characters would never be applied."""
    name = f"logto_test_{uuid.uuid4().hex[:12]}"
    server = postgres.sync_engine().execution_options(isolation_level="AUTOCOMMIT")
    options = "ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} {options}"))
        try:
            url = postgres.server_url().set(database=name, drivername="postgresql+asyncpg")
            database = open_database(url.render_as_string(hide_password=False))
            with pytest.raises(SettingInvalid, match="ENCODING 'UTF8'"):
                asyncio.run(database.migrate())
        finally:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.mark.postgres
def test_the_applications_own_errors_replace_no_connection() -> None:
    """It may fail as often as it likes."""

    async def run(url: sa.URL) -> None:
        engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
        database = wrap_engine(engine, None)

        def pid() -> int:
            with engine.connect() as connection:
                return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())

        try:
            await _add(database)
            before = pid()
            with suppress(sa.exc.ProgrammingError), engine.connect() as connection:
                connection.exec_driver_sql("SELECT * FROM nowhere")
            assert pid() == before
        finally:
            await database.host.close()
            engine.dispose()

    with _migrated() as url:
        asyncio.run(run(url))


def _trigger(table: str, refuse: str) -> list[str]:
    """Statements that make one: it does that to the row of Mary."""
    row = "position('mary' in new::text) > 0"
    if table == "logto_deliveries":
        row = "new.subject = 'user:mary'"
    return [
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$BEGIN IF {row} THEN {refuse} END IF; RETURN new; END$$",
        f"CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON {table} "
        "FOR EACH ROW EXECUTE FUNCTION refuse()",
    ]


REFUSALS = {
    "raise": "RAISE EXCEPTION 'blocked: %', new;",
    "sqlstate": "RAISE insufficient_privilege USING MESSAGE = new::text, TABLE = new::text;",
    "retried": "RAISE serialization_failure USING MESSAGE = new::text;",
    "locked": "RAISE lock_not_available USING MESSAGE = new::text;",
    "assert": "ASSERT false, new::text;",
    "no data": "RAISE no_data_found USING MESSAGE = new::text;",
    "cast": "PERFORM new::text::int;",
    "case": "CASE new::text WHEN '' THEN NULL; END CASE;",
}


async def _sync(database: Database) -> list[TelemetryEvent]:
    users = ["ana", "bo", "mary", "cy", "di"]
    copy = Copy(database.host)
    await copy.take(
        make.user_created(id=id, email=SECRET if id == "mary" else f"{id}@example.com").body
        for id in users
    )
    assert len(await database.host.read(lambda store: store.find("user", "", 99))) == 4
    [failed] = [report for report in copy.reports if isinstance(report, DeliveryFailed)]
    assert (failed.subject, failed.attempt) == ("user:mary", 1)
    assert failed.error.startswith("The database rejected a row of this batch: ")
    rows = await database.host.read(lambda store: store.inbox.search(DeliveryFilter()))
    assert [row.error for row in rows if row.error] == [failed.error]
    assert not [report for report in copy.reports if isinstance(report, Stalled)]
    assert "person" not in str(copy.reports)
    return copy.reports


@pytest.mark.postgres
@pytest.mark.parametrize("kind", DRIVERS)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_row_that_a_trigger_refuses_fails_alone(kind: str, refusal: str) -> None:
    """Whatever SQLSTATE it chose; nothing it says is repeated."""

    async def run(url: sa.URL) -> None:
        async with _opened(kind, url) as database:
            await _sync(database)

    with _migrated() as url:
        _execute(url, *_trigger("logto_users", REFUSALS[refusal]))
        asyncio.run(run(url))


@pytest.mark.postgres
@pytest.mark.parametrize("kind", DRIVERS)
def test_a_unique_violation_is_told_by_names(kind: str) -> None:
    """Its detail has the value."""

    async def run(url: sa.URL) -> None:
        async with _opened(kind, url) as database:
            reports = await _sync(database)
            [failed] = [report for report in reports if isinstance(report, DeliveryFailed)]
            assert "unique_violation (23505), table logto_users, constraint one" in failed.error

    with _migrated() as url:
        _execute(
            url,
            "CREATE UNIQUE INDEX one ON logto_users ((CASE WHEN email LIKE 'mary%' THEN 1 "
            "WHEN logto_user_id = 'ana' THEN 1 END))",
        )
        asyncio.run(run(url))


@pytest.mark.postgres
@pytest.mark.parametrize("kind", DRIVERS)
def test_a_policy_refuses_a_row_and_a_missing_right_all(kind: str) -> None:
    """Both have the same SQLSTATE."""

    async def run(url: sa.URL, role: str) -> None:
        async with _opened(kind, url) as database:
            await _sync(database)
            _execute(url, f"REVOKE INSERT ON logto_users FROM {role}")
            with pytest.raises(StoreUnavailable, match="GRANT SELECT, INSERT"):
                await Copy(database.host).take([make.user_created().body])

    with _migrated() as url, _role(url) as role:
        _execute(
            url,
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}",
            "ALTER TABLE logto_users ENABLE ROW LEVEL SECURITY",
            f"CREATE POLICY refuse ON logto_users TO {role} USING (true) "
            "WITH CHECK (email NOT LIKE 'mary%')",
            f"ALTER DATABASE {url.database} SET role = {role}",
        )
        asyncio.run(run(url, role))


@pytest.mark.postgres
@pytest.mark.parametrize("kind", DRIVERS)
@pytest.mark.parametrize("refusal", ["raise", "retried", "cast"])
def test_a_delivery_that_a_trigger_refuses_fails_alone(kind: str, refusal: str) -> None:
    """The others of its batch are accepted."""

    async def run(url: sa.URL) -> None:
        reports: list[TelemetryEvent] = []
        async with _opened(kind, url) as database:
            group = GroupCommit(database.host, reports.append, lambda: None)
            bodies = [make.user_created(id=id, email=SECRET).body for id in ("ana", "mary", "bo")]
            answers = await asyncio.gather(
                *(group.add(delivery(body)) for body in bodies), return_exceptions=True
            )
            assert [isinstance(answer, StoreUnavailable) for answer in answers] == [0, 1, 0]
            assert [report.count for report in reports if isinstance(report, NotStored)] == [1]
            assert "person" not in f"{reports} {answers}"

    with _migrated() as url:
        _execute(url, *_trigger("logto_deliveries", REFUSALS[refusal]))
        asyncio.run(run(url))


@pytest.mark.postgres
@pytest.mark.parametrize("kind", DRIVERS)
def test_the_text_of_a_statement_in_a_trigger_is_not_repeated(kind: str) -> None:
    """It may be made of a row's values, as where a column is named by one."""

    async def run(url: sa.URL) -> None:
        async with _opened(kind, url) as database:
            with pytest.raises(StoreUnavailable) as raised:
                await Copy(database.host).take([make.user_created(id="mary", email=SECRET).body])
            assert "SQLSTATE 42703" in str(raised.value)
            assert "person" not in str(raised.value)

    with _migrated() as url:
        _execute(url, *_trigger("logto_users", "EXECUTE format('SELECT %I', new.email);"))
        asyncio.run(run(url))


def test_a_row_that_a_trigger_of_sqlite_refuses_fails_alone(tmp_path: Path) -> None:
    """And is told by the name of the error."""

    async def run() -> None:
        database = open_database(f"sqlite:///{tmp_path / 'a.db'}")
        await database.migrate()
        engine = sa.create_engine(f"sqlite:///{tmp_path / 'a.db'}")
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE TRIGGER refuse BEFORE INSERT ON logto_users WHEN new.email LIKE 'mary%' "
                f"BEGIN SELECT RAISE(ABORT, 'blocked: {SECRET}'); END"
            )
        engine.dispose()
        reports = await _sync(database)
        [failed] = [report for report in reports if isinstance(report, DeliveryFailed)]
        assert "SQLITE_CONSTRAINT_TRIGGER" in failed.error
        await database.host.close()

    asyncio.run(run())


@pytest.mark.parametrize("value", [SECRET, object()])
def test_no_traceback_shows_the_parameters_of_a_statement(value: Any) -> None:
    """They are personal data, and SQLAlchemy shows them unless an engine is told not to."""
    engine = sa.create_engine("sqlite://")
    statement = sa.text("INSERT INTO nowhere VALUES (:email, :other)")
    with (
        pytest.raises(LogtoWebhooksError) as raised,
        translate_errors(engine),
        engine.connect() as connection,
    ):
        connection.execute(statement, {"email": SECRET, "other": value})
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    engine.dispose()


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_sequences_that_are_behind_drop_nothing(driver: str) -> None:
    """As after a failover by logical replication: it is said what to do, and then all goes on."""

    def restart_sequences(store: Store) -> None:
        for table in ("deliveries", "jobs"):
            store.connection.execute(sa.text(f"SELECT setval('logto_{table}_id_seq', 1)"))

    async def live(url: str) -> None:
        database = open_database(url)
        await database.migrate()
        host = database.host
        sent = [delivery(make.user_created(id=f"u{n}").body) for n in range(9)]
        new = [
            NewJob(handler="h", key=f"{n}", event="x", subject="user:u", queue_key="user:u")
            for n in range(9)
        ]
        try:
            await host.run(lambda store: store.add(sent[:5]))
            await host.run(lambda store: store.jobs.add(new[:5]))
            await host.run(restart_sequences)
            with pytest.raises(StoreUnavailable, match="logto-webhooks migrate"):
                await host.run(lambda store: store.add(sent[5:]))
            with pytest.raises(StoreUnavailable, match="logto-webhooks migrate"):
                await host.run(lambda store: store.jobs.add(new[5:]))
            await database.migrate()
            stored = await host.run(lambda store: store.add(sent[4:]))
            assert [each.duplicate for each in stored] == [True, False, False, False, False]
            await host.run(lambda store: store.jobs.add(new))
            count = sa.text("SELECT count(*) FROM logto_jobs")
            assert await host.run(lambda store: store.connection.scalar(count)) == 9
        finally:
            await host.close()

    with postgres.own_database() as url:
        shown = url.set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
        asyncio.run(live(shown))
