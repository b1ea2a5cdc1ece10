"""Deliveries replayed, and jobs named by hand: on every store, and as methods."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from logto_webhooks import ExistingRows, LogtoWebhooks, admin
from logto_webhooks.apply import replay as apply_replay
from logto_webhooks.apply.replay import JobReplay, ReplayResult
from logto_webhooks.database.mirror import RowFilter
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import DeliveryFilter, DeliveryOutcome, DeliveryState
from logto_webhooks.errors import DeliveryUnknown, HandlerUnknown, JobUnknown, SettingInvalid
from logto_webhooks.events.local import LocalEvent, LocalUserEvent, LocalUserUpdated
from logto_webhooks.handlers.call import build_event
from logto_webhooks.handlers.existing import Pacer, find_handler, run_for_existing
from logto_webhooks.jobs import JobFilter, JobMove, JobState, NewJob, RegisteredHandler
from logto_webhooks.testing import make
from tests.integration.conftest import Run
from tests.support.jobs import claim, finish, job
from tests.support.mounted import on_postgres, on_sqlite
from tests.support.plans import explain
from tests.support.stores import Copy, delivery, memory_host

T = TypeVar("T")
OLD = RegisteredHandler(name="old", patterns=("User.*",))
NEW = RegisteredHandler(name="new", patterns=("User.Created",))
OTHER = RegisteredHandler(name="other", patterns=("*",))
LOCAL, LATER, ALIKE, OTHER_LOCAL = (
    RegisteredHandler(name=name, patterns=("Local*",))
    for name in ("local", "later", "alike", "other local")
)
T0 = 1_795_485_335_917


def registered(run: Run, *handlers: RegisteredHandler) -> None:
    run(lambda store: store.jobs.register(handlers))


def replayed(run: Run, *ids: int, rerun: bool = False, **how: Any) -> ReplayResult:
    result = run(lambda store: admin.replay(store, ids, 100, **how))
    jobs, replay = 0, JobReplay(ids, how.get("handler"), rerun)
    while not how.get("sync_only") and not replay.is_over:
        rows = run(replay.find_jobs)
        jobs += run(partial(replay.run, rows=rows))
    return replace(result, jobs=result.jobs + jobs)


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


def test_the_jobs_of_a_delivery_are_looked_at_page_by_page(
    run: Run, applied: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of an index: accepting waits for each page on SQLite, and a deletion can have
    made hundreds of thousands of jobs."""
    registered(run, *(replace(OTHER, name=f"other {number}") for number in range(4)))
    assert replayed(run, 1).jobs == 4
    monkeypatch.setattr(apply_replay, "AT_ONCE", 2)
    replay, pages = JobReplay([1]), []
    while not replay.is_over:
        pages.append(len(run(replay.find_jobs)))
    assert pages == [2, 2, 1]
    [plan] = run(partial(explain, work=lambda store: store.jobs.list_of_delivery(1, 2, 2)))
    assert "logto_jobs_delivery" in plan
    assert "Sort" not in plan
    assert "TEMP B-TREE" not in plan


