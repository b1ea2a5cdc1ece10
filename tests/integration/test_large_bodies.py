"""Large bodies: nobody else waits while one is parsed."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import httpx2
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from logto_webhooks import LogtoWebhooks, apply, canonical_json, events
from logto_webhooks.apply import DeliveryWorker
from logto_webhooks.apply.batch import Work, parse_delivery
from logto_webhooks.clock import SystemClock
from logto_webhooks.deliveries import LARGE, ClaimedDelivery, DeliveryFilter, DeliveryState
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import make
from tests.support.mounted import all_over, live, on_postgres, on_sqlite, send, soon, until
from tests.support.stores import delivery, open_host
from tests.support.waiting import eventually

PARSING = {"identify", "parse_delivery", "build_event", "read_webhook_id"}
MOUNTS = [
    pytest.param(on_sqlite, id="SQLite"),
    pytest.param(lambda folder: on_postgres(), id="PostgreSQL", marks=pytest.mark.postgres),
]


@contextmanager
def called_here() -> Iterator[set[str]]:
    """The names of the functions that this thread, the event loop's, calls."""
    names: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        names.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield names
    finally:
        sys.setprofile(None)


def make_user(parts: int) -> SignedRequest:
    """A delivery of a user whose customData has so many small parts."""
    return make.user_created(id="ana", at=soon(), customData={"a": [[[]]] * parts})


def follow(logto: LogtoWebhooks, request: SignedRequest, jobs: int) -> set[str]:
    """Send it, wait until its jobs are over; return what the event loop's thread called."""
    called: set[str] = set()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        with called_here() as names:
            await send(client, request)
            rows = await until(all_over(jobs), logto)
        assert {row.state for row in rows} == {"done"}
        called.update(names)

    live(logto, body)
    return called


@pytest.mark.parametrize(("parts", "parses"), [(1, True), (LARGE // 4, False)])
@pytest.mark.parametrize("mount", MOUNTS)
def test_a_large_body_is_parsed_in_a_thread(
    mount: Callable[[Path], LogtoWebhooks], tmp_path: Path, parts: int, parses: bool
) -> None:
    """When it is received, applied and given to handlers. A small one is parsed at once."""
    logto, given = mount(tmp_path), list[object]()

    @logto.on("User.Created")
    async def receive(event: events.UserCreated) -> None:
        assert event.user
        assert isinstance(event.user.custom_data, dict)
        given.append(event.user.custom_data["a"])

    @logto.on(events.LocalUserCreated)
    async def follow_local(event: events.LocalUserCreated) -> None:
        given.append(event.user.custom_data["a"])

    called = follow(logto, make_user(parts), jobs=2)
    assert called & PARSING == (PARSING if parses else set())
    # What merges and encodes the record; on SQLite that has a thread in any case.
    applies_here = parses and isinstance(logto._engine, AsyncEngine)
    assert ("apply_batch" in called) == applies_here
    assert given == [[[[]]] * parts] * 2


@pytest.mark.parametrize("mount", MOUNTS)
def test_an_application_that_needs_all_threads_of_its_loop_holds_up_nothing(
    mount: Callable[[Path], LogtoWebhooks], tmp_path: Path
) -> None:
    """Nor does one whose handlers call `asyncio.to_thread`, as Python's documentation says."""
    logto, finished = mount(tmp_path), threading.Event()

    @logto.on("User.Created")
    async def call_slowly(event: events.UserCreated) -> None:
        await asyncio.to_thread(finished.wait)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        try:
            await send(client, make.user_created(id="bo", at=soon()))
            await until(lambda rows: len(rows) == 1 and rows[0].attempts == 1, logto)
            await send(client, make_user(parts=LARGE // 4))
            await eventually(logto.status, lambda status: status.deliveries["done"] == 2)
        finally:
            finished.set()
        await until(all_over(2), logto)

    live(logto, body)


@pytest.mark.parametrize("mount", MOUNTS)
def test_small_deliveries_leave_the_garbage_collector_alone(
    mount: Callable[[Path], LogtoWebhooks], tmp_path: Path
) -> None:
    """What is new stays young: else garbage would become old, which is seldom collected."""
    logto = mount(tmp_path)

    @logto.on(events.LocalUserCreated)
    async def note(event: events.LocalUserCreated) -> None: ...

    usual = gc.get_threshold()
    gc.set_threshold(10**9)  # nothing ages by itself
    try:
        new: list[object] = []
        follow(logto, make_user(parts=3), jobs=1)
        assert any(young is new for young in gc.get_objects(generation=0))
    finally:
        gc.set_threshold(*usual)


def test_what_is_garbage_before_a_large_value_is_collected() -> None:
    """It must not become old with it."""

    class Node:
        itself: Node

    node = Node()
    node.itself = node
    gone = weakref.ref(node)
    del node
    canonical_json.decode(b"[" + b"[]," * canonical_json.MANY + b"[]]")
    assert gone() is None


def test_a_body_whose_parsing_takes_longer_than_the_lease(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a slow machine. It keeps its claim, and isn't parsed again and again."""
    monkeypatch.setattr(apply, "LEASE_S", 0.4)
    parsed: list[int] = []

    def parse_slowly(claimed: ClaimedDelivery, lag_ms: int, window_ms: int = 0) -> Work:
        parsed.append(claimed.id)
        time.sleep(1)
        return parse_delivery(claimed, lag_ms, window_ms)

    monkeypatch.setattr(apply, "parse_delivery", parse_slowly)

    async def run() -> None:
        host = open_host("sqlite", tmp_path)
        deliveries = [delivery(make_user(LARGE // 4).body)]
        await host.run(lambda store: store.add(deliveries))
        workers = [
            DeliveryWorker(host, SystemClock(), lambda report: None, lambda: 0.0, budget_s=1.0)
            for _ in range(2)
        ]
        async with asyncio.timeout(20):
            await asyncio.gather(*(worker.drain() for worker in workers))
        [stored] = await host.read(lambda store: store.inbox.search(DeliveryFilter(limit=2)))
        assert (stored.state, stored.attempts) == (DeliveryState.DONE, 1)
        await host.close()

    asyncio.run(run())
    assert len(parsed) == 1
