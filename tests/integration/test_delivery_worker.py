"""The worker: what fails is tried again, then dead, and holds nobody back."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.apply import DeliveryWorker, batch
from logto_webhooks.apply.batch import InvalidDelivery
from logto_webhooks.batch_sizes import FIRST_WEIGHT, BatchSizer
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.schema import deliveries
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import ClaimedDelivery, StoreResult
from logto_webhooks.errors import NoAnswer, RowRejected, StoreUnavailable
from logto_webhooks.ingest.group_commit import GroupCommit
from logto_webhooks.instrumentation import (
    DeliveryFailed,
    DeliverySynced,
    Resumed,
    Stalled,
    TelemetryEvent,
)
from logto_webhooks.records.record import Key, Record
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import App, FrozenClock, make
from tests.integration.conftest import Run
from tests.support.stores import Copy, WrappedRunner, delivery, memory_host
from tests.support.waiting import eventually


class Refusing(WrappedRunner):
    """A runner whose database refuses rows about one user."""

    def __init__(self, host: TransactionRunner, user: str, error: Exception) -> None:
        super().__init__(host)
        self._key = Key("user", user)
        self.error: Exception | None = error

    async def run(self, work: Any) -> Any:
        """Run, with a store that refuses."""
        return await self._host.run(lambda store: work(_RefusingStore(store, self)))

    def refuse(self, keys: Sequence[Key]) -> None:
        """Raise for the key."""
        if self._key in keys and self.error:
            raise self.error


class _RefusingStore:
    def __init__(self, store: Store, refusing: Refusing) -> None:
        self._store = store
        self._refusing = refusing

    def save(self, records: Sequence[Record]) -> list[Record]:
        self._refusing.refuse([record.key for record in records])
        return self._store.save(records)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def bodies(*users: str) -> list[bytes]:
    return [make.user_created(id=user, email=f"{user}@example.com").body for user in users]


def test_one_refused_row_harms_nobody_else(host: TransactionRunner, run: Run) -> None:
    """The batch is halved until the culprit is alone; it is tried again later."""
    users = [f"u{number}" for number in range(20)]
    refusing = Refusing(host, "u13", RowRejected(problem="DataError"))
    copy = Copy(refusing)
    asyncio.run(copy.take(bodies(*users)))
    assert len(run(lambda store: store.find("user", "", 99))) == 19
    status = run(lambda store: store.status())
    assert (status.deliveries["done"], status.deliveries["pending"]) == (19, 1)
    # On a slow machine, it is tried again by now.
    failed, *_ = [report for report in copy.reports if isinstance(report, DeliveryFailed)]
    assert (failed.subject, failed.attempt, failed.retry_in_s) == ("user:u13", 1, 1)
    assert failed.error == "The database rejected a row of this batch: DataError."


def test_an_unexpected_error_harms_nobody_else_and_is_not_quoted(
    host: TransactionRunner, run: Run
) -> None:
    """Its text could hold what the payload holds."""
    copy = Copy(Refusing(host, "bo", ValueError("bo@example.com")))
    asyncio.run(copy.take(bodies("ana", "bo", "cy")))
    assert run(lambda store: store.status()).deliveries["done"] == 2
    [failed] = [report for report in copy.reports if isinstance(report, DeliveryFailed)]
    assert failed.error is not None
    assert failed.error.startswith("unexpected ValueError at ")  # the place in the code
    assert "bo@example.com" not in failed.error


def test_an_unreachable_database_costs_no_attempt(host: TransactionRunner, run: Run) -> None:
    """What was claimed is kept, and applied once the database is back."""
    refusing = Refusing(host, "ana", StoreUnavailable(problem="gone"))
    copy = Copy(refusing)
    with pytest.raises(StoreUnavailable):
        asyncio.run(copy.take(bodies("ana", "bo")))
    assert run(lambda store: store.status()).deliveries["pending"] == 2
    refusing.error = None
    assert asyncio.run(copy.worker.step()) == 2
    assert run(lambda store: store.status()).deliveries["done"] == 2
    assert not [report for report in copy.reports if isinstance(report, DeliveryFailed)]


def test_a_delivery_that_takes_too_long_holds_up_no_other(
    host: TransactionRunner, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the database answers others, such as when a mapping's function takes longer than a
    transaction may. It is retried separately, and not dead soon."""
    monkeypatch.setattr("logto_webhooks.apply.LONGEST_STALL_S", 0.01)
    users = [f"u{number}" for number in range(20)]
    refusing = Refusing(host, "u13", NoAnswer(problem="no answer within 10 s"))
    copy = Copy(refusing)
    run(lambda store: store.add([delivery(body) for body in bodies(*users)]))

    async def count_done() -> int:
        return (await host.read(lambda store: store.status())).deliveries["done"]

    async def live() -> None:
        working = asyncio.create_task(copy.worker.run())
        await eventually(count_done, lambda done: done == 19)
        copy.worker.stop()
        await working

    asyncio.run(live())
    failed, *_ = [report for report in copy.reports if isinstance(report, DeliveryFailed)]
    assert (failed.subject, failed.retry_in_s) == ("user:u13", 1)
    failures = sa.select(deliveries.c.failures).where(deliveries.c.state == "pending")
    assert run(lambda store: store.execute(failures).scalar_one()) == 0


