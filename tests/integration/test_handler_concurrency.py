"""Handlers that are slow, stuck or careless: the others, and who accepts, go on."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from logto_webhooks import Delivery, Discard, LogtoWebhooks, RetryLater, events
from logto_webhooks.instrumentation import TelemetryEvent
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, jobs, live, on_postgres, on_sqlite, send, soon, until
from tests.support.service import Service
from tests.support.waiting import until as until_true


def people(count: int, since: int = 0) -> list[SignedRequest]:
    at = soon()
    return [make.user_created(id=f"u{since + number}", at=at) for number in range(count)]


@pytest.mark.slow
def test_a_slow_handler_takes_no_places_of_others(tmp_path: Path) -> None:
    """What waits for it hasn't begun: when it stops, that isn't counted as lost."""
    logto = on_sqlite(tmp_path)
    begun: list[int | None] = []

    @logto.on(events.UserCreated, name="slow", concurrency=1)
    async def slow(event: events.UserCreated, delivery: Delivery) -> None:
        begun.append(delivery.id)
        await asyncio.Event().wait()

    @logto.on(events.UserCreated, name="quick")
    async def quick(event: events.UserCreated) -> None: ...

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *people(150))
        await until(lambda rows: sum(each.state == "done" for each in rows) == 150, logto)
        waiting = [each for each in await jobs(logto) if each.state == "waiting"]
        assert {each.handler for each in waiting} == {"slow"}
        assert sorted(each.attempts for each in waiting) == [0] * 149 + [1]
        assert len(begun) == 1

    live(logto, body)
    rows = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    with rows.connect() as connection:
        counted = connection.scalar(
            sa.text("SELECT sum(attempts) FROM logto_jobs WHERE handler = 'slow'")
        )
    assert counted == 0


def test_a_stuck_session_holds_up_nobody_on_sqlite(tmp_path: Path) -> None:
    """It loses its transaction; what it does with it later goes nowhere."""
    logto = on_sqlite(tmp_path)
    go, ended = threading.Event(), threading.Event()
    later: list[BaseException] = []

    @logto.on("User.Created", name="stuck", max_attempts=1)
    def stuck(event: events.UserCreated, session: Session) -> None:
        session.execute(sa.text("INSERT INTO effects VALUES (1)"))
        go.wait(60)
        try:
            session.execute(sa.text("INSERT INTO effects VALUES (2)"))
        except BaseException as error:
            later.append(error)
        ended.set()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        with sa.create_engine(
            f"sqlite:///{tmp_path / 'app.db'}", poolclass=sa.NullPool
        ).begin() as connection:
            connection.execute(sa.text("CREATE TABLE effects (number INT)"))
        await send(client, *people(1))
        [dead] = await until(lambda rows: [each.state for each in rows] == ["dead"], logto)
        assert "longer than 2 s" in (dead.error or "")
        await send(client, make.user_deleted(id="u0"))  # while it is still stuck
        go.set()
        assert ended.wait(60)

    live(logto, body)
    assert len(later) == 1
    with sa.create_engine(
        f"sqlite:///{tmp_path / 'app.db'}", poolclass=sa.NullPool
    ).connect() as connection:
        assert connection.scalars(sa.text("SELECT number FROM effects")).all() == []


@pytest.mark.postgres
def test_stuck_sessions_hold_up_nobody_on_postgresql() -> None:
    """More of them than the pool has connections: each gives its own back when its time is over."""
    schema = postgres.emptied_schema()
    engine = sa.create_engine(
        postgres.server_url().set(drivername="postgresql+psycopg"), pool_size=3, max_overflow=0
    )
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
    go = threading.Event()

    @logto.on("User.Created", name="stuck", max_attempts=1, time_limit=0.2)
    def stuck(event: events.UserCreated, session: Session) -> None:
        session.execute(sa.text("SELECT 1"))
        go.wait(60)

    @logto.on("User.Deleted", name="good")
    def good(event: events.UserDeleted, session: Session) -> None: ...

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *people(8))
        await until(lambda rows: [each.state for each in rows] == ["dead"] * 8, logto)
        await send(client, make.user_deleted(id="u0"))
        done = await until(all_over(9), logto)
        assert {each.state for each in done if each.handler == "good"} == {"done"}

    try:
        live(logto, body)
    finally:
        go.set()


@pytest.mark.postgres
def test_seven_transactions_are_open_at_once_on_our_own_engine() -> None:
    """Deliveries, and what else there is, have the others of its ten connections."""
    url = postgres.server_url().render_as_string(hide_password=False)
    schema = postgres.emptied_schema()
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, database_url=url, schema=schema)
    all_there = asyncio.Barrier(7)

    @logto.on("User.Created", name="waits", concurrency=7)
    async def waits(event: events.UserCreated, session: AsyncSession) -> None:
        await session.execute(sa.text("SELECT 1"))
        await all_there.wait()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *people(7))
        assert {each.state for each in await until(all_over(7), logto)} == {"done"}

    live(logto, body)


@pytest.mark.postgres
def test_who_is_left_behind_writes_nothing_on_postgresql() -> None:
    """Its connection is nobody else's afterwards, whatever it still has of it; a statement that
    runs is cancelled."""
    schema = postgres.emptied_schema()
    engine = sa.create_engine(
        postgres.server_url().set(drivername="postgresql+psycopg"), pool_size=3, max_overflow=0
    )
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
    go = threading.Event()
    ended: list[str | None] = []

    def then(work: Callable[[], object]) -> None:
        try:
            work()
        except sa.exc.DBAPIError as error:
            ended.append(getattr(error.orig, "sqlstate", None))
        except psycopg.Error as error:
            ended.append(error.sqlstate)

    @logto.on("User.Created", name="keeps", max_attempts=1, time_limit=0.2)
    def keeps(event: events.UserCreated, connection: sa.Connection) -> None:
        cursor = connection.connection.cursor()
        cursor.execute(f"UPDATE {schema}.logto_users SET name = 'late'")
        go.wait(60)
        then(lambda: cursor.execute(f"UPDATE {schema}.logto_users SET name = 'late'"))

    @logto.on("User.Created", name="sleeps", max_attempts=1, time_limit=0.2)
    def sleeps(event: events.UserCreated, session: Session) -> None:
        then(lambda: session.execute(sa.text("SELECT pg_sleep(600)")))

    @logto.on("User.Deleted", name="good")
    def good(event: events.UserDeleted, session: Session) -> None: ...

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *people(1))
        await until(lambda rows: [each.state for each in rows] == ["dead"] * 2, logto)
        go.set()
        until_true(lambda: len(ended) == 2, lambda: str(ended))
        await send(client, make.user_deleted(id="u1"))
        await until(all_over(3), logto)
        [found] = await logto.users()
        assert found.row["name"] != "late"

    try:
        live(logto, body)
    finally:
        go.set()
    assert set(ended) == {None, "57014"}  # it was cancelled


@pytest.mark.slow
def test_who_waits_for_the_writer_has_its_whole_time(tmp_path: Path) -> None:
    """Others before it take nothing from it."""
    logto = on_sqlite(tmp_path)

    @logto.on("User.Created", name="first")
    def slow(event: events.UserCreated, session: Session) -> None:
        time.sleep(1.5)

    @logto.on("User.Created", name="second", max_attempts=1, time_limit=1.2)
    def quick(event: events.UserCreated, session: Session) -> None: ...

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *people(2))
        done = await until(all_over(4), logto)
        assert {each.state for each in done} == {"done"}

    live(logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
def test_who_ends_the_transaction_by_a_statement_is_told(statement: str, tmp_path: Path) -> None:
    """On SQLite, and on PostgreSQL; its job isn't done."""

    def plain(event: events.UserCreated, connection: sa.Connection) -> None:
        connection.exec_driver_sql(statement)

    async def awaited(event: events.UserCreated, connection: AsyncConnection) -> None:
        await connection.exec_driver_sql(statement)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *people(1))
        [dead] = await until(lambda rows: [each.state for each in rows] == ["dead"], logto)
        assert "TransactionEnded" in (dead.error or "")

    sqlite, server = on_sqlite(tmp_path), on_postgres()
    sqlite.on("User.Created", name="ends", max_attempts=1)(plain)
    server.on("User.Created", name="ends", max_attempts=1)(awaited)
    live(sqlite, body)
    live(server, body)


