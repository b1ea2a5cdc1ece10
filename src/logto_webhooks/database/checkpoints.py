"""What long work and single processes keep: checkpoints, leases, the flow, the installation."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.dialect import INSERT
from logto_webhooks.database.schema import checkpoints, flow, flow_gaps, installation, leases

RECOVER: Final = "recover"
RECONCILE: Final = "reconcile"


class Checkpoint(Struct, frozen=True):
    """How far long work has come: up to which moment (ms), and with how much to show for it."""

    at: int
    count: int


class ProcessLease(Struct, frozen=True):
    """Which process holds something, and until when (ms)."""

    holder: int
    until: int


class Gap(Struct, frozen=True):
    """How long (ms) nothing had come when a delivery came."""

    ended_at: int
    length: int


class RecordedFlow(Struct, frozen=True, kw_only=True):
    """What a database keeps of it: when the first and the `last` delivery came, the longest gap of
    each of the last days, and since when it is silent; None while it isn't."""

    began: int | None = None
    last: int | None = None
    silent_since: int | None = None
    gaps: tuple[Gap, ...] = ()


def read_checkpoint(connection: sa.Connection, name: str) -> Checkpoint | None:
    """Return how far the work of that name has come; None if it never began."""
    query = sa.select(checkpoints.c.at, checkpoints.c.count).where(checkpoints.c.name == name)
    row = connection.execute(query).one_or_none()
    return row and Checkpoint(*row)


def write_checkpoint(connection: sa.Connection, name: str, reached: Checkpoint) -> None:
    """Keep how far it has come."""
    _put(connection, checkpoints, name, at=reached.at, count=reached.count)


def read_lease(connection: sa.Connection, name: str) -> ProcessLease | None:
    """Return who holds what has that name, or held it last."""
    query = sa.select(leases.c.holder, leases.c.until).where(leases.c.name == name)
    row = connection.execute(query).one_or_none()
    return row and ProcessLease(*row)


def write_lease(connection: sa.Connection, name: str, lease: ProcessLease) -> None:
    """Keep who holds it."""
    _put(connection, leases, name, holder=lease.holder, until=lease.until)


def read_flow(connection: sa.Connection) -> RecordedFlow:
    """Return what is noted of the flow of deliveries."""
    query = sa.select(flow.c.began, flow.c.last, flow.c.silent_since)
    row = connection.execute(query).one_or_none()
    began, last, silent_since = row or (None, None, None)
    gaps = connection.execute(sa.select(flow_gaps.c.ended_at, flow_gaps.c.length))
    return RecordedFlow(
        began=began, last=last, silent_since=silent_since, gaps=tuple(Gap(*gap) for gap in gaps)
    )


def write_flow(connection: sa.Connection, new: RecordedFlow) -> None:
    """Note it, but for its gaps."""
    _put(connection, flow, 1, began=new.began, last=new.last, silent_since=new.silent_since)


def write_gap(connection: sa.Connection, place: int, gap: Gap) -> None:
    """Note a gap, instead of the one that has the same place."""
    _put(connection, flow_gaps, place, ended_at=gap.ended_at, length=gap.length)


def read_installed_at(connection: sa.Connection) -> int:
    """Return since when this is installed (ms)."""
    return connection.scalar(sa.select(installation.c.installed_at)) or 0


def write_installation(
    connection: sa.Connection, installed_at: int, clock_noted_at: int = 0, clock_moved_ms: int = 0
) -> None:
    """Note since when this is installed, and what the database's clock said."""
    clock = {"clock_noted_at": clock_noted_at, "clock_moved_ms": clock_moved_ms}
    _put(connection, installation, 1, installed_at=installed_at, **clock)


def _put(connection: sa.Connection, table: sa.Table, key: str | int, **values: Any) -> None:
    [column] = table.primary_key
    insert = INSERT[connection.dialect.name](table).values({column.name: key} | values)
    connection.execute(insert.on_conflict_do_update(index_elements=[column], set_=values))