def test_a_worker_that_stops_gives_back_what_it_hasn_t_applied(
    host: TransactionRunner, run: Run
) -> None:
    """Another one needn't wait until the lease ends."""
    refusing = Refusing(host, "ana", StoreUnavailable(problem="gone"))
    copy = Copy(refusing)
    with pytest.raises(StoreUnavailable):
        asyncio.run(copy.take(bodies("ana", "bo")))
    copy.worker.stop()
    asyncio.run(copy.worker.run())
    claimed = run(lambda store: store.claim("another", 10, 2**20, 60))
    # Being given back is no attempt: many of them would make the first time-out the last one.
    assert [delivery.attempt for delivery in claimed] == [1, 1]


def test_a_stalled_worker_says_so_and_goes_on(host: TransactionRunner, run: Run) -> None:
    """It waits with growing pauses; what is pending is applied in the end."""
    seen: list[type[TelemetryEvent]] = []
    stalled_twice, resumed = asyncio.Event(), asyncio.Event()

    def observe(report: TelemetryEvent) -> None:
        seen.append(type(report))
        if seen.count(Stalled) == 2:
            stalled_twice.set()
        if isinstance(report, Resumed):
            resumed.set()

    refusing = Refusing(host, "ana", StoreUnavailable(problem="gone"))
    copy = Copy(refusing, observe)
    deliveries = [delivery(body) for body in bodies("ana")]

    async def live() -> None:
        await host.run(lambda store: store.add(deliveries))
        working = asyncio.create_task(copy.worker.run())
        await asyncio.wait_for(stalled_twice.wait(), 20)
        refusing.error = None
        await asyncio.wait_for(resumed.wait(), 20)
        copy.worker.stop()
        await working

    asyncio.run(live())
    assert seen == [Stalled, Stalled, DeliverySynced, Resumed]
    assert run(lambda store: store.status()).deliveries["done"] == 1


def test_who_lost_its_lease_writes_nothing(host: TransactionRunner, run: Run) -> None:
    """A worker that was paused too long finds that another one took over: all is rolled back."""
    run(lambda store: store.add([delivery(body) for body in bodies("ana")]))
    copy = Copy(host)

    async def live() -> None:
        stolen = False

        async def steal(work: Any) -> Any:
            nonlocal stolen
            result = await host.run(work)
            if not stolen:
                stolen = True
                await host.run(_expire)
                await host.run(lambda store: store.claim("thief", 10, 2**20, 60))
            return result

        slow = Refusing(host, "nobody", ValueError())
        slow.run = steal  # type: ignore[method-assign]
        assert await Copy(slow).worker.step() == 1

    asyncio.run(live())
    assert run(lambda store: store.find("user", "", 10)) == []
    assert run(lambda store: store.status()).deliveries["pending"] == 1
    assert copy.reports == []


def _expire(store: Store) -> None:
    """End the lease of whoever holds the first delivery, as time would."""
    inner: Any = store
    if hasattr(inner, "tables"):
        [row] = inner.tables.inbox.values()
        inner.tables.inbox[row.id] = _due(row)
    else:
        inner._connection.execute(sa.update(deliveries).values(due_at=0))


def _due(row: Any) -> Any:
    from msgspec.structs import replace

    return replace(row, due_at=0)


