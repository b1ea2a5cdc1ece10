"""The steps of the inbox, on a Connection whose transaction is the caller's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from logto_webhooks.adapters.stores import codec, statements
from logto_webhooks.adapters.stores.bulk import insert_new
from logto_webhooks.adapters.stores.dialect import chunks, pairs
from logto_webhooks.adapters.stores.schema import deliveries, is_odd, is_pending
from logto_webhooks.core.delivery import Delivery
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.ports import Accepted, Claimed, Outcome
from logto_webhooks.errors import ClaimLost


def add(connection: sa.Connection, new: Sequence[Delivery]) -> list[Accepted]:
    """Put deliveries into the inbox; one answer each, in order."""
    inserted = insert_new(connection, [codec.inbox_row(delivery) for delivery in new])
    known = dict(inserted)
    for some in chunks([each.digest for each in new if each.digest not in known]):
        query = sa.select(deliveries.c.digest, deliveries.c.id)
        found = connection.execute(query.where(deliveries.c.digest.in_(some)))
        known.update(pairs(found))
    # Of two copies in one batch, only the first is new.
    return [Accepted(known[each.digest], inserted.pop(each.digest, None) is None) for each in new]


def claim(
    connection: sa.Connection, token: str, limit: int, max_bytes: int, lease_s: float
) -> list[Claimed]:
    """Take due deliveries, the longest due first; nobody else gets them during the lease."""
    now = connection.scalar(statements.now(connection.dialect.name)) or 0
    due = connection.execute(statements.DUE, {"now": now, "most": limit})
    ids = _within(max_bytes, due)
    if not ids:
        return []
    lease = {"ids": ids, "by": token, "until": now + int(lease_s * 1000)}
    connection.execute(statements.LEASE, lease)
    rows = connection.execute(statements.CLAIMED, {"ids": ids})
    return [Claimed(**row) for row in rows.mappings()]


def finish(connection: sa.Connection, token: str, outcomes: Sequence[Outcome]) -> None:
    """Write outcomes. Raises ClaimLost when any of them is no longer held by `token`."""
    if not outcomes:
        return
    now = connection.scalar(statements.now(connection.dialect.name)) or 0
    ids = [outcome.id for outcome in outcomes]
    held = connection.execute(statements.HELD, {"ids": ids, "by": token}).all()
    if len(held) < len(ids):
        raise ClaimLost(count=len(ids) - len(held))
    rows = [
        {
            "of": outcome.id,
            "state": outcome.state.value,
            "result": outcome.result,
            "last_error": outcome.error,
            "due_at": now + int(outcome.retry_after_s * 1000),
        }
        for outcome in outcomes
    ]
    connection.execute(statements.FINISH, rows)


def counts(connection: sa.Connection) -> dict[str, int]:
    """Count deliveries by state; every state is there."""
    found = dict.fromkeys((state.value for state in State), 0)
    for condition in (is_pending, is_odd):  # each by its small index; all else is done
        by_state = sa.select(deliveries.c.state, sa.func.count()).where(condition)
        found |= pairs(connection.execute(by_state.group_by(deliveries.c.state)))
    total = connection.scalar(sa.select(sa.func.count()).select_from(deliveries)) or 0
    return found | {State.DONE.value: total - sum(found.values())}


def oldest_pending_s(connection: sa.Connection) -> float | None:
    """How long ago the oldest pending delivery was received; None if nothing is pending."""
    query = sa.select(sa.func.min(deliveries.c.received_at)).where(is_pending)
    oldest = connection.scalar(query)
    now = connection.scalar(statements.now(connection.dialect.name)) or 0
    return None if oldest is None else max(0, now - oldest) / 1000


def _within(max_bytes: int, sizes: Iterable[Any]) -> list[int]:
    """Take ids as long as their bodies fit; at least one."""
    taken: list[int] = []
    total = 0
    for row_id, size in sizes:
        total += size
        if taken and total > max_bytes:
            break
        taken.append(row_id)
    return taken
