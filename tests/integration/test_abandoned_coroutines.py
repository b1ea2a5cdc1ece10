"""Coroutines that go on after they were cancelled: others run, and what these write is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.database.threads import MOST_OF_ONE
from logto_webhooks.instrumentation import CoroutineAbandoned, HandlerHeld, TelemetryEvent
from logto_webhooks.jobs import JobRow
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, jobs, live, send, soon, until
from tests.support.waiting import eventually

SLEEP, QUICK = sa.text("SELECT pg_sleep(60)"), sa.text("SELECT 1")


def on_sqlite(folder: Path, reports: list[TelemetryEvent]) -> LogtoWebhooks:
    engine = sa.create_engine(f"sqlite:///{folder / 'app.db'}")
    return LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, observe=reports.append)


def states(handler: str, rows: list[JobRow]) -> list[str]:
    return sorted(row.state for row in rows if row.handler == handler)


async def insist(work: Callable[[], Awaitable[object]], errors: list[BaseException]) -> None:
    """Do it, whatever is raised."""
    try:
        await work()
    except BaseException as error:
        errors.append(error)


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_one_with_a_transaction_gives_it_back(driver: str) -> None:
    """It waits in a statement, or beside it, and there are as many as may have a transaction. What
    it writes afterwards, or with another connection, isn't committed."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername=f"postgresql+{driver}")
    engine = create_async_engine(url, pool_size=3, max_overflow=0)
    reports: list[TelemetryEvent] = []
    logto = LogtoWebhooks(
        signing_key=SIGNING_KEY, engine=engine, schema=schema, observe=reports.append
    )
    release = asyncio.Event()
    errors: list[BaseException] = []
    ended: list[str] = []
    insert = sa.text(f"INSERT INTO {schema}.effects_of_coroutines VALUES (:handler)")

    async def write(transaction: AsyncSession | AsyncConnection) -> None:
        await transaction.execute(insert, {"handler": "abandoned"})
        await transaction.commit()

    @logto.on("User.Created", name="beside", max_attempts=1, time_limit=0.2)
    async def beside(event: events.UserCreated, session: AsyncSession) -> None:
        await session.execute(insert, {"handler": "abandoned"})
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()
        for work in (lambda: write(session), session.rollback, lambda: write(session)):
            await insist(work, errors)
        ended.append("beside")

    @logto.on("User.Created", name="within", max_attempts=1, time_limit=0.2)
    async def within(event: events.UserCreated, connection: AsyncConnection) -> None:
        await connection.execute(insert, {"handler": "abandoned"})
        for _ in range(2):  # the second one runs when it is abandoned
            await insist(lambda: connection.execute(SLEEP), [])
            await insist(connection.rollback, [])
        for work in (connection.rollback, lambda: write(connection), lambda: write(connection)):
            await insist(work, errors)
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()
        ended.append("within")

    @logto.on("User.*", name="good")
    async def good(event: events.Event, session: AsyncSession) -> None:
        await session.execute(insert, {"handler": "good"})

    async def effects() -> list[str]:
        async with engine.connect() as connection:
            found = await connection.scalars(
                sa.text(f"SELECT handler FROM {schema}.effects_of_coroutines")
            )
            return sorted(found)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        async with engine.begin() as connection:
            await connection.execute(
                sa.text(f"DROP TABLE IF EXISTS {schema}.effects_of_coroutines")
            )
            await connection.execute(
                sa.text(f"CREATE TABLE {schema}.effects_of_coroutines (handler text)")
            )
        await send(client, make.user_created(id="first", at=soon()))
        rows = await until(all_over(3), logto)
        assert {row.handler: row.state for row in rows} == {
            "beside": "dead",
            "within": "dead",
            "good": "done",
        }
        assert all("longer than 0.2 s" in (row.error or "") for row in rows if row.state == "dead")
        abandoned = [report for report in reports if isinstance(report, CoroutineAbandoned)]
        assert sorted(report.handler for report in abandoned) == ["beside", "within"]
        assert all("test_abandoned_coroutines.py:" in report.stack for report in abandoned)
        release.set()
        await eventually(lambda: asyncio.sleep(0, ended), lambda ended: len(ended) == 2)
        assert await effects() == ["good"]
        assert len(errors) >= 4
        await send(client, make.user_deleted(id="first", at=soon()))
        await until(all_over(4), logto)
        assert await effects() == ["good", "good"]

    live(logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_one_that_repeats_what_fails_lets_others_run(driver: str) -> None:
    """Each statement of an abandoned one fails, but not at once: or it would block the loop."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername=f"postgresql+{driver}")
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=create_async_engine(url), schema=schema)
    release = asyncio.Event()
    errors: list[BaseException] = []

    async def repeat(*work: Callable[[], Awaitable[object]]) -> None:
        await insist(lambda: asyncio.sleep(60), errors)  # until the time limit
        while not release.is_set() and len(errors) < 100_000:
            try:
                for step in work:
                    await step()
                await asyncio.sleep(0.05)
            except BaseException as error:
                errors.append(error)

    @logto.on("User.Created", name="executes", max_attempts=1, time_limit=0.2)
    async def executes(event: events.UserCreated, session: AsyncSession) -> None:
        await session.execute(QUICK)
        await repeat(lambda: session.execute(QUICK))

    @logto.on("User.Created", name="begins", max_attempts=1, time_limit=0.2)
    async def begins(event: events.UserCreated, session: AsyncSession) -> None:
        await repeat(session.rollback, lambda: session.execute(QUICK))

    @logto.on("User.Created", name="connects", max_attempts=1, time_limit=0.2)
    async def connects(event: events.UserCreated, connection: AsyncConnection) -> None:
        await repeat(lambda: connection.execute(QUICK))

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="u", at=soon()))
        rows = await until(all_over(3), logto)
        assert [row.state for row in rows] == ["dead"] * 3
        await eventually(lambda: asyncio.sleep(0, errors), lambda errors: len(errors) > 6)
        release.set()

    live(logto, body)
    assert len(errors) < 100


def test_a_handler_that_left_too_many_is_not_called(tmp_path: Path) -> None:
    """Until some of them end; others are called meanwhile, and it is reported."""
    reports: list[TelemetryEvent] = []
    logto = on_sqlite(tmp_path, reports)
    release = asyncio.Event()

    @logto.on("User.Created", name="stays", max_attempts=1, time_limit=0.05, ordered=False)
    async def stays(event: events.UserCreated) -> None:
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()

    @logto.on("User.Created", name="good")
    async def good(event: events.UserCreated) -> None:
        """Return at once."""

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        users = [make.user_created(id=f"u{number}", at=soon()) for number in range(MOST_OF_ONE)]
        await send(client, *users)
        rows = await until(all_over(2 * MOST_OF_ONE), logto)
        assert states("good", rows) == ["done"] * MOST_OF_ONE
        assert states("stays", rows) == ["dead"] * MOST_OF_ONE
        await send(client, make.user_created(id="more", at=soon()))
        rows = await until(lambda rows: len(states("good", rows)) == MOST_OF_ONE + 1, logto)
        await until(lambda rows: "waiting" not in states("good", rows), logto)

        def is_held(reports: list[TelemetryEvent]) -> bool:
            return any(isinstance(report, HandlerHeld) for report in reports)

        await eventually(lambda: asyncio.sleep(0, reports), is_held)
        assert states("stays", await jobs(logto)) == ["dead"] * MOST_OF_ONE + ["waiting"]
        held = [report for report in reports if isinstance(report, HandlerHeld)]
        assert held == [HandlerHeld("stays", MOST_OF_ONE, MOST_OF_ONE)]
        release.set()
        rows = await until(all_over(2 * MOST_OF_ONE + 2), logto)
        assert states("stays", rows) == ["dead"] * MOST_OF_ONE + ["done"]

    live(logto, body)
    abandoned = [report for report in reports if isinstance(report, CoroutineAbandoned)]
    assert [report.handler for report in abandoned] == ["stays"] * MOST_OF_ONE


def test_one_that_ends_late_keeps_its_result(tmp_path: Path) -> None:
    """It was cancelled, and took a moment to end; it is done, or failed with its own error."""
    reports: list[TelemetryEvent] = []
    logto = on_sqlite(tmp_path, reports)

    async def take_long() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.5)

    @logto.on("User.Created", name="returns", max_attempts=1, time_limit=0.1)
    async def returns(event: events.UserCreated) -> None:
        await take_long()

    @logto.on("User.Created", name="raises", max_attempts=1, time_limit=0.1)
    async def raises(event: events.UserCreated) -> None:
        await take_long()
        raise LookupError("its own")

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="u", at=soon()))
        rows = {row.handler: row for row in await until(all_over(2), logto)}
        assert rows["returns"].state == "done"
        assert rows["raises"].state == "dead"
        assert "LookupError: its own" in (rows["raises"].error or "")

    live(logto, body)
    assert not [report for report in reports if isinstance(report, CoroutineAbandoned)]


def test_one_that_runs_at_the_stop_is_not_counted(tmp_path: Path) -> None:
    """Its job is free for another process after a while, as if it was never begun."""
    reports: list[TelemetryEvent] = []
    logto = on_sqlite(tmp_path, reports)
    begun = asyncio.Event()

    @logto.on("User.Created", name="stays")
    async def stays(event: events.UserCreated) -> None:
        begun.set()
        for _ in range(2):  # the event loop's own end is the third
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
        await asyncio.sleep(60)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="u", at=soon()))
        await asyncio.wait_for(begun.wait(), 30)

    live(logto, body)
    with sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}").connect() as connection:
        job = connection.execute(sa.text("SELECT state, attempts, failures FROM logto_jobs")).one()
        free = connection.execute(
            sa.text("SELECT token, due_at > unixepoch() * 1000 FROM logto_lines")
        ).one()
    assert tuple(job) == ("waiting", 0, 0)
    assert tuple(free) == (None, 1)
    [abandoned] = [report for report in reports if isinstance(report, CoroutineAbandoned)]
    assert abandoned.handler == "stays"
