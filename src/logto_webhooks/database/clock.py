"""The database's clock and what waits for it, on a Connection whose transaction is the caller's."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database import checkpoints
from logto_webhooks.database.dialect import by_code, now
from logto_webhooks.database.schema import deliveries, installation, is_pending, queue_keys
from logto_webhooks.retries import LONGEST_WAIT_S

_LONGEST_MS = int(LONGEST_WAIT_S * 1000)
_TOO_LATE = sa.and_(is_pending, deliveries.c.due_at > now() + _LONGEST_MS)
_NOTED = sa.select(
    installation.c.installed_at, installation.c.clock_noted_at, installation.c.clock_moved_ms
)
_READ = sa.select(now().label("now"), sa.exists().where(_TOO_LATE).label("too_late"))


class DatabaseClock(Struct, frozen=True, kw_only=True):
    """What the database's clock says now, what it said when that was last noted and when this was
    installed (ms; 0 if never), by how much due times were moved along with it in all, and whether
    a delivery is due later than any wait explains."""

    now: int
    noted: int
    installed: int
    moved: int
    due_too_late: bool


def read(connection: sa.Connection) -> DatabaseClock:
    """What the clock says, and what was noted of it."""
    row = connection.execute(_READ).one()
    installed_at, noted_at, moved_ms = connection.execute(_NOTED).one_or_none() or (0, 0, 0)
    return DatabaseClock(
        now=row.now,
        noted=noted_at,
        installed=installed_at,
        moved=moved_ms,
        due_too_late=bool(row.too_late),
    )


def set_back(connection: sa.Connection, by_ms: int, moved: int) -> None:
    """Let what is due later be due so much sooner; note what the clock says.

    Each process notices that the clock was set back, but only one may move what waits: a lease
    that is moved twice ends while its job runs. So who saw another sum `moved` does nothing.
    No delivery ever waits longer than the longest wait that we set: one that would is due now.
    """
    row = connection.execute(_NOTED.with_for_update()).one_or_none()
    installed_at, _, moved_before = row or (0, 0, 0)
    if by_ms > 0 and moved_before != moved:
        return
    moment = int(connection.scalar(sa.select(now())) or 0)
    too_late = sa.update(deliveries).where(_TOO_LATE).values(due_at=moment)
    connection.execute(too_late)
    if by_ms > 0:
        pending = sa.select(deliveries.c.id).where(is_pending, deliveries.c.due_at > moment)
        in_order = pending.order_by(deliveries.c.id)
        _sooner(connection, deliveries, in_order, moment, by_ms)
        later = sa.or_(queue_keys.c.due_at > moment, queue_keys.c.held_until > moment)
        waiting = sa.select(queue_keys.c.id).where(later)
        in_order = waiting.order_by(by_code(queue_keys.c.handler), by_code(queue_keys.c.queue_key))
        _sooner(connection, queue_keys, in_order, moment, by_ms)
        if installed_at > moment:
            installed_at = min(installed_at - by_ms, moment)
    checkpoints.write_installation(connection, installed_at, moment, moved_before + by_ms)


def _sooner(connection: sa.Connection, table: sa.Table, rows: Any, moment: int, by_ms: int) -> None:
    # What is locked is being changed, and gets a new due time by that.
    ids = rows.with_for_update(skip_locked=True)
    times = [table.c[name] for name in ("due_at", "held_until") if name in table.c]
    sooner = {time: _moved(time, moment, by_ms) for time in times}
    connection.execute(sa.update(table).where(table.c.id.in_(ids)).values(sooner))


def _moved(time: sa.Column[int], moment: int, by_ms: int) -> sa.ColumnElement[int]:
    """What is later than the moment is sooner by so much, but not before it."""
    return sa.case((time <= moment, time), (time - by_ms < moment, moment), else_=time - by_ms)
