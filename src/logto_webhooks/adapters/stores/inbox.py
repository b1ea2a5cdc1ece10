"""The steps of the inbox, on a Connection whose transaction is the caller's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from logto_webhooks.adapters.stores import codec, statements
from logto_webhooks.adapters.stores.bulk import insert_new
from logto_webhooks.adapters.stores.dialect import chunks, now, pairs
from logto_webhooks.adapters.stores.schema import deliveries, is_odd, is_pending
from logto_webhooks.core.clocks import Clocks, Dated
from logto_webhooks.core.delivery import Delivery, sent_at_of
from logto_webhooks.core.inbox import Accepted, Claimed, Outcome, Received
from logto_webhooks.core.lifecycle import State
from logto_webhooks.errors import ClaimLost


def add(
    connection: sa.Connection, new: Sequence[Delivery], tried: Collection[bytes] = ()
) -> list[Accepted]:
    """Put deliveries into the inbox; one answer each, in order.

    Those whose digests were `tried` before may be there already, with the same `received_at`.
    """
    if not new:
        return []
    inserted = insert_new(connection, [codec.inbox_row(delivery) for delivery in new])
    known = dict(inserted)
    ours = {(each.digest, each.received_at) for each in new if each.digest in tried}
    for some in chunks([each.digest for each in new if each.digest not in known]):
        query = sa.select(deliveries.c.digest, deliveries.c.id, deliveries.c.received_at)
        for digest, number, at in connection.execute(query.where(deliveries.c.digest.in_(some))):
            known[digest] = number
            if (digest, at) in ours:  # its commit was done, and only the answer was lost
                inserted[digest] = number
    # Of two copies in one batch, only the first is new.
    return [Accepted(known[each.digest], inserted.pop(each.digest, None) is None) for each in new]


def claim(
    connection: sa.Connection, token: str, limit: int, max_bytes: int, lease_s: float
) -> list[Claimed]:
    """Take due deliveries, the longest due first; nobody else gets them during the lease."""
    ids = _within(max_bytes, connection.execute(statements.DUE, {"most": limit}))
    if not ids:
        return []
    lease = {"ids": ids, "by": token, "lease_ms": int(lease_s * 1000)}
    rows = connection.execute(statements.LEASE, lease).mappings()
    return [Claimed(**row) for row in sorted(rows, key=lambda row: row["id"])]


def renew(connection: sa.Connection, token: str, ids: Sequence[int], lease_s: float) -> None:
    """Hold claimed deliveries longer. Raises ClaimLost when any is no longer held by `token`."""
    held = {"ids": list(ids), "by": token, "lease_ms": int(lease_s * 1000)}
    renewed = connection.execute(statements.RENEW, held).rowcount
    if renewed < len(ids):
        raise ClaimLost(count=len(ids) - renewed)


def finish(connection: sa.Connection, token: str, outcomes: Sequence[Outcome]) -> None:
    """Write outcomes. Raises ClaimLost when any of them is no longer held by `token`."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for each in outcomes:
        said = (each.state.value, each.result, each.error, int(each.retry_after_s * 1000))
        alike.setdefault(said, []).append(each.id)
    held = 0
    for (state, result, error, wait_ms), ids in alike.items():
        values = {"state": state, "result": result, "last_error": error, "wait_ms": wait_ms}
        held += connection.execute(statements.FINISH, values | {"ids": ids, "by": token}).rowcount
    if held < len(outcomes):
        raise ClaimLost(count=len(outcomes) - held)


def recent(connection: sa.Connection, limit: int) -> list[Received]:
    """Return the newest deliveries, the newest first."""
    columns = (deliveries.c.body, deliveries.c.occurred_at, deliveries.c.received_at)
    query = sa.select(*columns).order_by(deliveries.c.id.desc()).limit(limit)
    return [Received(*row) for row in connection.execute(query)]


def clocks(connection: sa.Connection, limit: int) -> Clocks:
    """Return the database's clock, and how the newest deliveries are dated."""
    dated = (deliveries.c.digest, deliveries.c.occurred_at, deliveries.c.received_at)
    query = sa.select(*dated, deliveries.c.origin).order_by(deliveries.c.id.desc()).limit(limit)
    found = [Dated(sent_at_of(row[0]), *row[1:]) for row in connection.execute(query)]
    return Clocks(connection.scalar(sa.select(now())) or 0, found)


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
    moment = connection.scalar(sa.select(now())) or 0
    return None if oldest is None else max(0, moment - oldest) / 1000


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
