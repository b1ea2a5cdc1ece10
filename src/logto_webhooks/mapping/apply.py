"""Write the rows of all records, for a new or changed mapping, and try again what was refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Final

import sqlalchemy as sa

from logto_webhooks.database.mapped_rows import RegisteredMapping, State
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.schema import members
from logto_webhooks.database.store import Store
from logto_webhooks.event_loop import forever
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.mirror import TABLES
from logto_webhooks.records.record import Key, Kind, membership

PAGE: Final = 500  # records of one transaction
LOOK_S: Final = 2.0
SLOW: Final = 30  # looks until everything refused is tried again
UNSETTLED: Final[tuple[State, ...]] = ("owed", "waiting", "conflict")


async def apply_step(host: TransactionRunner, mappings: Mappings) -> int | None:
    """Write the rows of the next records of a mapping that isn't applied to all of them. Return how
    many these were; None if all mappings are applied, or others apply them now.

    Raises StoreUnavailable.
    """
    return await host.run(partial(_apply_step, mappings=mappings))


async def retry_unsettled(
    host: TransactionRunner, mappings: Mappings, states: Collection[State] = UNSETTLED
) -> int:
    """Try again what has one of these states; return how many. Raises StoreUnavailable."""
    count, after = 0, None
    while keys := await host.run(
        partial(_retry_page, mappings=mappings, states=states, after=after)
    ):
        count, after = count + len(keys), keys[-1]
    return count


async def keep_applied(host: TransactionRunner, mappings: Mappings) -> None:
    """Apply new and changed mappings to all records, and try again what was refused, until
    cancelled. What is owed, such as a locked row, is tried most often. Any number of processes may
    do this."""
    looks = 0

    async def look() -> None:
        nonlocal looks
        while await apply_step(host, mappings) is not None:
            pass
        await retry_unsettled(host, mappings, UNSETTLED if looks % SLOW == 0 else ("owed",))
        looks += 1

    await forever(look, LOOK_S)


def _apply_step(store: Store, mappings: Mappings) -> int | None:
    current = mappings.find_current(store.mappings.registered())
    mapping = store.mappings.lock_unapplied(current) if current else None
    if mapping is None:
        return None
    keys = _list_keys(store, mapping.kind, mapping.applied_to or "")
    _write_free(store, mapping, keys)
    store.mappings.set_applied(mapping.name, keys[-1].id if keys else None)
    return len(keys)


def _write_free(store: Store, mapping: RegisteredMapping, keys: Sequence[Key]) -> None:
    """Write the rows of records that nobody else has locked now. The others are owed."""
    free = store.lock_free(keys)
    store.mark_changed(free)
    store.mappings.mark_owed(mapping, set(keys) - free, "another transaction changes its record")


def _retry_page(
    store: Store, mappings: Mappings, states: Collection[State], after: Key | None
) -> list[Key]:
    current = mappings.find_current(store.mappings.registered())
    if not current:
        return []
    keys = store.mappings.list_unsettled(current, states, PAGE, after)
    store.mark_changed(store.lock_free(keys))
    return keys


def _list_keys(store: Store, kind: Kind, after: str) -> list[Key]:
    """List the next records that have a row in the mirror."""
    if kind == "membership":
        pair = (members.c.logto_organization_id, members.c.logto_user_id)
        query = sa.select(*pair).order_by(*pair).limit(PAGE)
        if after:
            organization, user = Key(kind, after).organization_and_user
            query = query.where(sa.tuple_(*pair) > sa.tuple_(organization.id, user.id))
        return [
            membership(row.logto_organization_id, row.logto_user_id) for row in store.execute(query)
        ]
    table, name = TABLES["user" if kind == "user" else "organization"]
    column = table.c[name]
    query = sa.select(column).where(column > after).order_by(column).limit(PAGE)
    return [Key(kind, row[0]) for row in store.execute(query)]
