"""Handlers that misbehave hold up nobody else, and are named."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.database.coroutines import DetachedTask
from logto_webhooks.database.sessions import find_written_table
from logto_webhooks.database.threads import (
    MOST,
    MOST_OF_ONE,
    RUNNING,
    AbandonedCalls,
    DetachedCall,
    Running,
)
from logto_webhooks.errors import TableIsReadOnly
from logto_webhooks.handlers import HandlerOptions, Handlers
from logto_webhooks.handlers.watchdog import Watchdog
from logto_webhooks.handlers.worker import AHEAD_S, ConcurrencyLimits
from logto_webhooks.instrumentation import HandlerBlocks, HandlerHeld, TelemetryEvent
from logto_webhooks.jobs import JobRow
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, live, send, soon, until
from tests.support.service import Service
from tests.support.waiting import until as wait_until


class Own(Session):
    """A subclass, as an application or SQLModel has it."""


def on_sqlite(folder: Path, reports: list[TelemetryEvent]) -> LogtoWebhooks:
    engine = sa.create_engine(f"sqlite:///{folder / 'app.db'}")
    return LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, observe=reports.append)


def states(handler: str, rows: list[JobRow]) -> list[str]:
    return [row.state for row in rows if row.handler == handler]


@pytest.mark.postgres
def test_a_session_of_an_asynchronous_engine_is_used_in_a_thread() -> None:
    """A plain handler with one blocks no event loop; what it writes commits with "done"."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
    threads: list[str] = []

    @logto.on("User.Created", name="plain", max_attempts=1)
    def plain(event: events.UserCreated, session: Own) -> None:
        assert type(session) is Own
        assert session.scalar(sa.text("SELECT 1")) == 1
        threads.append(threading.current_thread().name)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="u", at=soon()))
        assert [each.state for each in await until(all_over(1), logto)] == ["done"]

    live(logto, body)
    assert threads == ["logto-handler"]


def block() -> None:
    time.sleep(1.7)


async def blocks(event: events.UserCreated) -> None:
    block()


async def blocks_in_a_task(event: events.UserCreated) -> None:
    async def later() -> None:
        block()

    await asyncio.create_task(later())


@pytest.mark.parametrize("handler", [blocks, blocks_in_a_task])
def test_a_coroutine_that_blocks_its_loop_is_named(
    handler: Callable[..., object], tmp_path: Path
) -> None:
    """Once, while it blocks, with where it is; also where a task of its own does so."""
    reports: list[TelemetryEvent] = []
    logto = on_sqlite(tmp_path, reports)
    logto.on("User.Created", name="blocks")(handler)

    @logto.on("User.Created", name="plain")
    def plain(event: events.UserCreated) -> None:
        """It blocks a thread, which is no fault."""
        time.sleep(1.2)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="u", at=soon()))
        await until(all_over(2), logto)

    live(logto, body)
    [report] = [report for report in reports if isinstance(report, HandlerBlocks)]
    assert report.handler == "blocks"
    assert 1 <= report.blocked_s < 1.7
    innermost, caller, *_ = report.stack.split(" < ")
    assert innermost == f"test_misbehaving_handlers.py:{block.__code__.co_firstlineno + 1} block"
    assert caller.startswith("test_misbehaving_handlers.py:")


def test_a_loop_with_many_short_calls_is_the_fault_of_none_of_them() -> None:
    """Each blocks for less than what is reported, but all are ready at once."""
    reports: list[HandlerBlocks] = []

    def block_shortly() -> None:
        time.sleep(0.04)

    async def live() -> None:
        with Watchdog(reports.append).watching():
            calls = []
            for number in range(50):
                RUNNING.set(Running(f"handler {number}", AbandonedCalls()))
                calls.append(asyncio.create_task(DetachedTask().run(block_shortly)))
            await asyncio.wait(calls)

    asyncio.run(live())
    assert reports == []


