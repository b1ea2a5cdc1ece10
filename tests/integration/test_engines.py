"""The application's own engine, whatever it is set to, and whatever a handler does on it."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, events, testing
from logto_webhooks.database.postgres import Postgres, make_postgres_engine
from logto_webhooks.database.runner import close_returned
from logto_webhooks.database.store import Store
from logto_webhooks.errors import SettingInvalid, StoreUnavailable
from logto_webhooks.signing_keys import WebhookKey
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, live, send, soon, until

THEIRS = sa.Table("greeted", sa.MetaData(), sa.Column("level", sa.Text))
LEVEL = sa.select(sa.func.current_setting("transaction_isolation"))


# SQLAlchemy warns while it closes the connection. As an error, that would leave it open.
@pytest.mark.filterwarnings("default:.*already deassociated:sqlalchemy.exc.SAWarning")
@pytest.mark.postgres
def test_what_a_handler_left_on_its_connection_is_in_no_other_transaction() -> None:
    """One who uses its session several times at once breaks that connection alone: asyncpg's
    can't be rolled back while it is used, and the next to have it would fail for ever."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)

    @logto.on("User.Created", name="careless", max_attempts=1)
    async def careless(event: events.UserCreated, session: AsyncSession) -> None:
        await asyncio.gather(*(session.execute(sa.text("SELECT pg_sleep(0.1)")) for _ in range(3)))

    @logto.on("User.Deleted", name="good", max_attempts=1)
    async def good(event: events.UserDeleted, connection: AsyncConnection) -> None: ...

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *(make.user_created(id=f"u{each}", at=soon()) for each in range(5)))
        await until(all_over(5), logto)
        await send(client, *(make.user_deleted(id=f"u{each}", at=soon()) for each in range(5)))
        rows = await until(all_over(10), logto)
        states = {(each.handler, each.state) for each in rows}
        assert states == {("careless", "dead"), ("good", "done")}

    live(logto, body)


@pytest.mark.parametrize("enforces", [True, False])
@pytest.mark.parametrize("driver", ["pysqlite", "aiosqlite"])
def test_foreign_keys_are_enforced_as_by_the_application(
    driver: str, enforces: bool, tmp_path: Path
) -> None:
    """SQLite enforces them only on connections that ask for it."""
    file = tmp_path / "app.db"
    url = f"sqlite+{driver}:///{file}"
    engine: Any = create_async_engine(url) if driver == "aiosqlite" else sa.create_engine(url)

    @sa.event.listens_for(getattr(engine, "sync_engine", engine), "connect")
    def connect(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA foreign_keys={'ON' if enforces else 'OFF'}")
        cursor.close()

    with sa.create_engine(f"sqlite:///{file}", poolclass=sa.NullPool).begin() as connection:
        connection.execute(sa.text("CREATE TABLE owners (id TEXT PRIMARY KEY)"))
        connection.execute(sa.text("CREATE TABLE notes (owner TEXT REFERENCES owners)"))
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine)

    @logto.on("User.Created", name="note", max_attempts=1)
    def note(event: events.UserCreated, session: Session) -> None:
        session.execute(sa.text("INSERT INTO notes VALUES ('nobody')"))

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        [job] = await until(all_over(1), logto)
        assert job.state == ("dead" if enforces else "done")

    live(logto, body)


def test_our_connections_are_set_up_by_the_applications_listeners(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A function that a trigger uses is there. What they set doesn't make storing less durable."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")

    @sa.event.listens_for(engine, "connect")
    def add_function(connection: Any, record: object) -> None:
        connection.create_function("shout", 1, str.upper)
        connection.execute("PRAGMA synchronous=OFF")

    @sa.event.listens_for(engine, "connect")
    def fail_elsewhere(connection: Any, record: Any) -> None:
        connection.something_else()

    sa.event.remove(engine, "connect", fail_elsewhere)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE notes (text TEXT)"))
        trigger = (
            "CREATE TRIGGER shouts AFTER INSERT ON notes WHEN new.text = 'hi' BEGIN"
            " INSERT INTO notes VALUES (shout(new.text)); END"
        )
        connection.execute(sa.text(trigger))
    sa.event.listen(engine, "connect", fail_elsewhere)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine)

    @logto.on("User.Created", name="note", max_attempts=1)
    def note(event: events.UserCreated, session: Session) -> None:
        session.execute(sa.text("INSERT INTO notes VALUES ('hi')"))
        [synchronous] = session.execute(sa.text("PRAGMA synchronous")).one()
        session.execute(sa.text("INSERT INTO notes VALUES (:text)"), {"text": str(synchronous)})

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        [job] = await until(all_over(1), logto)
        assert job.state == "done", job.error

    live(logto, body)
    sa.event.remove(engine, "connect", fail_elsewhere)
    with engine.connect() as connection:
        assert connection.scalars(sa.text("SELECT text FROM notes")).all() == ["hi", "HI", "2"]
    assert "raised AttributeError on this package's connection" in caplog.text


