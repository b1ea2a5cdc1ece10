"""Rows and tables that another transaction holds: only what needs them waits (PostgreSQL)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.apply import ClockWatch, batch
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.schema import deliveries
from logto_webhooks.database.store import DatabaseClock, Store
from logto_webhooks.errors import TimedOut
from logto_webhooks.instrumentation import ClockSetBack, TelemetryEvent
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import live, send, soon
from tests.support.stores import Copy, StoreKind, delivery, open_host
from tests.support.waiting import eventually

DRIVERS: list[StoreKind] = ["asyncpg", "psycopg", "postgres-thread"]


@contextmanager
def locked(statement: str) -> Iterator[sa.Connection]:
    """Another transaction holds something until the block ends."""
    with postgres.sync_engine().connect() as other:
        other.execute(sa.text(f"SET LOCAL search_path TO {postgres.schema()}"))
        other.execute(sa.text(statement))
        yield other
        other.rollback()


def organization(name: str, id: str) -> bytes:
    return make.event("Organization.Created", id=id, name=name).body


@pytest.mark.parametrize("kind", DRIVERS)
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM logto_organizations WHERE logto_organization_id = 'a' FOR UPDATE",
        "SELECT * FROM logto_deliveries WHERE subject = 'organization:a' FOR UPDATE",
    ],
)
def test_others_are_applied_beside_a_locked_row(
    statement: str, kind: StoreKind, tmp_path: Path
) -> None:
    """The row of an organization, or that of a delivery; it is applied once it is free."""

    async def body() -> None:
        host = open_host(kind, tmp_path)
        copy = Copy(host)
        await copy.take([organization("old", "a")])
        change = make.event("Organization.Data.Updated", id="a", name="new").body
        new = [delivery(each) for each in [change, organization("b", "b"), organization("c", "c")]]
        await host.run(lambda store: store.add(new))

        async def pending(count: int) -> bool:
            status = await host.read(lambda store: store.status())
            return status.deliveries["pending"] == count

        copy.worker._token = "claimed"
        copy.worker._claimed_at = time.monotonic()
        claimed = await host.run(copy.worker._claim)
        copy.worker._unapplied = [batch.parse_delivery(each, 100) for each in claimed]
        with locked(statement):
            working = asyncio.create_task(copy.worker.run())
            await eventually(lambda: pending(1))
        await eventually(lambda: pending(0))
        copy.worker.stop()
        await working
        found = await host.read(lambda store: store.find("organization", "a", 9))
        assert [each.row["name"] for each in found] == ["new"]
        await host.close()

    asyncio.run(body())


@pytest.mark.parametrize("kind", DRIVERS)
def test_time_outs_leave_a_delivery_all_its_failures(kind: StoreKind, tmp_path: Path) -> None:
    """Locked more often than it may fail, it is tried again after the first failure."""

    async def body() -> None:
        host = open_host(kind, tmp_path)
        copy = Copy(host)
        await host.run(lambda store: store.add([delivery(organization("a", "a"))]))
        errors = [*[TimedOut(problem="locked")] * 9, ValueError(), ValueError()]
        for number, error in enumerate(errors):
            copy.worker._token = f"token {number}"
            await host.run(_make_due)
            [claimed] = await host.run(copy.worker._claim)
            report = await copy.worker._fail_alone(claimed, error)
            assert report.retry_in_s is not None, number
        assert (claimed.attempt, claimed.failures) == (11, 1)
        await host.close()

    asyncio.run(body())


def _make_due(store: Store) -> None:
    assert isinstance(store, Store)
    store._connection.execute(sa.update(deliveries).values(due_at=0))


@pytest.mark.parametrize("kind", DRIVERS)
def test_a_locked_table_is_waited_for(kind: StoreKind, tmp_path: Path) -> None:
    """For some seconds nothing can be applied; then all is."""

    async def body() -> None:
        host = open_host(kind, tmp_path)
        copy = Copy(host)
        new = [delivery(organization(name, name)) for name in "abcdefgh"]
        await host.run(lambda store: store.add(new))

        async def done() -> bool:
            status = await host.read(lambda store: store.status())
            return status.deliveries["done"] == len(new)

        with locked("LOCK TABLE logto_records"):
            working = asyncio.create_task(copy.worker.run())
            await asyncio.sleep(3)
        await eventually(done)
        copy.worker.stop()
        await working
        await host.close()

    asyncio.run(body())


@pytest.mark.parametrize("kind", DRIVERS)
def test_no_transaction_of_ours_waits_long_for_a_lock(kind: StoreKind, tmp_path: Path) -> None:
    """Whatever it does: the host sets the limit."""

    async def body() -> None:
        host = open_host(kind, tmp_path)
        with locked("LOCK TABLE logto_handlers"):
            started = time.monotonic()
            with pytest.raises(TimedOut):
                await host.run(lambda store: store.jobs.forget("any", 10))
            assert time.monotonic() - started < 5
        await host.close()

    asyncio.run(body())


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("table", ["logto_jobs", "logto_lines"])
def test_other_jobs_run_beside_a_locked_one(table: str, driver: str) -> None:
    """What was run while its job, or its queue, is locked isn't run again."""
    schema = postgres.emptied_schema()
    called: list[str] = []
    release = asyncio.Event()

    def body() -> tuple[LogtoWebhooks, Any]:
        url = postgres.server_url().set(drivername=f"postgresql+{driver}")
        engine = sa.create_engine(url) if driver == "psycopg" else create_async_engine(url)
        logto = LogtoWebhooks(
            signing_key=SIGNING_KEY,
            engine=engine,
            schema=schema,
        )

        @logto.on("User.Created")
        async def greet(event: events.UserCreated) -> None:
            called.append(event.user_id or "")
            if event.user_id == "a":
                await release.wait()

        async def called_are(count: int) -> bool:
            return len(called) == count

        async def waiting(count: int) -> bool:
            with postgres.sync_engine().connect() as looking:
                query = f"SELECT count(*) FROM {schema}.logto_jobs WHERE state = 'waiting'"
                return bool(looking.scalar(sa.text(query)) == count)

        async def run(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.user_created(id="a", at=soon()))
            await eventually(lambda: called_are(1))
            with locked(f"SELECT * FROM {table} FOR UPDATE"):
                release.set()
                for name in "bcd":
                    await send(client, make.user_created(id=name, at=soon()))
                await eventually(lambda: called_are(4))
                await eventually(lambda: waiting(1))
            await eventually(lambda: waiting(0))

        return logto, run

    live(*body())
    assert sorted(called) == ["a", "b", "c", "d"]


