"""Follow the inbox: each delivery once, soon after it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from typing import Final

from msgspec.structs import replace

from logto_webhooks.database.store import Store, TransactionRunner
from logto_webhooks.deliveries import DeliveryFilter, StoredDelivery

POLL_S: Final = 1.0
_PAGE: Final = 500
_BACK: Final = 100  # ids are given before commits, which come in another order


async def follow(
    host: TransactionRunner, sought: DeliveryFilter, poll_s: float = POLL_S
) -> AsyncGenerator[StoredDelivery, None]:
    """Give what comes after the id `sought.after`, as it comes. Raises StoreUnavailable."""
    first = newest = sought.after or 0
    seen: set[int] = set()
    while True:
        after = max(first, newest - _BACK)
        wanted = replace(sought, after=after, oldest_first=True, limit=_PAGE)
        found = await host.read(partial(_search, wanted))
        new = [each for each in found if each.id not in seen]
        for each in new:
            yield each
        seen = {each.id for each in found}
        newest = max([newest, *seen])
        if not new:
            await asyncio.sleep(poll_s)


async def newest_id(host: TransactionRunner) -> int:
    """The id of the newest delivery; 0 if there is none. Raises StoreUnavailable."""
    found = await host.read(partial(_search, DeliveryFilter(limit=1)))
    return found[0].id if found else 0


def _search(sought: DeliveryFilter, store: Store) -> list[StoredDelivery]:
    return store.inbox.search(sought)
