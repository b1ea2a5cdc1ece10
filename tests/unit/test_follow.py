"""Following the inbox: each delivery once, whatever commits first."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from logto_webhooks.deliveries import DeliveryFilter
from logto_webhooks.tail import follow, newest_id
from logto_webhooks.testing import FrozenClock, make
from logto_webhooks.testing.memory import InboxRow, MemoryHost, MemoryStore, Tables
from tests.support.copy import delivery


def host_of(tables: Tables) -> MemoryHost:
    return MemoryHost(lambda: (MemoryStore(tables, FrozenClock()), lambda: None))


def put(tables: Tables, *ids: int) -> None:
    for number in ids:
        row = InboxRow(number, delivery(make.user_created().body), 0)
        tables.inbox[number] = row


def test_what_commits_late_is_not_missed() -> None:
    """On PostgreSQL an id is taken before its transaction commits: the greater may come first."""

    async def live() -> None:
        tables = Tables()
        host = host_of(tables)
        assert await newest_id(host) == 0
        put(tables, 1, 2)
        sought = DeliveryFilter(after=await newest_id(host))
        assert sought.after == 2
        put(tables, 3, 5)
        async with aclosing(follow(host, sought, poll_s=0)) as coming:
            assert [(await anext(coming)).id for _ in range(2)] == [3, 5]
            put(tables, 4, 6)
            assert [(await anext(coming)).id for _ in range(2)] == [4, 6]

    asyncio.run(live())


def test_many_at_once_come_page_by_page() -> None:
    """Each once, in order."""

    async def live() -> None:
        tables = Tables()
        put(tables, *range(1, 1202))
        async with aclosing(follow(host_of(tables), DeliveryFilter(after=0), poll_s=0)) as coming:
            assert [(await anext(coming)).id for _ in range(1201)] == list(range(1, 1202))

    asyncio.run(live())