class TestDeath:
    def test_a_malformed_delivery_is_dead_and_its_record_in_doubt(self) -> None:
        """It holds nobody back, and the need to ask Logto is noted."""
        app = App()
        app.deliver(make.user_created(id="ana", email="ana@example.com"))
        broken = make.user_data_updated(id="ana", email=["odd"])
        good = make.user_created(id="bo")
        assert app.deliver(good, broken).outcome == "dead"
        assert app.status().deliveries == {"pending": 0, "done": 2, "ignored": 0, "dead": 1}
        [waiting] = app.waiting()
        assert (waiting.key, waiting.reason) == (Key("user", "ana"), "doubtful: dead delivery")
        assert (app.status().doubtful, app.status().refetch) == (1, 1)
        assert app.users("ana")[0].row["email"] == "ana@example.com"

    def test_what_is_dead_of_an_organization_marks_the_organization(self) -> None:
        """Also when nothing else is known of it."""
        app = App()
        odd = make.organization_membership_updated(id="org", addedUserIds="everybody")
        assert app.deliver(odd).outcome == "dead"
        [waiting] = app.waiting()
        assert waiting.key == Key("organization", "org")
        assert waiting.reason == "doubtful: dead delivery; incomplete; members"

    def test_a_dead_delivery_of_an_odd_id_marks_nobody_else(self) -> None:
        """A cut or cleaned id would be somebody else's."""
        app = App()
        app.deliver(make.user_created(id="a" * 256), make.user_created(id="ab"))
        for odd in ("a" * 257, "a\0b"):
            assert app.deliver(make.user_created(id=odd)).outcome == "dead"
        assert app.waiting() == []

    def test_a_failing_delivery_is_retried_with_growing_waits_then_dead(self) -> None:
        """Eight attempts, each no sooner than its wait."""
        app = App()
        app._app.worker._host = Refusing(app._app._host, "ana", ValueError("bug"))
        assert app.deliver(make.user_created(id="ana")).outcome == "failed"
        waits = [1, 3, 9, 27, 81, 243, 729]
        for wait in waits:
            before = len(app.reports)
            app.tick(wait / 2)
            assert len(app.reports) == before
            app.tick(wait / 2)
            assert len(app.reports) == before + 1
        attempts = [each for each in app.reports if isinstance(each, DeliveryFailed)]
        assert [each.retry_in_s for each in attempts] == [*waits, None]
        assert app.status().deliveries["dead"] == 1


def test_the_pace_keeps_to_its_budget() -> None:
    """Batches shrink when they take too long, or fail, and at most double."""
    sizer = BatchSizer(0.005)
    first = sizer.weight
    sizer.adjust(first, 0.001)
    assert sizer.weight == first * 2
    sizer.adjust(sizer.weight, 0.050)
    assert sizer.weight == first * 2 // 10
    sizer.halve()
    assert sizer.weight == first * 2 // 20
    sizer.adjust(1, 9)
    sizer.halve()
    assert sizer.weight == 1


def test_what_any_batch_takes_makes_no_batch_small() -> None:
    """Nor does it hide that changes take long, or are quick again."""

    def settle(sizer: BatchSizer, fixed_s: float, each_s: float) -> float:
        for _ in range(60):
            sizer.adjust(sizer.weight, fixed_s + sizer.weight * each_s)
        return sizer.weight * each_s

    sizer = BatchSizer(0.005)
    assert 0.002 < settle(sizer, 0.004, 0.0002) < 0.008
    assert settle(sizer, 0.004, 0.020) == 0.020
    assert 0.002 < settle(sizer, 0.0, 0.0001) < 0.008
    assert 0.002 < settle(sizer, 0.004, 0.0002) < 0.008


def test_a_backlog_is_applied_in_larger_transactions() -> None:
    """Accepting waits for each, so they are short as long as the worker keeps up."""

    def count_steps(received_s: float) -> int:
        host, clock = memory_host(), FrozenClock()
        worker = DeliveryWorker(host, clock, lambda report: None, lambda: 0.0, budget_s=1e-9)
        received_at = clock.now() - round(received_s * 1000)
        bodies = [make.user_created(id=f"u{number}").body for number in range(FIRST_WEIGHT + 20)]

        async def work() -> int:
            await host.run(lambda store: store.add([delivery(b, received_at) for b in bodies]))
            steps = 0
            while await worker.step():
                steps += 1
            return steps

        return asyncio.run(work())

    assert count_steps(0.5) == 1 + 20
    assert count_steps(5) < 1 + 20


