"""No error ends a loop in the background."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from logto_webhooks.arrivals import FlowMonitor, compare_clocks
from logto_webhooks.database import Database
from logto_webhooks.errors import StoreUnavailable
from logto_webhooks.event_loop import forever
from logto_webhooks.ingest.quarantine import Quarantine
from logto_webhooks.reconcile.leader import LeaderLease
from logto_webhooks.reconcile.reconcile import Reconciliation
from logto_webhooks.reconcile.recover import Recovery
from logto_webhooks.reconcile.refetch import Refetcher
from logto_webhooks.runtime import WorkerGroup
from logto_webhooks.signing_keys import Keyring
from logto_webhooks.testing import FrozenClock

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

CLOCK = FrozenClock()


class Failing:
    """A database and a Logto in one, of which everything fails in a way that nobody foresaw."""

    def __init__(self) -> None:
        self.asked = 0

    async def run(self, work: object) -> Any:
        self.asked += 1
        raise ZeroDivisionError

    read = run

    def webhooks(self) -> Any:
        raise ZeroDivisionError


async def work() -> None:
    """Do nothing."""


def loops(host: Any, reports: list[Any]) -> dict[str, Callable[[], Awaitable[None]]]:
    logto: ManagementClient = host
    group = object.__new__(WorkerGroup)
    database: Database = type("Fake", (), {"host": host})()
    group._database = database
    return {
        "flow": FlowMonitor(host, CLOCK, reports.append, None).keep,
        "clocks": partial(compare_clocks, host, CLOCK),
        "quarantine": Quarantine(
            host, Keyring(["k" * 32]), CLOCK, reports.append, lambda: None
        ).keep,
        "recover": lambda: Recovery(logto, host, CLOCK, [], None, lambda: None).keep(
            60, reports.append
        ),
        "refetch": Refetcher(logto, host, reports.append).keep,
        "reconcile": lambda: Reconciliation(logto, host, CLOCK, None).keep(60, reports.append),
        "leader": lambda: LeaderLease(host, CLOCK, 1).keep(
            lambda: asyncio.sleep(0), reports.append
        ),
        "handlers of others": group._watch,
    }


@pytest.mark.parametrize("name", loops(Failing(), []))
def test_each_loop_of_the_service_goes_on(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After an error that nobody foresaw, which is reported, with its place in the code."""
    reports: list[Any] = []
    host = Failing()
    sleep = asyncio.sleep

    async def run() -> None:
        monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))
        task = asyncio.ensure_future(loops(host, reports)[name]())
        for _ in range(100):
            await sleep(0)
        assert not task.done()
        assert host.asked >= 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    told = [record.getMessage() for record in caplog.records] + list(map(str, reports))
    assert any("ZeroDivisionError at" in text or "ZeroDivisionError" in text for text in told)


def test_what_is_foreseen_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Others report that the database is away; a report of its own decides about the pause."""
    asked: list[int] = []
    waits: list[float] = []

    async def step() -> None:
        asked.append(1)
        raise StoreUnavailable(problem="away")

    def report(error: Exception) -> float:
        waits.append(0)
        return 0

    async def run() -> None:
        for failed in (None, report):
            task = asyncio.ensure_future(forever(step, 0, failed))
            for _ in range(5):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert len(asked) > 2
    assert waits
    assert not caplog.records
