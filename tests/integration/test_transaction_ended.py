"""A handler's transaction is ended by its job alone: nothing is committed before "done"."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.database.sessions import ends_transaction
from logto_webhooks.errors import TransactionEnded
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, live, send, soon, until

AWAITED = ["psycopg awaited", "asyncpg"]
KINDS = ["sqlite", "psycopg", *AWAITED]
WRITE = sa.text("INSERT INTO logto_ended VALUES (1)")


class OwnSession(Session):
    """As SQLModel has one."""


class OwnAsyncSession(AsyncSession):
    """The same, awaited."""


def opened(kind: str, folder: Path) -> tuple[LogtoWebhooks, sa.Engine]:
    """An application on its own engine, and another engine on the same database, with a table."""
    if kind == "sqlite":
        url: sa.URL | str = f"sqlite:///{folder / 'app.db'}"
        looking, schema = sa.create_engine(url, poolclass=sa.NullPool), None
    else:
        url = postgres.server_url().set(drivername=f"postgresql+{kind.split()[0]}")
        looking, schema = postgres.sync_engine(), postgres.emptied_schema()
    engine = create_async_engine(url) if kind in AWAITED else sa.create_engine(url)
    with looking.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS logto_ended"))
        connection.execute(sa.text("CREATE TABLE logto_ended (number INT)"))
    return LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema), looking


def run(logto: LogtoWebhooks, looking: sa.Engine, state: str) -> tuple[str, int]:
    """Send one event; return the job's error, and how often its handler's row is there."""
    errors: list[str] = []

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="ana", at=soon()))
        [row] = await until(all_over(1), logto)
        assert (row.state, row.attempts) == (state, 2)
        errors.append(row.error or "")

    live(logto, body)
    with looking.begin() as connection:
        count = connection.scalar(sa.text("SELECT count(*) FROM logto_ended"))
        connection.execute(sa.text("DROP TABLE logto_ended"))
    return errors[0], int(count or 0)


def commit(connection: sa.Connection) -> None:
    connection.commit()


def commit_in_spite(connection: sa.Connection) -> None:
    with suppress(TransactionEnded):
        connection.commit()


def commit_transaction(connection: sa.Connection) -> None:
    transaction = connection.get_transaction()
    assert transaction
    transaction.commit()


def commit_after_rollback(connection: sa.Connection) -> None:
    connection.rollback()
    connection.execute(WRITE)
    connection.commit()


def execute(statement: str) -> Callable[[sa.Connection], None]:
    def execute_it(connection: sa.Connection) -> None:
        connection.exec_driver_sql(statement)

    return execute_it


ENDS = {
    "commit": commit,
    "commit in spite": commit_in_spite,
    "commit the transaction": commit_transaction,
    "commit after rollback": commit_after_rollback,
    "rollback": lambda connection: connection.rollback(),
    "COMMIT": execute("COMMIT"),
    "a comment and END": execute("/* the end */ end;"),
    "ROLLBACK": execute("ROLLBACK"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ENDS)
def test_a_connection_is_committed_with_the_job_alone(way: str, kind: str, tmp_path: Path) -> None:
    """Each attempt fails, says what to do, and leaves nothing; a session's connection, too."""
    logto, looking = opened(kind, tmp_path)
    end: Any = ENDS[way]

    def by_connection(event: events.UserCreated, connection: sa.Connection) -> None:
        connection.execute(WRITE)
        end(connection)

    async def awaited(event: events.UserCreated, session: AsyncSession) -> None:
        await session.execute(WRITE)
        await (await session.connection()).run_sync(end)

    function: Any = awaited if kind in AWAITED else by_connection
    logto.on("User.Created", waits=[0.01], max_attempts=2)(function)
    error, count = run(logto, looking, "dead")
    assert "TransactionEnded" in error
    assert "commits when the handler returns" in error
    assert count == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_commits_to_a_savepoint(kind: str, tmp_path: Path) -> None:
    """What it commits or rolls back is its own; what raises leaves nothing of it."""
    logto, looking = opened(kind, tmp_path)
    failures = [ValueError("not yet")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    def plain(event: events.UserCreated, session: OwnSession) -> None:
        session.execute(WRITE)
        session.commit()
        session.execute(WRITE)
        session.rollback()
        with suppress(sa.exc.DBAPIError), session.begin():
            session.execute(sa.text("INSERT INTO logto_nowhere VALUES (1)"))
        fail()

    async def awaited(event: events.UserCreated, session: OwnAsyncSession) -> None:
        await session.execute(WRITE)
        await session.commit()
        await session.execute(WRITE)
        await session.rollback()
        with suppress(sa.exc.DBAPIError):
            async with session.begin():
                await session.execute(sa.text("INSERT INTO logto_nowhere VALUES (1)"))
        fail()

    function: Any = awaited if kind in AWAITED else plain
    logto.on("User.Created", waits=[0.01], max_attempts=3)(function)
    _, count = run(logto, looking, "done")
    assert count == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["close", "with", "close after commit"])