def test_a_delivery_weighs_what_it_changes() -> None:
    """A few that change thousands of memberships are as much as hundreds that change one user."""
    members = [f"u{number}" for number in range(40)]
    heavy = make.organization_membership_updated(id="acme", addedUserIds=members)
    work = [
        batch.parse_delivery(
            ClaimedDelivery(id=1, body=each.body, event="", subject=None, received_at=0, attempt=1),
            0,
        )
        for each in (make.user_created(), heavy, make.user_created(), heavy)
    ]
    sizer = BatchSizer(1)
    assert len(sizer.cut(work)) == 1
    assert len(sizer.cut(work[1:])) == 1
    sizer.weight = 42
    assert len(sizer.cut(work)) == 3
    assert sizer.cut([]) == []


def test_what_is_malformed_keeps_no_frame() -> None:
    """Or its body, and those of the whole batch, stayed until the collector came."""
    body = make.user_created(id="a:b").body
    claimed = ClaimedDelivery(id=1, body=body, event="", subject=None, received_at=0, attempt=1)
    work = batch.parse_delivery(claimed, 0)
    assert isinstance(work, InvalidDelivery)
    assert work.error.__traceback__ is None


class TestGroupCommit:
    """Requests that wait join one transaction."""

    def commit(
        self, host: TransactionRunner, sent: list[SignedRequest]
    ) -> tuple[list[Any], int, int]:
        """Add all at once; return the results, how often was committed, and woken."""
        commits, woken = [0], [0]
        reports: list[TelemetryEvent] = []

        class Counting(WrappedRunner):
            async def run(self, work: Any) -> Any:
                commits[0] += 1
                return await host.run(lambda store: work(_RefusingAdd(store)))

        def wake() -> None:
            woken[0] += 1

        async def live() -> list[Any]:
            group = GroupCommit(Counting(host), reports.append, wake)
            adding = [group.add(delivery(each.body)) for each in sent]
            return await asyncio.gather(*adding, return_exceptions=True)

        return asyncio.run(live()), commits[0], woken[0]

    def test_all_that_wait_are_committed_together(self, host: TransactionRunner) -> None:
        """One transaction, one wake-up, for a hundred."""
        results, commits, woken = self.commit(host, [make.user_created() for _ in range(100)])
        assert all(isinstance(result, StoreResult) for result in results)
        assert (commits, woken) == (1, 1)

    def test_a_batch_ends_at_512_rows(self, host: TransactionRunner) -> None:
        """Then comes the next."""
        results, commits, _ = self.commit(host, [make.user_created() for _ in range(600)])
        assert len({result.id for result in results}) == 600
        assert commits == 2

    def test_a_batch_ends_at_16_mib(self, host: TransactionRunner) -> None:
        """Bodies can be large."""
        big = "x" * 6 * 2**20
        sent = [make.user_created(customData={"big": big}) for _ in range(3)]
        _, commits, _ = self.commit(host, sent)
        assert commits == 2

    def test_one_refused_row_fails_alone(self, host: TransactionRunner, run: Run) -> None:
        """All others are stored."""
        sent = [make.user_created(name="refused" if n == 5 else "Ana") for n in range(12)]
        results, _, _ = self.commit(host, sent)
        failed = [n for n, result in enumerate(results) if isinstance(result, StoreUnavailable)]
        assert failed == [5]
        assert run(lambda store: store.status()).deliveries["pending"] == 11

    def test_only_duplicates_wake_nobody(self, host: TransactionRunner) -> None:
        """There is nothing to apply."""
        one = make.user_created()
        self.commit(host, [one])
        results, _, woken = self.commit(host, [one, one])
        assert [result.duplicate for result in results] == [True, True]
        assert woken == 0


class _RefusingAdd:
    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, deliveries: Sequence[Any], tried: Collection[bytes] = ()) -> list[StoreResult]:
        if any(b'"refused"' in each.body for each in deliveries):
            raise RowRejected(problem="DataError")
        return self._store.add(deliveries, tried)
