"""Deliveries replayed, and jobs named by hand: on every store, and as methods."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from logto_webhooks import LogtoWebhooks, admin
from logto_webhooks.apply.replay import ReplayResult
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import DeliveryFilter, DeliveryOutcome, DeliveryState
from logto_webhooks.errors import DeliveryUnknown, HandlerUnknown, JobUnknown, SettingInvalid
from logto_webhooks.jobs import JobFilter, JobMove, JobState, NewJob, RegisteredHandler
from logto_webhooks.testing import make
from tests.integration.conftest import Run
from tests.support.jobs import claim, finish, job
from tests.support.stores import Copy, delivery, memory_host

T = TypeVar("T")
OLD = RegisteredHandler(name="old", patterns=("User.*",))
NEW = RegisteredHandler(name="new", patterns=("User.Created",))
OTHER = RegisteredHandler(name="other", patterns=("*",))


def registered(run: Run, *handlers: RegisteredHandler) -> None:
    run(lambda store: store.jobs.register(handlers))


def replayed(run: Run, *ids: int, **how: Any) -> ReplayResult:
    return run(lambda store: admin.replay(store, ids, 100, **how))


def told(run: Run) -> list[tuple[str, str]]:
    rows = run(lambda store: store.jobs.find(JobFilter()))
    return sorted((each.handler, each.state) for each in rows)


@pytest.fixture
def applied(run: Run, host: Any) -> Callable[[], None]:
    """Applies what is pending, as a worker does; at first a delivery that `old` was told of."""
    copy = Copy(host)

    def apply() -> None:
        asyncio.run(copy.take([]))

    registered(run, OLD)
    run(lambda store: store.set_installed_at(0))
    asyncio.run(copy.take([make.user_created(id="ana").body]))
    return apply


def test_a_replay_tells_handlers_that_are_new(run: Run, applied: Callable[[], None]) -> None:
    """So many as it says before it is applied again."""
    assert told(run) == [("old", "waiting")]
    registered(run, NEW, OTHER)
    assert replayed(run, 1).jobs == 2
    applied()
    assert told(run) == [("new", "waiting"), ("old", "waiting"), ("other", "waiting")]
    assert replayed(run, 1).jobs == 0
    assert replayed(run, 1, dry_run=True).jobs == 0, "what is pending makes its jobs by itself"


def test_a_replay_for_one_handler_tells_no_other(run: Run, applied: Callable[[], None]) -> None:
    """Once: it is made for one that is new; what was applied isn't again."""
    registered(run, NEW, OTHER)
    done = replayed(run, 1, handler="new")
    assert (done.deliveries, done.jobs) == (0, 1)
    applied()
    assert told(run) == [("new", "waiting"), ("old", "waiting")]
    assert replayed(run, 1, handler="new").jobs == 0
    [held] = [each for each in claim(run, names=("new", "old")) if each.handler == "old"]
    run(lambda store: store.jobs.move([held.id], JobMove.DISCARD))
    assert replayed(run, 1, handler="new").jobs == 0
    assert replayed(run, 1, handler="old").jobs == 1


def test_what_was_never_applied_is_told_to_all(run: Run, applied: Callable[[], None]) -> None:
    """A dead delivery comes like a new one, whichever handler it is replayed for."""
    run(lambda store: store.add([delivery(make.user_created(id="bo").body)]))
    [held] = run(lambda store: store.claim("t", 1, 2**20, 60))
    run(
        lambda store: store.finish(
            "t", [DeliveryOutcome(id=held.id, state=DeliveryState.DEAD, error="x")]
        )
    )
    done = replayed(run, held.id, handler="old")
    assert (done.deliveries, done.jobs) == (1, 1)
    applied()
    assert told(run) == [("old", "waiting"), ("old", "waiting")]


@pytest.mark.slow
def test_all_jobs_of_a_delivery_run_again() -> None:
    """However many: a change of members makes thousands."""
    host = memory_host()

    def run(work: Callable[[Store], T]) -> T:
        return asyncio.run(host.run(work))

    run(lambda store: store.add([delivery(make.user_created(id="ana").body)]))
    many = [
        NewJob(
            handler="old",
            key=str(number),
            event="LocalUserUpdated",
            subject="user:ana",
            queue_key="user:ana",
            occurred_at=1,
            delivery_id=1,
            payload=b"{}",
        )
        for number in range(10_001)
    ]
    run(lambda store: store.jobs.add(many))
    run(lambda store: store.jobs.register([OLD]))
    run(lambda store: store.jobs.move(range(1, 10_002), JobMove.DISCARD))
    assert replayed(run, 1).jobs == 10_001


