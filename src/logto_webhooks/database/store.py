"""The store: all operations of a transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from msgspec import Struct, structs

from logto_webhooks.database.deliveries import DeliveryStore, Inbox
from logto_webhooks.database.dialect import by_code, now, put_row, read_clock
from logto_webhooks.database.jobs import JobStore
from logto_webhooks.database.mapped_rows import (
    NOT_WRITTEN,
    MappingStore,
    RegisteredMapping,
    lock_free_records,
)
from logto_webhooks.database.memberships import MembershipStore
from logto_webhooks.database.mirror import Mirror
from logto_webhooks.database.schema import (
    checkpoints,
    deliveries,
    flow,
    flow_gaps,
    installation,
    is_doubtful,
    is_pending,
    leases,
    queue_keys,
    records,
)
from logto_webhooks.database.sessions import get_schema_map
from logto_webhooks.database.signing_keys import KeyStore
from logto_webhooks.database.statement_limits import limit_waits
from logto_webhooks.deliveries import Status
from logto_webhooks.records.record import Key
from logto_webhooks.retries import LONGEST_WAIT_S

T = TypeVar("T")
# Writes the rows of changed records; returns the names of the registered mappings that it wrote.
Project = Callable[[sa.Connection, Collection[Key], Mapping[str, RegisteredMapping]], set[str]]
LOCK_S: Final = 1.0  # how long our transactions wait for a lock
DRIVER_S: Final = "logto_driver_s"  # in a connection's info: how long its driver waits
STATEMENT_S: Final = 5.0  # how long one of their statements may take
WORKER_S: Final = 1.0  # for a worker's transaction, if it delays only other workers
RECOVER: Final = "recover"
RECONCILE: Final = "reconcile"
_SELECT_OPEN: Final = sa.text(
    "SELECT virtualtransaction FROM pg_locks WHERE relation = CAST(:table AS regclass)"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    " AND mode IN ('RowShareLock', 'RowExclusiveLock') AND granted"
    " AND pid IS DISTINCT FROM pg_backend_pid()"
)
_SELECT_NOTED: Final = sa.select(
    installation.c.installed_at, installation.c.clock_noted_at, installation.c.clock_moved_ms
)
_is_too_late = sa.and_(is_pending, deliveries.c.due_at > now() + int(LONGEST_WAIT_S * 1000))
_CLOCK: Final = sa.select(now().label("now"), sa.exists().where(_is_too_late).label("too_late"))


class Checkpoint(Struct, frozen=True):
    """How far long work has come: up to a moment (ms), with `count` results."""

    at: int
    count: int


class ProcessLease(Struct, frozen=True):
    """Which process holds a lease, and until when (ms)."""

    holder: int
    until: int


class Gap(Struct, frozen=True):
    """A time without deliveries (ms), and when a delivery ended it."""

    ended_at: int
    length: int


class RecordedFlow(Struct, frozen=True, kw_only=True):
    """The stored flow of deliveries: when the first and the `last` came, the longest gap of each of
    the last days, and since when it has been silent; None if it isn't."""

    began: int | None = None
    last: int | None = None
    silent_since: int | None = None
    gaps: tuple[Gap, ...] = ()


class DatabaseClock(Struct, frozen=True, kw_only=True):
    """The time of the database's clock now, when it was last noted, and at installation (ms; 0 if
    never), by how much due times were moved with the clock in total, and whether a delivery is due
    later than any wait explains."""

    now: int
    noted: int
    installed: int
    moved: int
    due_too_late: bool


