"""The store: everything that a transaction can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from msgspec import Struct, structs

from logto_webhooks.database.deliveries import DeliveryStore, Inbox
from logto_webhooks.database.dialect import by_code, now, put_row, read_clock
from logto_webhooks.database.jobs import JobStore
from logto_webhooks.database.memberships import MembershipStore
from logto_webhooks.database.schema import (
    checkpoints,
    deliveries,
    flow,
    flow_gaps,
    installation,
    is_pending,
    leases,
    queue_keys,
    records,
)
from logto_webhooks.database.signing_keys import KeyStore
from logto_webhooks.deliveries import Status
from logto_webhooks.retries import LONGEST_WAIT_S

T = TypeVar("T")
LOCK_S: Final = 1.0  # that a transaction of ours waits for a lock
STATEMENT_S: Final = 5.0  # that one of its statements may take
LONGEST_S: Final = 1.0  # a transaction of the worker, where it holds up only other workers
RECOVER: Final = "recover"
RECONCILE: Final = "reconcile"
# Until the transaction ends: the connection may be the application's.
_LIMIT_WAITS: Final = sa.select(
    sa.func.set_config("lock_timeout", sa.bindparam("lock", type_=sa.Text), sa.true()),
    sa.func.set_config("statement_timeout", sa.bindparam("statement", type_=sa.Text), sa.true()),
)
_NOTED: Final = sa.select(
    installation.c.installed_at, installation.c.clock_noted_at, installation.c.clock_moved_ms
)
_is_too_late = sa.and_(is_pending, deliveries.c.due_at > now() + int(LONGEST_WAIT_S * 1000))
_CLOCK: Final = sa.select(now().label("now"), sa.exists().where(_is_too_late).label("too_late"))


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


class DatabaseClock(Struct, frozen=True, kw_only=True):
    """What the database's clock says now, what it said when that was last noted and when this was
    installed (ms; 0 if never), by how much due times were moved along with it in all, and whether
    a delivery is due later than any wait explains."""

    now: int
    noted: int
    installed: int
    moved: int
    due_too_late: bool


class Store(DeliveryStore, MembershipStore):
    """What can be done in one transaction, which is the caller's to commit."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    @property
    def inbox(self) -> Inbox:
        """The inbox to look at."""
        return Inbox(self._connection)

    @property
    def jobs(self) -> JobStore:
        """The handlers and their jobs."""
        return JobStore(self._connection)

    @property
    def webhook_keys(self) -> KeyStore:
        """The keys of webhooks, and requests that no key verified."""
        return KeyStore(self._connection)

    def limit_waits(self, lock_s: float, statement_s: float) -> None:
        """Let this transaction wait no longer for a lock, or for a statement, where the database
        can limit that: TimedOut is raised then. A runner sets LOCK_S and STATEMENT_S."""
        if self._connection.dialect.name == "postgresql":
            limits = {"lock": f"{lock_s * 1000:.0f}", "statement": f"{statement_s * 1000:.0f}"}
            self._connection.execute(_LIMIT_WAITS, limits).close()

    def checkpoint(self, name: str) -> Checkpoint | None:
        """Return how far the work of that name has come; None if it never began."""
        return self._read_named(checkpoints, name, Checkpoint)

    def save_checkpoint(self, name: str, reached: Checkpoint) -> None:
        """Keep how far the work of that name has come."""
        put_row(self._connection, checkpoints, {"name": name} | structs.asdict(reached))

    def lease(self, name: str) -> ProcessLease | None:
        """Return who holds what has that name, or held it last."""
        return self._read_named(leases, name, ProcessLease)

    def save_lease(self, name: str, lease: ProcessLease) -> None:
        """Keep who holds what has that name."""
        put_row(self._connection, leases, {"name": name} | structs.asdict(lease))

    def flow(self) -> RecordedFlow:
        """Return what is noted of the flow of deliveries."""
        query = sa.select(flow.c.began, flow.c.last, flow.c.silent_since)
        row = self._connection.execute(query).one_or_none()
        began, last, silent_since = row or (None, None, None)
        gaps = self._connection.execute(sa.select(flow_gaps.c.ended_at, flow_gaps.c.length))
        return RecordedFlow(
            began=began, last=last, silent_since=silent_since, gaps=tuple(Gap(*gap) for gap in gaps)
        )

    def save_flow(self, new: RecordedFlow) -> None:
        """Note it, but for its gaps."""
        row = {"id": 1, "began": new.began, "last": new.last, "silent_since": new.silent_since}
        put_row(self._connection, flow, row)

    def save_gap(self, place: int, gap: Gap) -> None:
        """Note a gap in the flow, instead of the one that has the same place."""
        put_row(self._connection, flow_gaps, {"place": place} | structs.asdict(gap))

    def installed_at(self) -> int:
        """Return since when this is installed (ms): what is older runs no handlers."""
        return self._connection.scalar(sa.select(installation.c.installed_at)) or 0

    def set_installed_at(self, moment: int) -> None:
        """Let it be installed since then."""
        self._save_installation(moment, 0, 0)

    def clock(self) -> DatabaseClock:
        """Look at the database's clock."""
        row = self._connection.execute(_CLOCK).one()
        noted = self._connection.execute(_NOTED).one_or_none()
        installed_at, noted_at, moved_ms = noted or (0, 0, 0)
        return DatabaseClock(
            now=row.now,
            noted=noted_at,
            installed=installed_at,
            moved=moved_ms,
            due_too_late=bool(row.too_late),
        )

    def set_clock_back(self, by_ms: int, moved: int) -> None:
        """Let all that is due later be due so much sooner, and note what the clock says.

        Each process notices that the clock was set back, but only one may move what waits: a lease
        that is moved twice ends while its job runs. So who saw another sum `moved` does nothing.
        No delivery ever waits longer than the longest wait that we set: one that would is due now.
        """
        noted = self._connection.execute(_NOTED.with_for_update()).one_or_none()
        installed_at, _, moved_before = noted or (0, 0, 0)
        if by_ms > 0 and moved_before != moved:
            return
        moment = read_clock(self._connection)
        self._connection.execute(sa.update(deliveries).where(_is_too_late).values(due_at=moment))
        if by_ms > 0:
            pending = sa.select(deliveries.c.id).where(is_pending, deliveries.c.due_at > moment)
            self._bring_forward(deliveries, pending.order_by(deliveries.c.id), moment, by_ms)
            later = sa.or_(queue_keys.c.due_at > moment, queue_keys.c.held_until > moment)
            in_order = by_code(queue_keys.c.handler), by_code(queue_keys.c.queue_key)
            waiting = sa.select(queue_keys.c.id).where(later).order_by(*in_order)
            self._bring_forward(queue_keys, waiting, moment, by_ms)
            if installed_at > moment:
                installed_at = min(installed_at - by_ms, moment)
        self._save_installation(installed_at, moment, moved_before + by_ms)

    def status(self) -> Status:
        """Count deliveries and records, and say how far long work has come."""
        recovered, reconciled = map(self.checkpoint, (RECOVER, RECONCILE))
        return Status(
            deliveries=self.count_deliveries(),
            doubtful=self.count_records(records.c.doubtful),
            refetch=self.count_records(records.c.refetch_since.is_not(None)),
            oldest_pending_s=self.oldest_pending_s(),
            recovered=recovered.count if recovered else 0,
            complete_up_to=recovered.at if recovered else None,
            reconciled_at=reconciled.at if reconciled else None,
            silent_since=self.flow().silent_since,
            memberships_to_end=self.count_memberships_to_end(),
        )

    def _read_named(self, table: sa.Table, name: str, kind: Callable[..., T]) -> T | None:
        query = sa.select(table).where(table.c.name == name)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else kind(*row[1:])

    def _save_installation(self, installed_at: int, clock_noted_at: int, moved_ms: int) -> None:
        row = {
            "id": 1,
            "installed_at": installed_at,
            "clock_noted_at": clock_noted_at,
            "clock_moved_ms": moved_ms,
        }
        put_row(self._connection, installation, row)

    def _bring_forward(self, table: sa.Table, ids: sa.Select[Any], moment: int, by_ms: int) -> None:
        """What is later than the moment is sooner by so much, but not before it."""
        sooner = {
            at: sa.case((at <= moment, at), (at - by_ms < moment, moment), else_=at - by_ms)
            for at in table.c
            if at.name in ("due_at", "held_until")
        }
        # What is locked is being changed, and gets a new due time by that.
        free = ids.with_for_update(skip_locked=True)
        self._connection.execute(sa.update(table).where(table.c.id.in_(free)).values(sooner))