ONE: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}


def test_storing_needs_no_connection_of_the_applications_pool(tmp_path: Path) -> None:
    """All of them may be held by requests, also by those that wait for this package."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}", **ONE)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))

    with engine.connect():
        live(logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_nor_does_storing_on_postgresql(driver: str) -> None:
    """Nor applying, nor finding a user, nor creating one."""
    schema, url = postgres.emptied_schema(), postgres.server_url()
    url = url.set(drivername=f"postgresql+{driver}")
    is_async = driver == "asyncpg"
    engine = create_async_engine(url, **ONE) if is_async else sa.create_engine(url, **ONE)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        first = await logto.ensure_user({"sub": "bo"})
        held = engine.connect()
        if isinstance(held, AsyncConnection):
            await held.start()
        async with asyncio.timeout(20):
            await send(client, make.user_created(id="ana", at=soon()))
            assert await logto.ensure_user({"sub": "bo"}) == first
            assert await logto.wait_for_user("ana")
            assert (await logto.ensure_user({"sub": "cy"})).logto_user_id == "cy"
        closing = held.close()
        if closing is not None:
            await closing

    live(logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_our_transactions_have_the_applications_listeners(driver: str) -> None:
    """Mapped rows are written in them: the listeners may set a role, or what row-level security
    asks for."""
    schema, url = postgres.emptied_schema(), postgres.server_url()
    url = url.set(drivername=f"postgresql+{driver}")
    engine: Any = create_async_engine(url) if driver == "asyncpg" else sa.create_engine(url)
    sync: sa.Engine = getattr(engine, "sync_engine", engine)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)

    @sa.event.listens_for(sync, "connect")
    def connect(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("SET application_name = 'set-at-connect'")
        cursor.close()
        connection.commit()

    @sa.event.listens_for(sync, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SET LOCAL work_mem = '3333kB'")

    def look(store: Store) -> tuple[str, str, bool]:
        read = sa.func.current_setting
        settings = sa.select(read("application_name"), read("work_mem"))
        row = store.connection.execute(settings).one()
        return row[0], row[1], store.connection.engine.pool is sync.pool

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        expected = ("set-at-connect", "3333kB", False)
        assert await logto.database.host.run(look) == expected
        assert await logto.database.host.read(look) == expected

    live(logto, body)


@pytest.mark.postgres
def test_no_log_of_sql_shows_a_signing_key(caplog: pytest.LogCaptureFixture) -> None:
    """The application logs its SQL with parameters, to find a fault of its own."""
    url = postgres.server_url().set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=postgres.emptied_schema())
    learnt = WebhookKey(webhook_id="a", key="a-secret-key-0123456789", learnt_at=1)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        caplog.set_level(logging.INFO, "sqlalchemy.engine")
        await logto.database.host.run(lambda store: store.webhook_keys.learn([learnt]))
        await logto.database.host.read(lambda store: store.webhook_keys.learnt())

    live(logto, body)
    assert "INSERT INTO" in caplog.text
    assert learnt.key not in caplog.text


PREFORK = """
import os, sys
import sqlalchemy as sa
from logto_webhooks import LogtoWebhooks
logto = LogtoWebhooks(signing_key="x", engine=sa.create_engine(sys.argv[1]), schema=sys.argv[2])
look = lambda: logto.call(logto.status()).deliveries
before = look()
children = [os.fork() or os._exit(any(look() != before for _ in range(20))) for _ in range(2)]
assert all(look() == before for _ in range(20))
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


@pytest.mark.postgres
@pytest.mark.process
def test_an_engine_that_was_used_before_a_fork() -> None:
    """As with `gunicorn --preload`: no two processes share a connection."""
    url = postgres.server_url().set(drivername="postgresql+psycopg")
    shown = url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", PREFORK, shown, postgres.emptied_schema()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture
