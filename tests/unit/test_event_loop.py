"""No error ends a loop in the background."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from logto_webhooks import event_loop
from logto_webhooks.arrivals import FlowMonitor, compare_clocks
from logto_webhooks.database import Database
from logto_webhooks.database.threads import DetachedCall, SerialExecutor
from logto_webhooks.errors import StoreUnavailable
from logto_webhooks.event_loop import (
    LoopThread,
    forever,
    keep_running,
    run_in_background,
    run_in_thread,
)
from logto_webhooks.ingest.quarantine import Quarantine
from logto_webhooks.instrumentation import Resumed
from logto_webhooks.instrumentation.logs import fan_out
from logto_webhooks.reconcile import leader
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
    """After an error that nobody foresaw, which is reported, with its place in the code; however
    often it comes: 2.0 ** 1024 is too large for a float."""
    reports: list[Any] = []
    host = Failing()
    sleep = asyncio.sleep

    async def run() -> None:
        monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))
        task = asyncio.ensure_future(loops(host, reports)[name]())
        while host.asked < 1_100 and not task.done():
            await sleep(0)
        assert not task.done()
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


async def end_by(raised: BaseException | None) -> None:
    if raised is not None:
        raise raised


ENDS: dict[str, BaseException | None] = {
    "it returned": None,
    "was cancelled": asyncio.CancelledError(),
    "GeneratorExit": GeneratorExit(),
    "ZeroDivisionError": ZeroDivisionError(),
    "away": StoreUnavailable(problem="away"),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_loop_that_nobody_stopped_runs_again(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pause, whatever ended it; and that is told."""
    monkeypatch.setattr(event_loop, "RESTART_S", 0.001)
    told: list[tuple[str, float]] = []
    begun: list[int] = []

    async def loop() -> None:
        begun.append(1)
        await end_by(ENDS[how])

    def tell(problem: str, wait_s: float) -> None:
        told.append((problem, wait_s))

    async def run() -> None:
        await keep_running(loop, tell, lambda _: len(begun) == 3)

    raised = ENDS[how]
    if raised is None or isinstance(raised, asyncio.CancelledError):
        asyncio.run(run())
    else:  # at its end, its error is raised
        with pytest.raises(type(raised)):
            asyncio.run(run())
    assert len(told) == 2
    assert all(how in problem and wait_s == 0.001 for problem, wait_s in told)


def test_a_loop_in_the_background_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or when it returns. It is told only if it ends otherwise."""
    monkeypatch.setattr(event_loop, "RESTART_S", 0.001)
    told: list[str] = []
    begun: list[str] = []
    ended: list[str] = []

    async def goes_on() -> None:
        begun.append("goes on")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("goes on")

    async def returns() -> None:
        begun.append("returns")

    async def run() -> None:
        failed = asyncio.Event()

        async def fails() -> None:
            begun.append("fails")
            if begun.count("fails") == 3:
                failed.set()
            raise asyncio.CancelledError

        def tell(problem: str, _: float) -> None:
            told.append(problem)

        async with run_in_background(goes_on, returns, fails, tell=tell):
            await failed.wait()

    asyncio.run(run())
    assert (begun.count("goes on"), begun.count("returns"), ended) == (1, 1, ["goes on"])
    assert set(told) == {"a loop was cancelled, although nobody stopped it"}


UNUSUAL = (asyncio.CancelledError, GeneratorExit, SystemExit, KeyboardInterrupt, StopIteration)


@pytest.mark.parametrize("raised", UNUSUAL)
def test_whatever_work_in_a_thread_raises_is_an_error(raised: type[BaseException]) -> None:
    """It would end who waits for it, or look as if that was cancelled."""

    def work() -> None:
        raise raised

    async def run() -> None:
        lane, thread = SerialExecutor("lane"), LoopThread("loop")

        async def main() -> None:
            work()

        calls: list[Callable[[], Awaitable[None]]] = [
            lambda: run_in_thread(work),
            lambda: lane.run(work),
            lambda: DetachedCall[None]().run(work),
        ]
        if raised in (GeneratorExit, SystemExit, KeyboardInterrupt):  # others end as usual
            calls.append(lambda: thread.run(main))
        for call in calls:
            with pytest.raises(RuntimeError, match=raised.__name__) as caught:
                await call()
            assert isinstance(caught.value.__cause__, raised)
        lane.close(wait_s=1)

    asyncio.run(run())


def test_a_real_cancellation_stays_one() -> None:
    """Of who waits for a thread, and of who runs a loop."""

    async def run() -> None:
        gate = threading.Event()
        told: list[str] = []
        lane = SerialExecutor("lane")
        works = (
            run_in_thread(gate.wait),
            lane.run(gate.wait),
            DetachedCall[bool]().run(gate.wait),
            keep_running(lambda: asyncio.sleep(60), lambda problem, _: told.append(problem)),
        )
        for work in works:
            task = asyncio.ensure_future(work)
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        gate.set()
        lane.close(wait_s=1)
        assert told == []

    asyncio.run(run())


@pytest.mark.parametrize("raised", [asyncio.CancelledError, GeneratorExit, SystemExit])
def test_an_observer_may_raise_anything(
    raised: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """The others still run, and nothing else ends. In the main thread, it may end the process."""
    told: list[object] = []

    def fails(report: object) -> None:
        raise raised

    observe = fan_out(fails, told.append)
    asyncio.run(run_in_thread(observe, Resumed()))
    assert told == [Resumed()]
    assert "an observer failed" in caplog.text
    if raised is SystemExit:
        with pytest.raises(SystemExit):
            observe(Resumed())
    else:
        observe(Resumed())
        assert len(told) == 2


class Leading:
    """A database in which this process always gets the lease."""

    async def run(self, work: object) -> Any:
        return True


def test_work_of_the_leader_that_ended_is_told_and_begins_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever ended it, as long as this process holds the lease."""
    monkeypatch.setattr(leader, "RENEW_S", 0.001)
    reports: list[Any] = []

    async def run() -> None:
        begun = 0
        is_enough = asyncio.Event()

        async def work() -> None:
            nonlocal begun
            begun += 1
            if begun == 3:
                is_enough.set()
            raise [asyncio.CancelledError, GeneratorExit, ZeroDivisionError][begun % 3]

        host: Any = Leading()
        lease = LeaderLease(host, CLOCK, 1)
        task = asyncio.ensure_future(lease.keep(work, reports.append))
        await asyncio.wait_for(is_enough.wait(), 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    told = [report.problem for report in reports]
    assert len(told) >= 2
    assert "GeneratorExit" in told[0]
    assert "ZeroDivisionError" in told[1]
