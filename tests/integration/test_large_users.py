"""Handlers that ask for the event's user, whose data may be large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import pytest

from logto_webhooks import UserRow, events
from logto_webhooks.clock import SystemClock
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.store import Store
from logto_webhooks.event_loop import Offloader
from logto_webhooks.handlers import HandlerOptions, Handlers
from logto_webhooks.handlers.call import ClaimedJob, HandlerCaller
from logto_webhooks.testing import make
from tests.support.plans import Ran, noting
from tests.support.stores import Copy

T = TypeVar("T")


class CountingOffloader(Offloader):
    """Counts what runs in its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    async def run(self, function: Callable[[], T]) -> T:
        self.runs += 1
        return await super().run(function)


@pytest.mark.parametrize("size", [10, 300_000])
def test_a_user_is_read_when_its_handler_is_called(host: HandlerRunner, size: int) -> None:
    """Not in the transaction of the claim, which all others wait for. A large one is decoded in a
    thread."""
    told: list[tuple[str | None, int]] = []

    async def handler(event: events.UserCreated, user: UserRow | None) -> None:
        assert user is not None
        told.append((user.name, len(user.custom_data["text"])))

    handlers = Handlers()
    handlers.fit(host.provides)
    handlers.add(handler, ["User.Created"], name="asks", options=HandlerOptions())
    offloader = CountingOffloader()
    caller = HandlerCaller(
        host.handle, host.read, SystemClock(), lambda: 0.0, handlers, offloader=offloader
    )

    def claim(store: Store) -> tuple[list[ClaimedJob], Ran]:
        with noting(store.connection) as ran:
            return caller.claim(store, "t", {"asks": 5}), ran

    async def live() -> None:
        await host.run(lambda store: store.set_installed_at(0))
        await host.run(lambda store: store.jobs.register([handlers.by_name["asks"].registered]))
        copy = Copy(host)
        await copy.take([make.user_created(id="ana", name="Ana", at=1_000).body])
        [claimed], ran = await host.run(claim)
        assert not [query for query, _ in ran if "logto_records" in query]
        data = {"text": "x" * size}
        changed = make.user_data_updated(id="ana", name="New", customData=data, at=2_000)
        await copy.take([changed.body])
        result = await caller.call(claimed)
        assert result.error is None
        await host.close()

    asyncio.run(live())
    assert told == [("New", size)]
    assert offloader.runs == (size > 1_000)