def database() -> Iterator[sa.URL]:
    """A database in which the application's tables are in a schema of its own."""
    with postgres.own_database() as url:
        driven = url.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(driven)
        with engine.begin() as connection:
            connection.execute(sa.schema.CreateSchema("theirs"))
            connection.execute(sa.text("CREATE TABLE theirs.greeted (level TEXT)"))
        engine.dispose()
        yield driven


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE"])
@pytest.mark.parametrize("schema", [None, "ours"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_what_an_engine_is_set_to_is_for_the_application(
    driver: str, schema: str | None, level: Any, database: sa.URL
) -> None:
    """Ours works in transactions as it needs them; our tables are where `schema` says, and those
    of handlers where the application's engine says."""
    url = database.set(drivername=f"postgresql+{driver}")
    made = (create_async_engine if driver == "asyncpg" else sa.create_engine)(
        url, isolation_level=level
    )
    engine = made.execution_options(schema_translate_map={None: "theirs"})
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)

    async def awaited(session: AsyncSession) -> None:
        seen = await session.scalar(LEVEL)
        await session.execute(sa.insert(THEIRS).values(level=seen))

    def plain(session: Session) -> None:
        session.execute(sa.insert(THEIRS).values(level=session.scalar(LEVEL)))

    logto.on("User.Created", max_attempts=1)(awaited if driver == "asyncpg" else plain)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        [job] = await until(all_over(1), logto)
        assert (job.state, job.error) == ("done", None)

    live(logto, body)
    beside = sa.create_engine(database)
    with beside.connect() as connection:
        written = connection.scalars(sa.text("SELECT level FROM theirs.greeted")).all()
        users = connection.scalar(sa.text(f"SELECT count(*) FROM {schema or 'public'}.logto_users"))
    assert (list(written), users) == (["read committed"], 1)
    beside.dispose()


@pytest.mark.postgres
def test_in_tests_the_tables_are_the_same_ones(database: sa.URL) -> None:
    """On a connection of such an engine."""
    engine = sa.create_engine(database).execution_options(schema_translate_map={None: "theirs"})
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine)
    logto.call(logto.migrate())

    @logto.on("User.Created", name="greet")
    def greet(session: Session) -> None:
        session.execute(sa.insert(THEIRS).values(level="tested"))

    with engine.connect() as connection:
        app = testing.app(logto, connection)
        assert app.deliver(make.user_created()).ran == ["greet"]
        assert connection.scalars(sa.select(THEIRS.c.level)).all() == ["tested"]
        connection.rollback()
    engine.dispose()


@pytest.mark.postgres
def test_what_no_later_option_changes_is_refused(database: sa.URL) -> None:
    """SQLAlchemy lets the first execution_options of an engine win."""
    for made in (sa.create_engine(database), create_async_engine(database)):
        engine = made.execution_options(isolation_level="AUTOCOMMIT")
        logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=made.execution_options(other=1))
        assert logto.database.name
        with pytest.raises(SettingInvalid, match="pass the engine without these options"):
            LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine)


@pytest.mark.postgres
def test_a_connection_that_is_in_a_transaction_already_is_not_used() -> None:
    """The application left it open, or used its engine on another event loop. What it takes would
    be answered 200, and never committed."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)

    async def leave_open() -> None:
        async with engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.execute("BEGIN")

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="first", at=soon()))
        await leave_open()
        for number in range(20):
            await send(client, make.user_created(id=f"u{number}", at=soon()))
        beside = postgres.sync_engine()
        with beside.connect() as connection:
            count = sa.text(f"SELECT count(*) FROM {schema or 'public'}.logto_deliveries")
            assert connection.scalar(count) == 21
        beside.dispose()

    live(logto, body)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_connection_that_is_lost_in_a_thread_is_closed(
    driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Although that thread has no event loop, and without a traceback in the log."""

    def end_session(store: Store) -> None:
        store.connection.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))

    async def run() -> None:
        url = postgres.server_url().set(drivername=f"postgresql+{driver}")
        host = Postgres(make_postgres_engine(url), postgres.emptied_schema()).host
        with pytest.raises(StoreUnavailable):
            await host.run_large(end_session)
        assert await host.run_large(lambda store: store.execute(sa.select(1)).scalar()) == 1
        await host.close()

    asyncio.run(run())
    gc.collect()  # a connection that isn't closed would be told now
    assert caplog.records == []


@pytest.mark.postgres
def test_a_connection_that_is_in_use_at_the_end_is_closed_when_it_returns() -> None:
    """Its pool is gone by then."""
    url = postgres.server_url().set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url)
    connection = engine.connect()
    driver: Any = connection.connection.driver_connection
    pool = engine.pool
    engine.dispose()
    close_returned(pool)
    connection.close()
    assert driver.closed
    with engine.connect() as another:
        kept: Any = another.connection.driver_connection
    assert not kept.closed
    engine.dispose()