class Store(DeliveryStore, MembershipStore):
    """The operations of a transaction, which the caller commits."""

    def __init__(self, connection: sa.Connection, project: Project | None = None) -> None:
        """`project` writes what follows from changed records, such as the application's rows."""
        self._connection = connection
        self._changed = set()
        self._project = project

    @property
    def connection(self) -> sa.Connection:
        """The connection, for a feature's own statements."""
        return self._connection

    def execute(self, query: sa.Select[Any]) -> sa.CursorResult[Any]:
        """Run a query of a feature's own."""
        return self._connection.execute(query)

    def mark_changed(self, keys: Collection[Key]) -> None:
        """Write what follows from records once more, at the end of the transaction."""
        self._changed.update(keys)

    def lock_free(self, keys: Collection[Key]) -> set[Key]:
        """Lock those of the records that nobody else has locked, and return them."""
        return lock_free_records(self._connection, keys)

    def owe_rows(self) -> None:
        """Write none of the application's rows in this transaction: they are owed."""
        self._project = None

    def project_changes(self) -> None:
        """Write the rows of registered mappings that follow from the records that changed since the
        last call. Those that this process can't write are owed."""
        changed, self._changed = self._changed, set()
        registered = self.mappings.registered() if changed else {}
        if not registered:
            return
        project = self._project
        written = project(self._connection, changed, registered) if project else set()
        for name in registered.keys() - written:
            self.mappings.mark_owed(registered[name], changed, NOT_WRITTEN)

    @property
    def inbox(self) -> Inbox:
        """The deliveries in the inbox, to read without locks."""
        return Inbox(self._connection)

    @property
    def mirror(self) -> Mirror:
        """The rows of records that exist, to list without locks."""
        return Mirror(self._connection)

    @property
    def jobs(self) -> JobStore:
        """The handlers and their jobs."""
        return JobStore(self._connection)

    @property
    def mappings(self) -> MappingStore:
        """The mappings onto the application's own tables."""
        return MappingStore(self._connection)

    @property
    def webhook_keys(self) -> KeyStore:
        """The keys of webhooks, and requests that no key verified."""
        return KeyStore(self._connection)

    def limit_waits(self, lock_s: float, statement_s: float) -> None:
        """Limit this transaction's waits for locks, and its statements, if the database can: after
        that, TimedOut is raised. A runner sets LOCK_S and STATEMENT_S.

        The server's limit is shorter than the driver's, after which the connection is lost.
        """
        if self._connection.dialect.name == "postgresql":
            driver_s = self._connection.info.get(DRIVER_S)
            statement_s = statement_s if driver_s is None else min(statement_s, 0.8 * driver_s)
            limit_waits(self._connection, f"{lock_s * 1000:.0f}", f"{statement_s * 1000:.0f}")

    def open_transactions(self) -> set[str]:
        """Return the names of the other open transactions that have written or locked records.
        Empty on SQLite, where only one at a time writes."""
        if self._connection.dialect.name != "postgresql":
            return set()
        schema = (get_schema_map(self._connection) or {}).get(None)
        quote = self._connection.dialect.identifier_preparer.quote
        table = ".".join(quote(name) for name in (schema, records.name) if name)
        return set(self._connection.scalars(_SELECT_OPEN, {"table": table}))

    def checkpoint(self, name: str) -> Checkpoint | None:
        """Return how far the work `name` has come; None if it never began."""
        return self._read_named(checkpoints, name, Checkpoint)

    def save_checkpoint(self, name: str, reached: Checkpoint) -> None:
        """Store how far the work `name` has come."""
        put_row(self._connection, checkpoints, {"name": name} | structs.asdict(reached))

    def lease(self, name: str) -> ProcessLease | None:
        """Return the lease `name`, which may have expired."""
        return self._read_named(leases, name, ProcessLease)

    def save_lease(self, name: str, lease: ProcessLease) -> None:
        """Store the lease `name`."""
        put_row(self._connection, leases, {"name": name} | structs.asdict(lease))

    def flow(self) -> RecordedFlow:
        """Return the stored flow of deliveries."""
        query = sa.select(flow.c.began, flow.c.last, flow.c.silent_since)
        row = self._connection.execute(query).one_or_none()
        began, last, silent_since = row or (None, None, None)
        gaps = self._connection.execute(sa.select(flow_gaps.c.ended_at, flow_gaps.c.length))
        return RecordedFlow(
            began=began, last=last, silent_since=silent_since, gaps=tuple(Gap(*gap) for gap in gaps)
        )

    def save_flow(self, new: RecordedFlow) -> None:
        """Store the flow of deliveries, except its gaps."""
        row = {"id": 1, "began": new.began, "last": new.last, "silent_since": new.silent_since}
        put_row(self._connection, flow, row)

    def save_gap(self, place: int, gap: Gap) -> None:
        """Store a gap in the flow. It replaces the one with the same place."""
        put_row(self._connection, flow_gaps, {"place": place} | structs.asdict(gap))

    def installed_at(self) -> int:
        """Return when this was installed (ms). Older events run no handlers."""
        return self._connection.scalar(sa.select(installation.c.installed_at)) or 0

    def set_installed_at(self, moment: int) -> None:
        """Store when this was installed."""
        self._save_installation(moment, 0, 0)

    def clock(self) -> DatabaseClock:
        """Read the database's clock, and what was noted of it."""
        row = self._connection.execute(_CLOCK).one()
        noted = self._connection.execute(_SELECT_NOTED).one_or_none()
        installed_at, noted_at, moved_ms = noted or (0, 0, 0)
        return DatabaseClock(
            now=row.now,
            noted=noted_at,
            installed=installed_at,
            moved=moved_ms,
            due_too_late=bool(row.too_late),
        )

    def set_clock_back(self, by_ms: int, moved: int) -> None:
        """Make all future due times earlier by `by_ms`, and the times when handlers were registered
        that are in the future now, and note the time of the clock.

        Each process notices that the clock was set back, but only one may move due times: a lease
        that is moved twice expires while its job runs. So this does nothing if the total is no
        longer `moved`. A delivery that would wait longer than our longest wait is due now.
        """
        noted = self._connection.execute(_SELECT_NOTED.with_for_update()).one_or_none()
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
            self.jobs.set_clock_back(moment, by_ms)
            if installed_at > moment:
                installed_at = min(installed_at - by_ms, moment)
        self._save_installation(installed_at, moment, moved_before + by_ms)

    def status(self) -> Status:
        """Count deliveries and records, and return how far long work has come."""
        recovered, reconciled = map(self.checkpoint, (RECOVER, RECONCILE))
        return Status(
            deliveries=self.count_deliveries(),
            doubtful=self.count_records(is_doubtful),
            refetch=self.count_records(records.c.refetch_since.is_not(None)),
            oldest_pending_s=self.oldest_pending_s(),
            recovered=recovered.count if recovered else 0,
            complete_up_to=(recovered.at or None) if recovered else None,
            reconciled_at=reconciled.at if reconciled else None,
            silent_since=self.flow().silent_since,
            memberships_to_end=self.count_memberships_to_end(),
            mappings=self.mappings.status(),
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
        """Make times after `moment` earlier by `by_ms`, but not earlier than `moment`."""
        sooner = {
            at: sa.case((at <= moment, at), (at - by_ms < moment, moment), else_=at - by_ms)
            for at in table.c
            if at.name in ("due_at", "held_until")
        }
        # A locked row is being changed, which gives it a new due time.
        free = ids.with_for_update(skip_locked=True)
        self._connection.execute(sa.update(table).where(table.c.id.in_(free)).values(sooner))