def test_a_handler_that_left_too_many_threads_is_not_called(tmp_path: Path) -> None:
    """Until some of them end; others are called meanwhile, and it is reported."""
    reports: list[TelemetryEvent] = []
    logto = on_sqlite(tmp_path, reports)
    gate = threading.Event()

    @logto.on("User.Created", name="stuck", max_attempts=1, time_limit=0.05, ordered=False)
    def stuck(event: events.UserCreated) -> None:
        gate.wait()

    @logto.on("User.Created", name="good")
    def good(event: events.UserCreated) -> None:
        """Return at once."""

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        first = [make.user_created(id=f"u{number}", at=soon()) for number in range(MOST_OF_ONE)]
        await send(client, *first)
        await until(all_over(2 * MOST_OF_ONE), logto)
        await send(client, make.user_created(id="more", at=soon()))

        def only_it_waits(rows: list[JobRow]) -> bool:
            return states("good", rows) == ["done"] * (MOST_OF_ONE + 1)

        rows = await until(only_it_waits, logto)
        assert sorted(states("stuck", rows)) == ["dead"] * MOST_OF_ONE + ["waiting"]
        held = [report for report in reports if isinstance(report, HandlerHeld)]
        assert held == [HandlerHeld("stuck", MOST_OF_ONE, MOST_OF_ONE)]
        gate.set()
        rows = await until(all_over(2 * MOST_OF_ONE + 2), logto)
        assert sorted(states("stuck", rows)) == ["dead"] * MOST_OF_ONE + ["done"]

    try:
        live(logto, body)
    finally:
        gate.set()