def test_a_session_that_is_closed_is_a_failure(how: str, kind: str, tmp_path: Path) -> None:
    """SQLAlchemy rolls back what it wrote, and says nothing."""
    logto, looking = opened(kind, tmp_path)

    def plain(event: events.UserCreated, session: OwnSession) -> None:
        if how == "close after commit":
            with session.begin_nested():
                session.execute(WRITE)
            session.commit()
        session.execute(WRITE)
        if how == "with":
            with session:
                pass
        session.close()

    async def awaited(event: events.UserCreated, session: OwnAsyncSession) -> None:
        if how == "close after commit":
            async with session.begin_nested():
                await session.execute(WRITE)
            await session.commit()
        await session.execute(WRITE)
        if how == "with":
            async with session:
                pass
        await session.close()

    function: Any = awaited if kind in AWAITED else plain
    logto.on("User.Created", waits=[0.01], max_attempts=2)(function)
    error, count = run(logto, looking, "dead")
    assert "TransactionEnded" in error
    assert "closed its session" in error
    assert count == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_inside_a_session_of_its_own_is_the_error(kind: str, tmp_path: Path) -> None:
    """A handler that raises has no writes that could be lost."""
    logto, looking = opened(kind, tmp_path)

    def plain(event: events.UserCreated, session: OwnSession) -> None:
        with session:
            session.execute(WRITE)
            raise ValueError("no such thing")

    async def awaited(event: events.UserCreated, session: OwnAsyncSession) -> None:
        async with session:
            await session.execute(WRITE)
            raise ValueError("no such thing")

    function: Any = awaited if kind in AWAITED else plain
    logto.on("User.Created", waits=[0.01], max_attempts=2)(function)
    error, count = run(logto, looking, "dead")
    assert "no such thing" in error
    assert count == 0


@pytest.mark.postgres
def test_a_plain_function_on_an_asynchronous_engine_commits_nothing(tmp_path: Path) -> None:
    """It has a thread, and its connection belongs to the event loop."""
    logto, looking = opened("asyncpg", tmp_path)

    @logto.on("User.Created", waits=[0.01], max_attempts=2)
    def commits(event: events.UserCreated, session: Session) -> None:
        session.execute(WRITE)
        session.connection().commit()

    error, count = run(logto, looking, "dead")
    assert "TransactionEnded" in error
    assert count == 0


@pytest.mark.postgres
def test_an_asynchronous_connection_commits_nothing(tmp_path: Path) -> None:
    """By its own method."""
    logto, looking = opened("asyncpg", tmp_path)

    @logto.on("User.Created", waits=[0.01], max_attempts=2)
    async def commits(event: events.UserCreated, connection: AsyncConnection) -> None:
        await connection.execute(WRITE)
        await connection.commit()

    error, count = run(logto, looking, "dead")
    assert "TransactionEnded" in error
    assert count == 0


@pytest.mark.parametrize(
    ("statement", "does"),
    [
        ("COMMIT", True),
        (" /* why */ -- not\n commit work", True),
        ("END", True),
        ("Rollback;", True),
        ("ABORT", True),
        ("COMMIT /* to be safe */", True),
        ("-- write to disk now\nCOMMIT", True),
        ("rollback -- to here", True),
        ("ROLLBACK WORK TO mine", False),
        ("PREPARE TRANSACTION 'x'", True),
        ("ROLLBACK TO SAVEPOINT mine", False),
        ("PREPARE mine AS SELECT 1", False),
        ("RELEASE SAVEPOINT mine", False),
        ("SELECT 'commit'", False),
        ("UPDATE commits SET ended = 1", False),
        ("", False),
    ],
)
def test_which_statements_end_a_transaction(statement: str, does: bool) -> None:
    """They are refused before they are sent."""
    assert ends_transaction(statement) is does


@pytest.mark.parametrize("clause", ["ON CONFLICT ROLLBACK", "nested"])
def test_a_transaction_that_sqlite_ended_takes_no_more_statements(
    clause: str, tmp_path: Path
) -> None:
    """They would be committed one by one, each time the job is tried."""
    logto, looking = opened("sqlite", tmp_path)
    with looking.begin() as connection:
        table = "CREATE TABLE tags (name TEXT UNIQUE ON CONFLICT ROLLBACK)"
        connection.execute(sa.text(table))
        connection.execute(sa.text("INSERT INTO tags VALUES ('new')"))

    @logto.on(events.UserCreated, waits=[0.01], max_attempts=2)
    def tag(event: events.UserCreated, session: Session) -> None:
        with suppress(sa.exc.DBAPIError):
            if clause == "nested":
                with session.begin_nested():
                    session.execute(sa.text("INSERT INTO tags VALUES ('new')"))
            else:
                session.execute(sa.text("INSERT INTO tags VALUES ('new')"))
        session.execute(WRITE)

    error, count = run(logto, looking, "dead")
    assert count == 0
    assert "constraint or trigger with ROLLBACK" in error
