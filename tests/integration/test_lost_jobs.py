"""Jobs whose process was killed: done again, beside those of other handlers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.clock import SystemClock
from logto_webhooks.database.dialect import now
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.schema import queue_keys
from logto_webhooks.database.store import Store
from logto_webhooks.database.threads import MOST_OF_ONE
from logto_webhooks.handlers import HandlerOptions, Handlers
from logto_webhooks.handlers.worker import CLEARED_S, JobWorker
from logto_webhooks.jobs import JobFilter, JobRow
from tests.support.jobs import job
from tests.support.waiting import eventually

SUBJECTS = ("ana", "bo", "cleo")


async def lose(host: HandlerRunner, handler: str, *subjects: str, times: int = 1) -> None:
    """Make a job for each; so often, whoever claims it says nothing more."""
    made = [job(each, queue_key=f"user:{each}", handler=handler) for each in subjects]
    await host.run(lambda store: store.jobs.add(made))
    room = {handler: len(subjects)}
    for _ in range(times):
        await host.run(lambda store: store.jobs.claim("gone", room, -1))


async def run_until_over(
    host: HandlerRunner,
    *handlers: tuple[str, Any],
    over: str,
    then: Callable[[], object] = lambda: None,
) -> None:
    """Run these handlers, all in one process, until no job of one of them waits; `then` stop."""
    known = Handlers()
    known.fit(host.provides)
    for name, function in handlers:
        known.add(function, ["LocalUserUpdated"], name=name, options=HandlerOptions())
    worker = JobWorker(host, SystemClock(), lambda report: None, lambda: 0.0, known)
    running = asyncio.create_task(worker.run())

    async def rows() -> list[JobRow]:
        return await host.read(lambda store: store.jobs.find(JobFilter(handler=over)))

    await eventually(rows, lambda found: {each.state for each in found} == {"done"})
    then()
    worker.stop()
    await running
    await host.close()


def recorder(told: list[str], name: str, wait: Callable[[], Awaitable[object]]) -> Any:
    async def handler() -> None:
        told.append(name)
        await wait()
        told.append(f"{name} ends")

    return handler


def check_slow_holds_back_no_quick(host: HandlerRunner, *lost: str, times: int = 1) -> None:
    """Lose jobs of a handler that only ends when those of a quick one, lost once, are done."""
    told: list[str] = []
    release = asyncio.Event()
    slow = recorder(told, "slow", release.wait)
    quick = recorder(told, "quick", lambda: asyncio.sleep(0))

    async def run() -> None:
        await lose(host, "slow", *lost, times=times)
        await lose(host, "quick", *SUBJECTS)
        both = (("slow", slow), ("quick", quick))
        await run_until_over(host, *both, over="quick", then=release.set)

    asyncio.run(run())
    assert told[0] == "slow"
    assert told[: told.index("slow ends")].count("quick ends") == len(SUBJECTS)


def test_a_slow_handler_holds_back_no_lost_jobs_of_another(host: HandlerRunner) -> None:
    """Although its own are first, and don't end before."""
    check_slow_holds_back_no_quick(host, *SUBJECTS)


def test_what_was_lost_twice_runs_beside_nothing_else_that_was(host: HandlerRunner) -> None:
    """However long it takes: it may be what ends its process, and one more loss is the end."""
    told: list[str] = []
    doubtful = recorder(told, "doubtful", lambda: asyncio.sleep(1.5 * CLEARED_S))
    quick = recorder(told, "quick", lambda: asyncio.sleep(0))

    async def run() -> None:
        await lose(host, "doubtful", "ana", times=2)
        await lose(host, "quick", "ana", times=2)
        await run_until_over(host, ("doubtful", doubtful), ("quick", quick), over="quick")

    asyncio.run(run())
    assert told == ["doubtful", "doubtful ends", "quick", "quick ends"]


