"""Write the rows of all records, for a new or changed mapping, and try again what was refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Final

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.schema import mapped_rows, members
from logto_webhooks.database.store import Checkpoint, Store
from logto_webhooks.event_loop import forever
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.mirror import TABLES
from logto_webhooks.records.record import Key, Kind, membership

PAGE: Final = 500  # records of one transaction
LOOK_S: Final = 2.0
SLOW: Final = 30  # looks until everything refused is tried again


class MappingCounts(Struct, frozen=True, kw_only=True):
    """How many records of a mapping have each state."""

    mapping: str
    ok: int = 0
    waiting: int = 0
    conflict: int = 0
    owed: int = 0


async def apply_all(
    host: TransactionRunner, progressed: Callable[[Kind, int], None] = lambda kind, count: None
) -> None:
    """Write the mapped rows of all records, in short transactions. Raises StoreUnavailable."""
    for kind in ("organization", "user", "membership"):
        after, count = Key(kind, ""), 0
        while keys := await host.read(partial(_list_keys, after=after)):
            await host.run(partial(_project, keys=keys))
            after, count = keys[-1], count + len(keys)
            progressed(kind, count)


async def retry_unsettled(host: TransactionRunner, states: Collection[str]) -> int:
    """Try again what waits, conflicts or is owed; return how many. Raises StoreUnavailable."""
    keys = await host.read(partial(_list_unsettled, states=states))
    for start in range(0, len(keys), PAGE):
        await host.run(partial(_project, keys=keys[start : start + PAGE]))
    return len(keys)


async def keep_applied(host: TransactionRunner, mappings: Mappings) -> None:
    """Apply new and changed mappings to all records, then try again what was refused, until
    cancelled. What is owed, such as a locked row, is tried most often."""
    looks = 0

    async def look() -> None:
        nonlocal looks
        if looks == 0:
            await _apply_changed(host, mappings)
        states = ("owed",) if looks % SLOW else ("owed", "waiting", "conflict")
        await retry_unsettled(host, states)
        looks += 1

    await forever(look, LOOK_S)


async def _apply_changed(host: TransactionRunner, mappings: Mappings) -> None:
    name = f"mapping {mappings.digest()}"
    if not await host.read(lambda store: store.checkpoint(name)):
        await apply_all(host)
        applied = Checkpoint(time.time_ns() // 1_000_000, 0)
        await host.run(lambda store: store.save_checkpoint(name, applied))


def count_states(store: Store) -> list[MappingCounts]:
    """Count the records of each mapping by state."""
    group = (mapped_rows.c.mapping, mapped_rows.c.state)
    query = (
        sa.select(*group, sa.func.count().label("total"))
        .group_by(*group)
        .order_by(mapped_rows.c.mapping)
    )
    counts: dict[str, dict[str, int]] = {}
    for row in store.execute(query):
        counts.setdefault(row.mapping, {})[row.state] = row.total
    return [MappingCounts(mapping=mapping, **by_state) for mapping, by_state in counts.items()]


def _project(store: Store, keys: Collection[Key]) -> None:
    store.mark_changed(keys)


def _list_keys(store: Store, after: Key) -> list[Key]:
    """List the next records that have a row in the mirror."""
    if after.kind == "membership":
        pair = (members.c.logto_organization_id, members.c.logto_user_id)
        query = sa.select(*pair).order_by(*pair).limit(PAGE)
        if after.id:
            organization, user = after.organization_and_user
            query = query.where(sa.tuple_(*pair) > sa.tuple_(organization.id, user.id))
        return [
            membership(row.logto_organization_id, row.logto_user_id) for row in store.execute(query)
        ]
    table, name = TABLES["user" if after.kind == "user" else "organization"]
    column = table.c[name]
    query = sa.select(column).where(column > after.id).order_by(column).limit(PAGE)
    return [Key(after.kind, row[0]) for row in store.execute(query)]


def _list_unsettled(store: Store, states: Collection[str]) -> list[Key]:
    query = sa.select(mapped_rows.c.kind, mapped_rows.c.logto_id).where(
        mapped_rows.c.state.in_(list(states))
    )
    return sorted({Key(row.kind, row.logto_id) for row in store.execute(query)})
