"""Time that passes at once, for tests: what waits on the database's clock is due sooner."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from logto_webhooks.database.dialect import now
from logto_webhooks.database.schema import deliveries, lines
from logto_webhooks.states import DeliveryState

_IS_PENDING = deliveries.c.state == DeliveryState.PENDING


def advance_time(connection: sa.Connection, milliseconds: int) -> None:
    """Let time pass for all that waits."""
    for table, waits in ((deliveries, _IS_PENDING), (lines, sa.true())):
        sooner = {"due_at": table.c.due_at - milliseconds}
        connection.execute(sa.update(table).where(waits).values(sooner))


def until_due(connection: sa.Connection, handlers: Sequence[str]) -> int | None:
    """Milliseconds until the next of it is due, of the jobs those of these handlers; None if
    nothing waits."""
    waiting = sa.union_all(
        sa.select(deliveries.c.due_at).where(_IS_PENDING),
        sa.select(lines.c.due_at).where(lines.c.handler.in_(handlers)),
    ).subquery()
    return connection.scalar(sa.select(sa.func.min(waiting.c.due_at) - now()))