def test_who_has_the_writer_cannot_wait_for_it(tmp_path: Path) -> None:
    """It is told to use its own transaction, in which it works."""
    logto = on_sqlite(tmp_path)
    claims = {"sub": "early"}

    @logto.on("User.Created", name="waits", max_attempts=1)
    def waits(event: events.UserCreated, session: Session) -> None:
        logto.call(logto.ensure_user(claims))

    @logto.on("User.Created", name="shares")
    def shares(event: events.UserCreated, session: Session) -> None:
        logto.call(logto.ensure_user(claims, session=session))

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *people(1))
        rows = await until(
            lambda rows: len(rows) == 2 and all(r.state != "waiting" for r in rows), logto
        )
        assert {each.handler: each.state for each in rows} == {"waits": "dead", "shares": "done"}
        [dead] = [each for each in rows if each.state == "dead"]
        assert "session=" in (dead.error or "")

    live(logto, body)


class Later(RetryLater):
    """Says nothing to its base."""

    def __init__(self) -> None:
        pass


class Dropped(Discard):
    """Neither does this."""

    def __init__(self) -> None:
        pass


def test_odd_errors_are_errors_like_others(tmp_path: Path) -> None:
    """Subclasses that say nothing, what can't be shown, and an observer that raises itself."""

    def observe(report: TelemetryEvent) -> None:
        raise RuntimeError("of the application's")

    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, observe=observe)
    odd = SyntaxError("odd", ("file", "line", b"offset", object()))  # type: ignore[arg-type]
    raised = {"later": Later(), "dropped": Dropped(), "odd": odd}

    def fails(error: Exception) -> object:
        def fail(event: events.UserCreated) -> None:
            raise error

        return fail

    for name, error in raised.items():
        logto.on("User.Created", name=name, max_attempts=2, waits=(60,))(fails(error))  # type: ignore[type-var]

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *people(1))
        rows = await until(
            lambda rows: (
                len(rows) == 3 and all(r.attempts for r in rows) and all(r.error for r in rows)
            ),
            logto,
        )
        states = {each.handler: (each.state, each.failures) for each in rows}
        assert states == {
            "later": ("waiting", 1),
            "dropped": ("discarded", 0),
            "odd": ("waiting", 1),
        }

    live(logto, body)


