"""A delivery that can't be stored by its deadline is answered 503, and stored all the same."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from starlette.types import Message

from logto_webhooks import ingest
from logto_webhooks.clock import SystemClock
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import LARGE, DeliveryFilter
from logto_webhooks.errors import StoreUnavailable, TimedOut
from logto_webhooks.event_loop import Offloader
from logto_webhooks.ingest import Receiver, WebhookResponse, asgi, group_commit
from logto_webhooks.ingest.body import ByteLimiter
from logto_webhooks.ingest.group_commit import GroupCommit
from logto_webhooks.ingest.spool import SpoolDirectory
from logto_webhooks.instrumentation import (
    DeliveriesLost,
    NotStored,
    Spooled,
    StoredLate,
    TelemetryEvent,
)
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.stores import STORES, StoreKind, delivery, open_host
from tests.support.waiting import eventually

T = TypeVar("T")
ROOM = 2**20


class Away:
    """A host whose database can't be used until it is `back`."""

    def __init__(self, host: TransactionRunner) -> None:
        self._host = host
        self.is_back = False
        self.error: Exception = StoreUnavailable(problem="away")

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        if not self.is_back:
            raise self.error
        return await self._host.accept(work, limit_s)


class Door:
    """The webhook, with a database that is away, a deadline that comes soon, and little room."""

    def __init__(self, kind: StoreKind, folder: Path, spool: SpoolDirectory | None = None) -> None:
        self.host = open_host(kind, folder)
        self.away = Away(self.host)
        self.reports: list[TelemetryEvent] = []
        self.offloader = Offloader()
        self.room = ByteLimiter(ROOM)
        away: Any = self.away
        self.commit = GroupCommit(away, self.reports.append, lambda: None, spool)
        self.receiver = Receiver(
            [SIGNING_KEY],
            self.commit.add,
            SystemClock(),
            self.reports.append,
            offloader=self.offloader,
        )
        self.webhook = asgi.WebhookApp(self.receiver, ROOM, self.room)

    async def post(self, request: SignedRequest) -> WebhookResponse | None:
        headers = [(name.encode(), value.encode()) for name, value in request.headers]

        async def receive() -> Message:
            return {"type": "http.request", "body": request.body, "more_body": False}

        return await self.webhook.answer({"headers": headers}, receive)

    def is_empty(self) -> bool:
        """Whether all room is free. It is none afterwards."""
        return self.room.take(ROOM - ROOM // 8, 0)

    async def stored(self) -> int:
        status = await self.host.read(lambda store: store.status())
        return status.deliveries["pending"]

    def count(self, kind: type[NotStored | StoredLate | Spooled]) -> int:
        return sum(report.count for report in self.reports if isinstance(report, kind))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline comes soon."""
    monkeypatch.setattr(asgi, "READ_S", 0.5)


@pytest.mark.parametrize("kind", STORES)
def test_it_is_stored_once_the_database_is_back(kind: StoreKind, tmp_path: Path) -> None:
    """Its room is held until then: that bounds how many can be late."""

    async def live() -> None:
        door = Door(kind, tmp_path)
        sent = [make.user_created(name="a" * size) for size in (1, 10, 300_000)]
        answers = await asyncio.gather(*map(door.post, sent))
        assert [answer and answer.status for answer in answers] == [503] * 3
        assert all(answer and answer.retry_after_s for answer in answers)
        assert not door.is_empty()
        door.away.is_back = True
        await eventually(door.stored, lambda count: count == 3)
        await door.commit.finish()
        assert (door.count(NotStored), door.count(StoredLate)) == (3, 3)
        assert door.is_empty()
        await door.host.close()

    asyncio.run(live())


@pytest.mark.parametrize("has_spool", [False, True])
def test_large_bodies_that_wait_for_each_other_are_answered_in_time(
    has_spool: bool, tmp_path: Path
) -> None:
    """They are identified one after another, and stored when it is their turn."""

    async def live() -> None:
        spool = SpoolDirectory(tmp_path / "spool") if has_spool else None
        if spool:
            spool.make()
        door = Door("sqlite", tmp_path, spool)
        door.away.is_back = not has_spool
        before = threading.Event()
        first = asyncio.create_task(door.offloader.run(before.wait))
        answers = await asyncio.gather(
            *(door.post(make.user_created(name="a" * 200_000)) for _ in range(3))
        )
        assert [answer and answer.status for answer in answers] == [503] * 3
        assert not door.is_empty()
        before.set()
        await first
        await door.receiver.finish()
        if spool:
            await eventually(lambda: asyncio.to_thread(spool.count), lambda count: count == 3)
        else:
            await eventually(door.stored, lambda count: count == 3)
        await door.commit.finish()
        assert door.is_empty()
        await door.host.close()

    asyncio.run(live())


def test_what_is_late_and_locked_holds_back_nobody(tmp_path: Path) -> None:
    """Others that are late with it, and those that come in time, are stored."""
    locked = make.user_created(id="locked")

    class Locking(Away):
        async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
            def look(store: Store) -> T:
                result = work(store)
                rows = store.inbox.search(DeliveryFilter(limit=100))
                if any(row.body == locked.body for row in rows):
                    raise TimedOut(problem="locked")
                return result

            return await self._host.run(look)

    async def live() -> None:
        door = Door("sqlite", tmp_path)
        late = [locked, *(make.user_created() for _ in range(20))]
        answers = await asyncio.gather(*map(door.post, late))
        assert {answer and answer.status for answer in answers} == {503}
        away: Any = Locking(door.host)
        door.commit._host = away
        await eventually(door.stored, lambda count: count == 20)
        answer = await door.post(make.user_created())
        assert answer
        assert answer.status == 200
        await door.commit.finish()
        await door.host.close()

    asyncio.run(live())


def test_what_could_not_be_spooled_is_stored_or_spooled_at_the_end(tmp_path: Path) -> None:
    """The disk was full, or the directory away."""

    async def live() -> None:
        spool = SpoolDirectory(tmp_path / "spool")
        door = Door("sqlite", tmp_path, spool)
        answer = await door.post(make.user_created())
        assert answer
        assert answer.status == 503
        spool.make()
        await door.commit.finish()
        assert spool.count() == 1
        assert door.count(Spooled) == 1
        assert door.is_empty()
        await door.host.close()

    asyncio.run(live())


def test_what_is_late_is_tried_once_more_at_the_end(tmp_path: Path) -> None:
    """As when a service stops just after its database came back."""

    async def live() -> None:
        door = Door("sqlite", tmp_path)
        answer = await door.post(make.user_created())
        assert answer
        assert answer.status == 503
        door.away.is_back = True
        await door.commit.finish()
        assert await door.stored() == 1
        await door.host.close()

    asyncio.run(live())


def test_what_is_lost_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be stored, and what couldn't even be identified in time."""
    monkeypatch.setattr(ingest, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(group_commit, "FINISH_S", 0.1)

    async def live() -> None:
        door = Door("sqlite", tmp_path)
        before = threading.Event()
        first = asyncio.create_task(door.offloader.run(before.wait))
        await asyncio.gather(
            *(door.post(make.user_created(name="a" * size)) for size in (1, LARGE))
        )
        door.reports.clear()
        await door.receiver.finish()
        await door.commit.finish()
        assert door.reports == [DeliveriesLost(1)] * 2
        before.set()
        await first
        await door.host.close()

    asyncio.run(live())


def test_a_request_that_is_late_leaves_little_behind(tmp_path: Path) -> None:
    """Not its frames, nor what they hold: there may be many."""

    async def live() -> None:
        away: Any = Away(open_host("sqlite", tmp_path))
        group = GroupCommit(away, lambda report: None, lambda: None)

        class Held:
            """What a caller holds."""

        async def call() -> None:
            held = Held()
            with pytest.raises(StoreUnavailable):
                await group.add(delivery(make.user_created().body), 0)
            assert held

        await asyncio.create_task(call())
        gc.collect()
        assert not any(isinstance(each, Held) for each in gc.get_objects())
        assert group._late

    asyncio.run(live())
