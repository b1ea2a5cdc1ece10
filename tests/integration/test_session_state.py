"""What a handler sets on its connection isn't there for anyone who gets the connection later."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.database.sessions import may_outlast_transaction
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, live, send, soon, until

CARELESS = [
    "SET ROLE pg_read_all_data",
    "SET SESSION AUTHORIZATION pg_read_all_data",
    "DO $$ BEGIN PERFORM set_config('search_path', 'pg_catalog', false); END $$",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "SET statement_timeout = 777",
    "SET app.tenant = 'somebody'",
    "SELECT pg_advisory_lock(42)",
    "CREATE TEMP TABLE logto_jobs (id int)",
    "PREPARE mine AS SELECT 1",
    "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
    "LISTEN somebody",
]
SEEN = sa.text(
    "SELECT session_user, current_setting('role'), current_setting('search_path'), "
    "current_setting('default_transaction_read_only'), current_setting('statement_timeout'), "
    "current_setting('app.tenant', true), "
    "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())), "
    "to_regclass('pg_temp.logto_jobs'), "
    "(SELECT count(*) FROM pg_prepared_statements WHERE name = 'mine'), "
    "(SELECT count(*) FROM pg_cursors WHERE name = 'mine'), "
    "(SELECT count(*) FROM pg_listening_channels())"
)


async def _three_times(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
    for number in range(3):
        await send(client, make.user_created(id=f"u{number}", at=soon()))
        rows = await until(all_over(number + 1), logto)
        assert {each.state for each in rows} == {"done"}


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("careless", CARELESS)
def test_what_a_coroutine_sets_ends_with_its_job(driver: str, careless: str) -> None:
    """The job is done all the same, and so is the next on the same pool."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername=f"postgresql+{driver}")
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
    seen: list[tuple[object, ...]] = []

    @logto.on("User.Created", name="careless", max_attempts=1)
    async def set_it(event: events.UserCreated, session: AsyncSession) -> None:
        seen.append(tuple((await session.execute(SEEN)).one()))
        await session.execute(sa.text(careless))

    live(logto, _three_times)
    assert len(seen) == 3
    assert len(set(seen)) == 1


@pytest.mark.postgres
@pytest.mark.parametrize(
    "careless", ["SET search_path TO pg_catalog", "SELECT pg_advisory_lock(7)"]
)
def test_what_a_plain_function_sets_ends_with_its_job(careless: str) -> None:
    """On a synchronous engine, whose connections are used in threads."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, pool_size=2, max_overflow=0)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
    seen: list[tuple[object, ...]] = []

    @logto.on("User.Created", name="careless", max_attempts=1)
    def set_it(event: events.UserCreated, session: Session) -> None:
        seen.append(tuple(session.execute(SEEN).one()))
        session.execute(sa.text(careless))

    live(logto, _three_times)
    assert len(seen) == 3
    assert len(set(seen)) == 1


@pytest.mark.postgres
def test_a_handler_that_fails_leaves_no_lock() -> None:
    """A lock of the session outlasts the rollback, so the connection is closed."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
    got: list[bool] = []

    @logto.on("User.Created", name="careless", max_attempts=1, ordered=False)
    async def lock_it(event: events.UserCreated, session: AsyncSession) -> None:
        got.append(bool(await session.scalar(sa.text("SELECT pg_try_advisory_lock(43)"))))
        raise ValueError("it fails")

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        for number in range(3):
            await send(client, make.user_created(id=f"u{number}", at=soon()))
            await until(all_over(number + 1), logto)

    live(logto, body)
    assert got == [True, True, True]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_what_is_set_behind_a_commit_by_hand_ends_with_it(driver: str) -> None:
    """The job fails, because it isn't atomic any more; who comes next finds nothing of it."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername=f"postgresql+{driver}")
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
    seen: list[str] = []

    @logto.on("User.Created", name="careless", max_attempts=1)
    async def commit_it(event: events.UserCreated, session: AsyncSession) -> None:
        seen.append(str(await session.scalar(sa.text("SHOW default_transaction_read_only"))))
        await session.execute(sa.text("SET default_transaction_read_only = on"))
        await session.execute(sa.text("COMMIT"))

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        for number in range(3):
            await send(client, make.user_created(id=f"u{number}", at=soon()))
            rows = await until(all_over(number + 1), logto)
        assert {each.state for each in rows} == {"dead"}
        assert all("TransactionEnded" in (each.error or "") for each in rows)

    live(logto, body)
    assert seen == ["off", "off", "off"]


@pytest.mark.parametrize(
    "careless",
    ["PRAGMA query_only = 1", "PRAGMA busy_timeout = 1", "CREATE TEMP TABLE mine (id int)"],
)
def test_a_pragma_ends_with_its_job(tmp_path: Path, careless: str) -> None:
    """On SQLite, where one that forbids writing would stop who accepts."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine)
    seen: list[object] = []
    asked = ["PRAGMA query_only", "PRAGMA busy_timeout", "SELECT count(*) FROM sqlite_temp_master"]

    @logto.on("User.Created", name="careless", max_attempts=1)
    def set_it(event: events.UserCreated, session: Session) -> None:
        seen.append(tuple(session.scalar(sa.text(each)) for each in asked))
        session.execute(sa.text(careless))

    live(logto, _three_times)
    assert len(seen) == 3
    assert len(set(seen)) == 1


@pytest.mark.parametrize(
    ("statement", "does"),
    [
        ("SELECT 1", False),
        ("  /* where from */ -- and why\n (SELECT 1)", False),
        ("WITH x AS (SELECT 1) INSERT INTO y SELECT * FROM x", False),
        ("ROLLBACK TO SAVEPOINT sa_savepoint_2", False),
        ("SET LOCAL statement_timeout = 5", False),
        ("SELECT pg_advisory_xact_lock(1)", False),
        ("SET statement_timeout = 5", True),
        ("select pg_advisory_lock(1)", True),
        ("SELECT set_config('a.b', 'c', false)", True),
        ("SELECT 1; SET ROLE somebody", True),
        ("CREATE TEMP TABLE x (a int)", True),
        ("CALL something()", True),
        ("", True),
    ],
)
def test_which_statements_may_outlast_a_transaction(statement: str, does: bool) -> None:
    """In doubt, a connection is closed; what only reads and writes rows costs none."""
    assert may_outlast_transaction(statement) is does