class TestLocalEvents:
    """Of what a delivery changed here, only the jobs know that it had then."""

    @pytest.fixture
    def take(self, run: Run, host: Any) -> Callable[..., None]:
        copy = Copy(host)
        registered(run, LOCAL)
        run(lambda store: store.set_installed_at(0))
        return lambda *sent: asyncio.run(copy.take([request.body for request in sent]))

    def test_a_new_handler_is_told_what_others_were(self, run: Run, take: Any) -> None:
        """The same events, with their values of then, once; late if newer ones are done."""
        take(make.user_created(id="ana", name="Ana", at=T0))
        for number in (1, 2):
            take(make.user_data_updated(id="ana", name=f"A{number}", at=T0 + number * 1000))
        registered(run, LATER)
        for ids, made in (((3,), 1), ((1, 2), 2), ((1, 2, 3), 0)):
            assert replayed(run, *ids).jobs == made
            if ids == (3,):
                [newest] = claim(run, names=("later",))
                finish(run, newest, JobState.DONE)
        take()
        assert len(told(run)) == 6
        held = []
        while found := claim(run, names=("later",)):
            held += found
            finish(run, found[0], JobState.DONE)
        events = [build_event(job) for job in held]
        assert [(job.event, job.late) for job in held] == [
            ("LocalUserCreated", False),
            ("LocalUserUpdated", True),
        ]
        assert all(event.source == "webhook" for event in events if isinstance(event, LocalEvent))
        assert isinstance(events[1], LocalUserUpdated)
        assert events[1].changes["name"] == ("Ana", "A1")

    def test_for_one_handler_and_while_it_is_pending(self, run: Run, take: Any) -> None:
        """As with a delivery's own event, no other handler is told."""
        take(make.user_created(id="ana", at=T0))
        registered(run, LATER, ALIKE)
        assert replayed(run, 1).jobs == 2
        registered(run, OTHER_LOCAL)
        assert replayed(run, 1, handler="other local").jobs == 1
        take()
        assert replayed(run, 1).jobs == 0
        assert len(told(run)) == 4

    def test_sync_only_leaves_what_is_pending_to_the_worker(self, run: Run, take: Any) -> None:
        """Else nothing would change when the worker applies it, and no handler would be told."""
        request = make.user_created(id="ana", at=T0)
        run(lambda store: store.add([delivery(request.body)]))
        assert replayed(run, 1, sync_only=True).deliveries == 0
        take()
        assert told(run) == [("local", "waiting")]
        assert replayed(run, 1, sync_only=True).deliveries == 1

    def test_who_came_is_told_once(self, run: Run, take: Any, host: Any) -> None:
        """Also if the handler was run for existing rows before, or is afterwards."""
        take(
            make.user_created(id="ana", at=T0),
            make.organization_created(id="acme", at=T0),
            make.organization_membership_updated(id="acme", addedUserIds=["ana"], at=T0 + 1),
        )
        for number, change in ((1, "removedUserIds"), (2, "addedUserIds")):
            fields: dict[str, Any] = {change: ["ana"], "at": T0 + number * 1000}
            take(make.organization_membership_updated(id="acme", **fields))
        registered(run, LATER, ALIKE)
        assert [each.jobs for each in run_existing(host, "later")] == [1, 1, 1]
        assert replayed(run, 1, 2, 3, 4, 5, handler="later").jobs == 0, "what was before that"
        assert replayed(run, 1, 2, 3, 4, 5, handler="alike").jobs == 5
        assert replayed(run, 1, 2, 3, 4, 5).jobs == 0
        assert [each.skipped for each in run_existing(host, "alike")] == [1, 1, 1]

    def test_who_came_again_is_told_again(self, run: Run, take: Any, host: Any) -> None:
        """In the order in which it happened, also for a handler that was there for the last part,
        and in any order of replays: then what is older is late."""
        at = iter(range(T0, T0 + 10**6, 1000))
        take(make.user_created(id="ana", at=next(at)))
        take(make.organization_created(id="acme", at=next(at)))

        def change(**fields: Any) -> None:
            take(make.organization_membership_updated(id="acme", at=next(at), **fields))

        change(addedUserIds=["ana"])
        change(removedUserIds=["ana"])
        registered(run, ALIKE)
        change(addedUserIds=["ana"])
        registered(run, LATER)
        assert replayed(run, 5, handler="later").jobs == 1
        assert [each.skipped for each in run_existing(host, "later")] == [0, 0, 1]
        assert events_of(run, "later")[-1] == ("LocalMemberAdded", False)
        assert replayed(run, 3, 4, handler="later").jobs == 2
        assert events_of(run, "later") == [("LocalMemberAdded", True), ("LocalMemberRemoved", True)]
        assert replayed(run, 3, 4, 5).jobs == 2, "of the one that was there for the last part"
        assert events_of(run, "alike")[-1] == ("LocalMemberAdded", False)
        registered(run, OTHER_LOCAL)
        assert replayed(run, 1, 2, 3, 4, 5).jobs == 5 + 2
        assert events_of(run, "other local")[-3:] == [
            ("LocalMemberAdded", False),
            ("LocalMemberRemoved", False),
            ("LocalMemberAdded", False),
        ]
        assert replayed(run, 1, 2, 3, 4, 5, dry_run=True).jobs == 0

    def test_a_job_that_was_repeated_keeps_its_date(self, run: Run, take: Any) -> None:
        """So a new handler is told of its event in the right place, not as if it were new."""
        take(make.user_created(id="ana", name="A0", at=T0))
        take(make.user_data_updated(id="ana", name="A1", at=T0 + 1000))
        finish(run, claim(run, names=("local",))[0], JobState.DONE)
        [failed] = claim(run, names=("local",))
        finish(run, failed, JobState.DEAD)
        take(make.user_data_updated(id="ana", name="A2", at=T0 + 2000))
        events_of(run, "local")
        run(lambda store: store.jobs.move([failed.id], JobMove.REPEAT))
        [again] = claim(run, names=("local",))
        assert (again.occurred_at, again.runs, again.late) == (failed.occurred_at, 1, False)
        registered(run, LATER)
        assert replayed(run, 1, 2, 3, handler="later").jobs == 3
        names = []
        while found := claim(run, names=("later",)):
            [held] = found
            event = build_event(held)
            assert isinstance(event, LocalUserEvent)
            names.append(event.user.name)
            finish(run, held, JobState.DONE)
        assert names == ["A0", "A1", "A2"]

    def test_what_was_before_a_run_for_existing_rows_is_over(
        self, run: Run, take: Any, host: Any
    ) -> None:
        """The handler knows the rows as they were later."""
        take(make.user_created(id="ana", at=T0), make.user_created(id="bo", at=T0))
        take(make.user_deleted(id="ana", at=T0 + 1000))
        take(make.user_created(id="ana", at=T0 + 100_000))
        registered(run, LATER)
        assert [each.jobs for each in run_existing(host, "later")] == [2, 0, 0]
        assert replayed(run, 1, 2, 3, 4, handler="later").jobs == 0

    def test_an_effect_that_nobody_was_told_of(self, run: Run, take: Any, host: Any) -> None:
        """It isn't known any more. Who is here can be told as existing."""
        run(lambda store: store.jobs.forget("local", 1))
        registered(run, OLD)
        take(make.user_created(id="ana", at=T0))
        registered(run, LATER)
        assert replayed(run, 1).jobs == 0
        take()
        assert told(run) == [("old", "waiting")]
        assert [each.jobs for each in run_existing(host, "later")] == [1, 0, 0]