def test_a_handler_that_is_not_known_is_refused(run: Run) -> None:
    """With the name that was meant; one that has jobs is known, too."""
    registered(run, OLD)
    run(lambda store: store.jobs.add([job("a", handler="gone")]))
    with pytest.raises(HandlerUnknown, match=r"old \(did you mean this\?\), gone"):
        replayed(run, 1, handler="odl")
    with pytest.raises(DeliveryUnknown, match="1, 4711"):
        replayed(run, 1, 4711, handler="gone")


def test_jobs_are_counted_and_who_is_missing(run: Run) -> None:
    """By state; what waits for a handler that nobody registered is told apart."""
    registered(run, RegisteredHandler(name="one", patterns=("*",)))
    jobs = [job("a"), job("b", queue_key="user:bo"), job("c", handler="gone")]
    run(lambda store: store.jobs.add(jobs))
    [first, _] = claim(run, names=("one",))
    finish(run, first, JobState.DEAD)
    status = run(admin.status)
    assert status.jobs == {"waiting": 2, "done": 0, "dead": 1, "discarded": 0}
    assert status.unrunnable == {"gone": 1}


@pytest.fixture
def logto(tmp_path: Path) -> Iterator[LogtoWebhooks]:
    """An application with a delivery, and a waiting job of `one`."""
    made = LogtoWebhooks(signing_key="x", database_url=f"sqlite:///{tmp_path / 'app.db'}")

    def fill(store: Store) -> None:
        store.add([delivery(make.user_created(id="ana").body)])
        store.jobs.register([RegisteredHandler(name="one", patterns=("*",))])
        store.jobs.add([job("a")])

    async def prepare() -> None:
        await made.migrate()
        await made.database.host.run(fill)
        await made.close()

    asyncio.run(prepare())
    yield made
    asyncio.run(made.close())


WRONG: list[Any] = ["1", True, 0, -1, 2**63, 1.0, None]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_id_is_refused(logto: LogtoWebhooks, wrong: Any) -> None:
    """Wherever one is given, before anything is done."""
    named: list[Callable[[], Awaitable[object]]] = [
        lambda: logto.retry_jobs([1, wrong]),
        lambda: logto.discard_jobs([wrong]),
        lambda: logto.replay([1, wrong]),
        lambda: logto.delivery(wrong),
        lambda: logto.jobs(JobFilter(ids=(wrong,))),
    ]
    filters: list[Callable[[], Awaitable[object]]] = [
        lambda: logto.jobs(JobFilter(id=wrong)),
        lambda: logto.jobs(JobFilter(delivery_id=wrong)),
        lambda: logto.deliveries(DeliveryFilter(after=wrong)),
        lambda: logto.deliveries(DeliveryFilter(limit=wrong)),
    ]

    async def run() -> None:
        for call in named + (filters if wrong is not None else []):
            with pytest.raises(SettingInvalid, match="can't be used"):
                await call()
        assert len(await logto.jobs(JobFilter(state="waiting"))) == 1
        await logto.close()

    asyncio.run(run())


def test_what_cannot_be_meant_is_refused(logto: LogtoWebhooks) -> None:
    """Nothing is done, and the error says what can be."""

    async def run() -> None:
        with pytest.raises(SettingInvalid, match="either"):
            await logto.retry_jobs([1], handler="one")
        with pytest.raises(SettingInvalid, match="either"):
            await logto.retry_jobs([1], state="dead")
        with pytest.raises(SettingInvalid, match="one of waiting, done, dead, discarded"):
            await logto.retry_jobs(handler="one", state="bogus")
        with pytest.raises(SettingInvalid, match="one of waiting"):
            await logto.jobs(JobFilter(state="bogus"))
        with pytest.raises(SettingInvalid, match="allowed: waiting, dead"):
            await logto.discard_jobs(handler="one", state="done")
        with pytest.raises(HandlerUnknown, match="one"):
            await logto.discard_jobs(handler="on")
        with pytest.raises(JobUnknown, match="4711, 4712") as caught:
            await logto.discard_jobs([1, 4711, 4712])
        assert caught.value.ids == (4711, 4712)
        assert len(await logto.jobs(JobFilter(state="waiting"))) == 1
        assert await logto.discard_jobs([1, 1]) == 1
        assert await logto.retry_jobs(handler="one", state="discarded") == 1
        await logto.close()

    asyncio.run(run())