class Clocks:
    """A host whose database has this clock."""

    def __init__(self) -> None:
        self.now, self.noted, self.too_late = 1_000_000_000, 1_000_000_000, False
        self.moved = 0
        self.slow_s = 0.0  # until an answer comes
        self.back: list[int] = []
        self.locked = False

    async def read(self, work: object) -> DatabaseClock:
        await asyncio.sleep(self.slow_s)
        return DatabaseClock(
            now=self.now,
            noted=self.noted,
            installed=0,
            moved=self.moved,
            due_too_late=self.too_late,
        )

    async def run(self, work: Callable[[Clocks], None]) -> None:
        if self.locked:
            raise TimedOut(problem="locked")
        work(self)

    def set_clock_back(self, by_ms: int, moved: int) -> None:
        assert moved == self.moved
        self.back.append(by_ms)
        self.noted = self.now
        self.moved += by_ms


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> tuple[Clocks, ClockWatch, list[TelemetryEvent]]:
    monkeypatch.setattr("logto_webhooks.apply.CLOCK_S", 0.0)
    clocks, reports = Clocks(), list[TelemetryEvent]()
    host: TransactionRunner = clocks  # type: ignore[assignment]
    return clocks, ClockWatch(host, reports.append), reports


def test_a_clock_that_goes_back_is_noticed_once(
    looking: tuple[Clocks, ClockWatch, list[TelemetryEvent]],
) -> None:
    """By how much what waits must be moved; a small correction is none."""
    clocks, watch, reports = looking
    asyncio.run(watch.look())
    clocks.now -= 500
    asyncio.run(watch.look())
    assert clocks.back == []
    clocks.now -= 86_400_000
    asyncio.run(watch.look())
    asyncio.run(watch.look())
    [by_ms] = clocks.back
    assert 86_400_000 <= by_ms < 86_410_000
    assert [type(each) for each in reports] == [ClockSetBack]


def test_of_several_who_notice_only_one_moves_what_waits(
    looking: tuple[Clocks, ClockWatch, list[TelemetryEvent]],
) -> None:
    """A lease that is moved twice ends while its job runs: somebody else would run it, too."""
    clocks, watch, _ = looking
    other = ClockWatch(clocks, lambda event: None)  # type: ignore[arg-type]
    for each in (watch, other, watch, other):
        asyncio.run(each.look())
    clocks.now -= 20_000
    for each in (watch, other, watch, other):
        asyncio.run(each.look())
    assert len(clocks.back) == 1
    clocks.now -= 20_000
    for each in (other, watch, other, watch):
        asyncio.run(each.look())
    assert len(clocks.back) == 2


def test_an_answer_that_took_long_is_no_clock_that_went_back(
    looking: tuple[Clocks, ClockWatch, list[TelemetryEvent]],
) -> None:
    clocks, watch, _ = looking
    clocks.slow_s = 1.3
    clocks.now += 1_300
    asyncio.run(watch.look())
    clocks.slow_s = 0.0
    asyncio.run(watch.look())
    assert clocks.back == []


def test_a_clock_that_goes_back_while_rows_are_locked_is_noticed_again(
    looking: tuple[Clocks, ClockWatch, list[TelemetryEvent]],
) -> None:
    clocks, watch, reports = looking
    asyncio.run(watch.look())
    clocks.now -= 86_400_000
    clocks.locked = True
    asyncio.run(watch.look())
    assert reports == []
    clocks.locked = False
    asyncio.run(watch.look())
    assert len(clocks.back) == len(reports) == 1


def test_a_due_time_that_no_wait_explains_is_mended(
    looking: tuple[Clocks, ClockWatch, list[TelemetryEvent]],
) -> None:
    clocks, watch, reports = looking
    clocks.too_late = True
    asyncio.run(watch.look())
    assert clocks.back == [0]
    assert reports == []