def events_of(run: Run, handler: str) -> list[tuple[str, bool]]:
    """Run the waiting jobs of a handler. Return their events, and whether they are late."""
    done = []
    while found := claim(run, names=(handler,)):
        done += [(held.event, held.late) for held in found]
        for held in found:
            finish(run, held, JobState.DONE)
    return done


def run_existing(host: Any, name: str) -> list[ExistingRows]:
    """Run a handler for the rows that exist."""

    async def body() -> list[ExistingRows]:
        handler = await host.read(lambda store: find_handler(store, name))
        return await run_for_existing(
            host, handler, RowFilter(), Pacer(1e6), dry_run=False, progressed=lambda *_: None
        )

    return asyncio.run(body())


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


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_all_that_match_are_replayed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest first, in pages, whatever the filter's limit; not what arrives meanwhile."""
    monkeypatch.setattr("logto_webhooks.admin.REPLAYED_AT_ONCE", 3)
    monkeypatch.setattr("logto_webhooks.apply.replay.REPLAYED_AT_ONCE", 2)
    logto = on_sqlite(tmp_path) if kind == "sqlite" else on_postgres()
    host = logto.database.host
    names = [f"u{number}" for number in range(8)]
    bodies = [make.user_created(id=name, at=T0).body for name in names]

    async def body() -> None:
        await logto.migrate()
        await host.run(lambda store: store.set_installed_at(0))
        await Copy(host).take([*bodies, make.post_sign_in(id="u0", at=T0 + 1).body])
        await host.run(lambda store: store.jobs.register([NEW, OTHER]))
        wanted = DeliveryFilter(event="User.Created", limit=1, after=2)
        dry = await logto.replay_all(wanted, dry_run=True)
        assert (dry.deliveries, dry.jobs) == (6, 12)
        assert (await logto.status()).deliveries["pending"] == 0
        reached: list[tuple[int, int, int]] = []
        late = delivery(make.user_created(id="late", at=T0).body)
        done = await logto.replay_all(
            wanted, handler="new", progressed=lambda *progress: reached.append(progress)
        )
        assert (done.deliveries, done.jobs) == (0, 6)
        assert reached == [(2, 0, 6), (4, 2, 6), (5, 3, 6), (7, 5, 6), (8, 6, 6)]
        assert (await logto.replay_all(wanted)).jobs == 6, "of the other handler"
        assert (await logto.status()).deliveries["pending"] == 6
        await host.run(lambda store: store.add([late]))
        nothing = await logto.replay_all(DeliveryFilter(subject="user:nobody"))
        assert (nothing.deliveries, nothing.jobs) == (0, 0)
        with pytest.raises(HandlerUnknown):
            await logto.replay_all(DeliveryFilter(subject="user:nobody"), handler="nobody")
        wrong: Any = "bogus"
        with pytest.raises(SettingInvalid, match="the state"):
            await logto.replay_all(DeliveryFilter(state=wrong))
        await logto.close()

    asyncio.run(body())


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
