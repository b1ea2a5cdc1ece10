"""Time that passes at once, for tests: what waits on the database's clock is due sooner."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from logto_webhooks.database.dialect import now
from logto_webhooks.database.schema import deliveries, queue_keys
from logto_webhooks.deliveries import DeliveryState

_IS_PENDING = deliveries.c.state == DeliveryState.PENDING

_NEXT = sa.func.coalesce(queue_keys.c.held_until, queue_keys.c.due_at).label("due_at")


def advance_time(connection: sa.Connection, milliseconds: int) -> None:
    """Let time pass for all that waits."""
    pending = sa.update(deliveries).where(_IS_PENDING)
    connection.execute(pending.values(due_at=deliveries.c.due_at - milliseconds))
    sooner = {name: queue_keys.c[name] - milliseconds for name in ("due_at", "held_until")}
    connection.execute(sa.update(queue_keys).values(sooner))


def until_due(connection: sa.Connection, handlers: Sequence[str]) -> int | None:
    """Milliseconds until the next of it is due, of the jobs those of these handlers; None if
    nothing waits."""
    waiting = sa.union_all(
        sa.select(deliveries.c.due_at).where(_IS_PENDING),
        sa.select(_NEXT).where(queue_keys.c.handler.in_(handlers)),
    ).subquery()
    return connection.scalar(sa.select(sa.func.min(waiting.c.due_at) - now()))