def test_where_all_left_too_many_threads_only_coroutines_are_called() -> None:
    """None of them left too many by itself; when some end, all are called again."""
    handlers, left, gate = Handlers(), AbandonedCalls(), threading.Event()

    def plain(event: events.UserCreated) -> None: ...

    async def awaited(event: events.UserCreated) -> None: ...

    names = [f"plain {number}" for number in range(MOST // MOST_OF_ONE + 1)]
    for name in names:
        handlers.add(plain, ["User.Created"], name=name, options=HandlerOptions())
    handlers.add(awaited, ["User.Created"], name="awaited", options=HandlerOptions())
    limits = ConcurrencyLimits(handlers, transactions=5, abandoned=left)
    assert limits.find_free({}).keys() == {*names, "awaited"}
    for number in range(MOST):
        RUNNING.set(Running(names[number % len(names)], left))
        call = DetachedCall[bool]()
        assert not call.wait(gate.wait, longest_s=0)
    assert max(left.counts().values()) < MOST_OF_ONE
    assert limits.find_free({}).keys() == {"awaited"}
    assert limits.find_blocked().keys() == set(names)
    gate.set()
    wait_until(lambda: not left.counts())
    assert limits.find_free({}).keys() == {*names, "awaited"}


def test_jobs_of_a_fast_handler_are_claimed_ahead() -> None:
    """Many at a time, and again when half of them are done; those of a slow one are not."""
    handlers = Handlers()

    async def awaited(event: events.UserCreated, connection: AsyncConnection) -> None: ...

    for name in ("fast", "slow"):
        options = HandlerOptions(concurrency=2)
        handlers.add(awaited, ["User.Created"], name=name, options=options)
    limits = ConcurrencyLimits(handlers, transactions=4, abandoned=AbandonedCalls())
    assert limits.find_free({}) == {"fast": 2, "slow": 2}

    async def run_both() -> None:
        async with limits.run("fast"):
            pass
        async with limits.run("slow"):
            await asyncio.sleep(AHEAD_S)

    asyncio.run(run_both())
    free = limits.find_free({})
    assert free["slow"] == 2
    assert 2 < free["fast"] <= 100
    few, many = free["fast"] // 2 - 1, free["fast"] // 2
    assert limits.find_free({"fast": few, "slow": 2}) == {"fast": free["fast"] - few}
    assert limits.find_free({"fast": many, "slow": 1}) == {"slow": 1}


HOSTILE = """
import asyncio
import sys

from logto_webhooks import LogtoWebhooks, events

logto = LogtoWebhooks.from_env()


@logto.on("User.Created", name="good")
async def good(event: events.UserCreated) -> None:
    await asyncio.sleep(0)


@logto.on("User.Deleted", name="stops", max_attempts=1)
async def stops(event):
    asyncio.get_running_loop().stop()


@logto.on("User.Deleted", name="exits", max_attempts=1)
async def exits(event):
    async def leave():
        sys.exit(3)

    asyncio.create_task(leave())


@logto.on("User.Deleted", name="interrupts", max_attempts=1)
async def interrupts(event):
    def interrupt():
        raise KeyboardInterrupt

    asyncio.get_running_loop().call_soon(interrupt)


@logto.on("User.Deleted", name="cancels", max_attempts=1)
async def cancels(event):
    for task in asyncio.all_tasks():
        task.cancel()
"""


@pytest.mark.process
def test_the_service_goes_on_whatever_a_handler_does_to_its_loop(tmp_path: Path) -> None:
    """It stops the loop, ends the process from a task, or cancels all tasks."""
    (tmp_path / "hostile.py").write_text(HOSTILE)
    with Service(tmp_path, "--app", "hostile:logto") as service:
        for number in range(3):
            at = soon()
            assert service.post(make.user_created(id=f"u{number}", at=at)).status_code == 200
            gone = make.user_deleted(id=f"u{number}", at=at + 1)
            assert service.post(gone).status_code == 200
        query = "SELECT handler, state, count(*) FROM logto_jobs GROUP BY handler, state"

        def is_over() -> bool:
            rows = service.rows(query)
            return sum(count for *_, count in rows) == 15 and "waiting" not in {
                state for _, state, _ in rows
            }

        wait_until(is_over, lambda: f"{service.rows(query)}\n{service.log}", 60)
        assert ("good", "done", 3) in service.rows(query)
        assert "stopped its event loop" in service.log
        assert "SystemExit was raised" in service.log
        assert "cancelled tasks" in service.log
        assert service.post(make.user_created(id="last", at=soon())).status_code == 200
        done = "SELECT count(*) FROM logto_jobs WHERE handler = 'good' AND state = 'done'"
        wait_until(lambda: service.rows(done) == [(4,)], lambda: service.log)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    "statement",
    [
        "LOCK TABLE logto_deliveries IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE pg_temp.mine, logto_records",
        "DO $$ BEGIN PERFORM * FROM logto_records FOR UPDATE; END $$",
        "UPDATE logto_users SET name = 'x'",
        'DELETE FROM ONLY "logto_jobs"',
    ],
)
def test_a_handler_that_locks_our_tables_stops_nobody(statement: str, driver: str) -> None:
    """Its statement is refused; accepting and the sync of others go on beside it."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername=f"postgresql+{driver}")
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=create_async_engine(url), schema=schema)
    begun, release = asyncio.Event(), asyncio.Event()
    raised: list[Exception] = []

    @logto.on("User.Created", name="locks", max_attempts=1, ordered=False)
    async def locks(event: events.UserCreated, session: AsyncSession) -> None:
        if event.user_id == "first":
            await session.execute(sa.text(f"SET LOCAL search_path TO {schema}"))
            try:
                await session.execute(sa.text(statement))
            except TableIsReadOnly as error:
                raised.append(error)
            await logto.ensure_user({"sub": "somebody"}, session=session)
            begun.set()
            await release.wait()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="first", at=soon()))
        await asyncio.wait_for(begun.wait(), 10)
        started = time.monotonic()
        await send(client, make.user_created(id="second", at=soon()))
        await logto.wait_for_user("second")
        assert time.monotonic() - started < 5
        release.set()
        rows = await until(all_over(2), logto)
        assert states("locks", rows) == ["done", "done"]
        await logto.wait_for_user("somebody")

    live(logto, body)
    assert len(raised) == 1


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("SELECT * FROM logto_users JOIN mine USING (id)", None),
        ("SELECT * FROM mine JOIN logto_users USING (id) FOR UPDATE OF mine", None),
        ("INSERT INTO mine SELECT id FROM logto_users", None),
        ("UPDATE mine SET name = u.name FROM logto_users u", None),
        ("UPDATE logto_users_of_mine SET name = 'x'", None),
        ("CREATE TABLE mine (id uuid REFERENCES logto_users (id))", None),
        ("SELECT id FROM public.logto_users FOR NO KEY UPDATE", "logto_users"),
        ("INSERT INTO auth.logto_users VALUES (1)", "logto_users"),
        ("WITH x AS (DELETE FROM logto_jobs RETURNING id) SELECT 1", "logto_jobs"),
        ("truncate table logto_organization_members", "logto_organization_members"),
        ("ALTER TABLE logto_users ADD COLUMN mine int", "logto_users"),
        ("CREATE INDEX mine ON logto_users (name)", "logto_users"),
    ],
)
def test_which_statements_write_to_our_tables(statement: str, table: str | None) -> None:
    """Or lock them; foreign keys and reading are fine."""
    assert find_written_table(statement) == table
