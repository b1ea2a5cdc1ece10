"""Following the inbox: each delivery once, whatever commits first."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import sqlalchemy as sa

from logto_webhooks.arrivals import follow, newest_id
from logto_webhooks.database.schema import deliveries
from logto_webhooks.deliveries import DeliveryFilter
from logto_webhooks.testing import make
from logto_webhooks.testing.backend import Backend, MemoryBackend
from tests.support.stores import delivery


async def put(backend: Backend, *ids: int) -> None:
    """Deliveries that get their ids before they are committed."""
    new = [delivery(make.user_created().body) for _ in ids]
    stored = await backend.host.run(lambda store: store.add(new))
    for result, number in zip(stored, ids, strict=True):
        if result.id != number:
            renumbered = sa.update(deliveries).where(deliveries.c.id == result.id)
            backend.connection.execute(renumbered.values(id=number))


def test_what_commits_late_is_not_missed() -> None:
    """On PostgreSQL an id is taken before its transaction commits: the greater may come first."""

    async def live() -> None:
        backend = MemoryBackend()
        assert await newest_id(backend.host) == 0
        await put(backend, 1, 2)
        sought = DeliveryFilter(after=await newest_id(backend.host))
        assert sought.after == 2
        await put(backend, 3)
        await put(backend, 5)
        async with aclosing(follow(backend.host, sought, poll_s=0)) as coming:
            assert [(await anext(coming)).id for _ in range(2)] == [3, 5]
            await put(backend, 4)
            await put(backend, 6)
            assert [(await anext(coming)).id for _ in range(2)] == [4, 6]

    asyncio.run(live())


def test_many_at_once_come_page_by_page() -> None:
    """Each once, in order."""

    async def live() -> None:
        backend = MemoryBackend()
        await put(backend, *range(1, 1202))
        sought = DeliveryFilter(after=0)
        async with aclosing(follow(backend.host, sought, poll_s=0)) as coming:
            assert [(await anext(coming)).id for _ in range(1201)] == list(range(1, 1202))

    asyncio.run(live())