@pytest.mark.postgres
def test_a_failed_statement_cannot_be_swallowed() -> None:
    """PostgreSQL's transaction is over by then: the job fails with what the database says."""
    logto = on_postgres()

    @logto.on("User.Created", name="swallows", max_attempts=1)
    async def swallows(event: events.UserCreated, session: AsyncSession) -> None:
        with contextlib.suppress(sa.exc.ProgrammingError):
            await session.execute(sa.text("SELECT * FROM nowhere"))

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *people(1))
        [dead] = await until(lambda rows: [each.state for each in rows] == ["dead"], logto)
        assert "aborted" in (dead.error or "")

    live(logto, body)


def test_two_of_one_process_work_on_one_file(tmp_path: Path) -> None:
    """Each runs its own handlers."""
    first, second = on_sqlite(tmp_path), on_sqlite(tmp_path)
    first.on("User.Created", name="first")(lambda event: None)
    second.on("User.Created", name="second")(lambda event: None)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        async with second.lifespan():
            await send(client, *people(3))
            await until(all_over(6), logto)

    live(first, body)


STUBBORN = """
import asyncio
from logto_webhooks import LogtoWebhooks

logto = LogtoWebhooks.from_env()


@logto.on("User.Created", name="stubborn")
async def stubborn(event):
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass
"""


@pytest.mark.process
def test_what_cannot_be_cancelled_ends_with_the_process(tmp_path: Path) -> None:
    """Serving ends as it was told to, and says what it left."""
    (tmp_path / "app.py").write_text(STUBBORN)
    with Service(tmp_path, "--app", "app:logto") as service:
        service.post(make.user_created(at=soon()))
        begun = "SELECT 1 FROM logto_jobs WHERE attempts = 1"
        until_true(lambda: bool(service.rows(begun)), lambda: service.log)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        service.wait_for_log("couldn't be cancelled")
