"""Following the inbox: each delivery once, whatever commits first."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks import arrivals
from logto_webhooks.arrivals import follow, newest_id
from logto_webhooks.database.schema import deliveries
from logto_webhooks.deliveries import DeliveryFilter
from logto_webhooks.testing import make
from logto_webhooks.testing.backend import Backend, MemoryBackend
from tests.support.stores import STORES, StoreKind, delivery, open_host


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


@pytest.mark.parametrize("late_s", [arrivals._LATE_S, 0.0])
def test_a_whole_batch_that_commits_late_is_not_missed(
    late_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction may add 512. After a while, nobody waits for it any more."""
    monkeypatch.setattr(arrivals, "_LATE_S", late_s)

    async def live() -> None:
        backend = MemoryBackend()
        await put(backend, *range(1_000, 1_600))
        async with aclosing(follow(backend.host, DeliveryFilter(after=0), poll_s=0)) as coming:
            early = [(await anext(coming)).id for _ in range(600)]
            await put(backend, 1_600)
            early.append((await anext(coming)).id)
            assert early == list(range(1_000, 1_601))
            await put(backend, *range(1, 513))
            await put(backend, 1_601)
            late = [(await anext(coming)).id]
            while late[-1] != 1_601:
                late.append((await anext(coming)).id)
            assert late == ([*range(1, 513), 1_601] if late_s else [1_601])

    asyncio.run(live())


def test_what_has_come_is_not_read_again() -> None:
    """A body can have megabytes, and the last ten seconds are looked at each second."""

    async def live() -> None:
        backend = MemoryBackend()
        await put(backend, 1, 2, 3)
        async with aclosing(follow(backend.host, DeliveryFilter(after=0), poll_s=0)) as coming:
            assert [(await anext(coming)).id for _ in range(3)] == [1, 2, 3]
            backend.connection.execute(sa.update(deliveries).values(state="odd"))  # unreadable
            await put(backend, 4)
            assert (await anext(coming)).id == 4

    asyncio.run(live())


@pytest.mark.parametrize("kind", STORES)
def test_every_store_leaves_out_what_has_come(kind: StoreKind, tmp_path: Path) -> None:
    """By its IDs."""

    async def live() -> list[int]:
        host = open_host(kind, tmp_path)
        new = [delivery(make.user_created().body) for _ in range(4)]
        first, _, third, _ = await host.run(lambda store: store.add(new))
        wanted = DeliveryFilter(after=0, oldest_first=True)
        without = {first.id, third.id}
        page = await host.read(lambda store: store.inbox.search(wanted, without=without))
        await host.close()
        return [each.id - first.id for each in page]

    assert asyncio.run(live()) == [1, 3]


def test_many_at_once_come_page_by_page() -> None:
    """Each once, in order."""

    async def live() -> None:
        backend = MemoryBackend()
        await put(backend, *range(1, 1202))
        sought = DeliveryFilter(after=0)
        async with aclosing(follow(backend.host, sought, poll_s=0)) as coming:
            assert [(await anext(coming)).id for _ in range(1201)] == list(range(1, 1202))

    asyncio.run(live())