def test_a_long_job_that_was_lost_twice_holds_back_none_that_was_lost_once(
    host: HandlerRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than it is suspected: two kills of its process are no reason to wait for it."""
    monkeypatch.setattr("logto_webhooks.handlers.worker.CLEARED_S", 0.05)
    check_slow_holds_back_no_quick(host, "ana", times=2)


def test_jobs_whose_queue_is_lost_run(host: HandlerRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker finds them step by step, beside its other work."""
    monkeypatch.setattr("logto_webhooks.handlers.worker.MEND_S", 0.0)
    monkeypatch.setattr("logto_webhooks.handlers.worker.MENDED_AT_ONCE", 2)
    told: list[str] = []
    quick = recorder(told, "quick", lambda: asyncio.sleep(0))

    async def run() -> None:
        made = [job(each, queue_key=f"user:{each}", handler="quick") for each in "abcdefg"]
        await host.run(lambda store: store.jobs.add(made))
        await host.run(lambda store: _lose_queues(store, "user:a", "user:e", "user:g"))
        await run_until_over(host, ("quick", quick), over="quick")

    asyncio.run(run())
    assert told.count("quick ends") == 7


def _lose_queues(store: Store, *queues: str) -> None:
    store.connection.execute(sa.delete(queue_keys).where(queue_keys.c.queue_key.in_(queues)))


def make_worker(
    host: HandlerRunner, function: Callable[[], Any], options: HandlerOptions | None = None
) -> JobWorker:
    """A worker with one handler."""
    known = Handlers()
    known.fit(host.provides)
    known.add(function, ["LocalUserUpdated"], name="one", options=options or HandlerOptions())
    return JobWorker(host, SystemClock(), lambda report: None, lambda: 0.0, known)


async def add(host: HandlerRunner, *subjects: str) -> None:
    made = [job(each, queue_key=f"user:{each}") for each in subjects]
    await host.run(lambda store: store.jobs.add(made))


def test_a_clock_that_is_set_forward_runs_no_job_twice(host: HandlerRunner) -> None:
    """All leases are over at once, but a process knows what it runs, and renews it."""
    told: list[str] = []
    release = asyncio.Event()
    worker = make_worker(host, recorder(told, "one", release.wait))
    is_over = queue_keys.c.held_until < now()

    async def count_over() -> int:
        query = sa.select(queue_keys.c.id).where(is_over)
        return len(await host.read(lambda store: store.connection.scalars(query).all()))

    async def body() -> None:
        await add(host, "ana")
        running = asyncio.create_task(worker.run())
        await eventually(lambda: asyncio.sleep(0, told[:]), bool)
        forward = sa.update(queue_keys).values(held_until=queue_keys.c.held_until - 3_600_000)
        await host.run(lambda store: store.connection.execute(forward))
        worker.wake()
        await eventually(count_over, lambda count: count == 0)
        release.set()
        await eventually(
            lambda: host.read(lambda store: store.jobs.find(JobFilter())),
            lambda rows: [row.state for row in rows] == ["done"],
        )
        worker.stop()
        await running
        await host.close()

    asyncio.run(body())
    assert told == ["one", "one ends"]


def test_jobs_of_a_handler_that_becomes_slow_are_left_to_others(host: HandlerRunner) -> None:
    """They were claimed ahead while it was fast."""
    release = asyncio.Event()
    release.set()

    async def handle() -> None:
        if not release.is_set():
            await asyncio.sleep(1)

    worker = make_worker(host, handle, HandlerOptions(concurrency=1))

    async def claim_others() -> int:
        return len(await host.run(lambda store: store.jobs.claim("t", {"one": 99}, 60)))

    async def body() -> None:
        running = asyncio.create_task(worker.run())
        await add(host, *(f"fast{number}" for number in range(50)))
        await eventually(
            lambda: host.read(lambda store: store.jobs.count_waiting()), lambda count: not count
        )
        release.clear()
        await add(host, *(f"slow{number}" for number in range(50)))
        worker.wake()
        claimed = 0

        async def claim_more() -> int:
            nonlocal claimed
            claimed += await claim_others() if worker._held else 0
            return claimed

        await eventually(claim_more, lambda count: count > 30)
        worker.stop()
        await running
        await host.close()

    asyncio.run(body())


def test_claimed_jobs_of_a_handler_that_may_not_be_called_are_released(
    host: HandlerRunner,
) -> None:
    """Its abandoned calls are limited, however many jobs were claimed ahead."""
    hang, calls = threading.Event(), list[int]()

    def handle() -> None:
        calls.append(1)
        if not hang.is_set():
            hang.wait(60)

    hang.set()
    worker = make_worker(host, handle, HandlerOptions(concurrency=1, time_limit_s=0.05))

    async def body() -> None:
        running = asyncio.create_task(worker.run())
        await add(host, *(f"fast{number}" for number in range(50)))
        await eventually(
            lambda: host.read(lambda store: store.jobs.count_waiting()), lambda count: not count
        )
        hang.clear()
        calls.clear()
        await add(host, *(f"slow{number}" for number in range(50)))
        worker.wake()
        await eventually(lambda: asyncio.sleep(0, len(calls)), lambda count: count == MOST_OF_ONE)
        await eventually(lambda: asyncio.sleep(0, len(worker._held)), lambda count: count == 0)
        hang.set()
        assert len(calls) == MOST_OF_ONE
        worker.stop()
        await running
        await host.close()

    asyncio.run(body())
