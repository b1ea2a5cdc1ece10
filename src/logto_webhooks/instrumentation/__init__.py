"""Telemetry events: everything that is logged or counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ClassVar, Literal

from msgspec import Struct

Why = Literal["silent", "rejected"]  # why the flow of deliveries stopped
RefusedFor = Literal[
    "invalid_signature",
    "not_a_delivery",
    "too_large",
    "too_slow",
    "no_room",
    "body_gone",
    "not_found",
    "method_not_allowed",
]


class TelemetryEvent(Struct, frozen=True):
    """Something that happened: the `level` and the `message` of its log line."""

    level: ClassVar[int] = logging.INFO
    message: ClassVar[str]


class DeliveryStored(TelemetryEvent, frozen=True):
    """A delivery was answered 200. It is in the inbox, or it already was (`duplicate`)."""

    level = logging.DEBUG
    message = "stored"

    id: int
    event: str
    subject: str | None
    duplicate: bool
    took_ms: float


class RequestRefused(TelemetryEvent, frozen=True):
    """A request was answered with a 4xx, or a 503 because its body couldn't be read."""

    level = logging.WARNING
    message = "refused"

    status: int
    code: RefusedFor
    reason: str
    hint: str


class Quarantined(TelemetryEvent, frozen=True):
    """Requests that no known key signed were quarantined."""

    level = logging.WARNING
    message = "quarantined requests with an unknown signature"

    count: int


class KeyEnded(TelemetryEvent, frozen=True):
    """A signing key in the settings is no longer accepted, because it was rotated."""

    level = logging.WARNING
    message = "a signing key in the settings is no longer accepted: set the webhook's current key"

    ended_at: str


class QuarantineReleased(TelemetryEvent, frozen=True):
    """A new key proved that quarantined requests are genuine. They are now in the inbox."""

    message = "a new key proved that quarantined requests are genuine"

    count: int


class NotStored(TelemetryEvent, frozen=True):
    """Deliveries couldn't be stored, and were answered 503."""

    level = logging.ERROR
    message = "not stored, answered 503"

    count: int
    problem: str


class DeliveriesLost(TelemetryEvent, frozen=True):
    """Verified deliveries were lost: the service stopped before they could be stored."""

    level = logging.ERROR
    message = "deliveries were lost: the service stopped before they could be stored"

    count: int
    hint: str = (
        "logto-webhooks recover restores them from Logto's log, if you configure Logto's API; "
        "a spool directory keeps them"
    )


class Retrying(TelemetryEvent, frozen=True):
    """The database can't store deliveries now. Storing is retried."""

    level = logging.WARNING
    message = "the database can't store deliveries, retrying"

    count: int
    problem: str


class StoredLate(TelemetryEvent, frozen=True):
    """Deliveries were stored after their request was over: it was answered 503, or cancelled."""

    level = logging.WARNING
    message = "stored late, after the request was over"

    count: int


class Spooled(TelemetryEvent, frozen=True):
    """The database didn't store deliveries in time. They are in the spool directory."""

    level = logging.WARNING
    message = "spooled, because the database didn't store them in time"

    count: int
    problem: str


class Unspooled(TelemetryEvent, frozen=True):
    """Deliveries were moved from the spool directory to the inbox."""

    message = "stored spooled deliveries"

    count: int


class NotUnspooled(TelemetryEvent, frozen=True):
    """A file in the spool directory can't be stored yet, or holds no delivery and was renamed."""

    level = logging.ERROR
    message = "a spooled delivery can't be stored"

    file: str
    problem: str


class DeliverySynced(TelemetryEvent, frozen=True):
    """A delivery was applied, `took_ms` after it was received.

    One that is `older_than_installation`, or arrived `later_than_replay_window`, runs no handlers.
    """

    message = "delivery"

    id: int
    event: str
    subject: str | None
    outcome: str
    took_ms: int
    odd_fields: tuple[str, ...] = ()
    older_than_installation: bool = False
    later_than_replay_window: bool = False


class DeliveryFailed(TelemetryEvent, frozen=True):
    """A delivery couldn't be applied. It is dead if `retry_in_s` is None."""

    level = logging.WARNING
    message = "delivery"

    id: int
    event: str
    subject: str | None
    error: str
    attempt: int
    retry_in_s: float | None


class NotOpened(TelemetryEvent, frozen=True):
    """The database can't be opened yet. Until then, deliveries are spooled."""

    level = logging.ERROR
    message = "the database can't be opened, deliveries are spooled"

    problem: str
    retry_in_s: float


class Opened(TelemetryEvent, frozen=True):
    """The database was opened after a failure."""

    message = "the database is open"


class Stalled(TelemetryEvent, frozen=True):
    """The worker can't continue now. It retries."""

    level = logging.ERROR
    message = "the worker can't continue now"

    problem: str
    retry_in_s: float


class Resumed(TelemetryEvent, frozen=True):
    """The worker continues after a stall."""

    message = "the worker continues"


class LogRecovered(TelemetryEvent, frozen=True):
    """Logto's log was compared with the inbox. `causes` says why deliveries failed."""

    message = "compared the inbox with Logto's log"

    entries: int
    recovered: int
    causes: str
    doubts: str


class Refetched(TelemetryEvent, frozen=True):
    """A record was refetched from Logto. `subject` is `kind:id`, and `why` has the reasons."""

    message = "refetched from Logto"

    subject: str
    why: tuple[str, ...]


class Reconciled(TelemetryEvent, frozen=True):
    """All records were compared with Logto. `fields` says which columns differed."""

    message = "compared all records with Logto"

    users: int
    organizations: int
    drifted: int
    fields: str
    doubts: str


class ApiUnavailable(TelemetryEvent, frozen=True):
    """A request to the Management API failed: each, or those about one `subject`. It is retried."""

    level = logging.ERROR
    message = "Logto's API can't be used"

    problem: str
    retry_in_s: float
    subject: str | None = None


class FlowStopped(TelemetryEvent, frozen=True):
    """No delivery arrived for `since_s`, or all were rejected. A usual gap is `usual_s`."""

    level = logging.ERROR
    message = "deliveries no longer arrive: find out why with logto-webhooks doctor"

    why: Why
    since_s: int
    usual_s: int | None


class FlowResumed(TelemetryEvent, frozen=True):
    """Deliveries arrive again, after `silent_s`."""

    message = "deliveries arrive again"

    silent_s: int


class HandlersKnown(TelemetryEvent, frozen=True):
    """The process registered its handlers. From now on, jobs are created for them."""

    message = "registered handlers"

    handlers: tuple[str, ...]


class HandlerRan(TelemetryEvent, frozen=True):
    """A handler finished a job, `took_ms` after it was called."""

    message = "a handler finished"

    job: int
    handler: str
    event: str
    subject: str
    attempt: int
    took_ms: float


class HandlerFailed(TelemetryEvent, frozen=True):
    """A handler failed. Its job is now waiting (`retry_in_s`), dead or discarded (`state`).

    `error` is the kind of the exception, `where` the line of the handler's code that raised it.
    """

    level = logging.WARNING
    message = "a handler failed"

    job: int
    handler: str
    event: str
    subject: str
    attempt: int
    error: str
    state: str
    retry_in_s: float | None
    where: str | None = None


class HandlerBlocks(TelemetryEvent, frozen=True):
    """A handler's coroutine has blocked its event loop for `blocked_s`.

    `stack` says where, the innermost line first.
    """

    level = logging.ERROR
    message = "a handler blocks its event loop: use await, or make it a plain function"

    handler: str
    blocked_s: float
    stack: str


class CoroutineAbandoned(TelemetryEvent, frozen=True):
    """A handler's coroutine continued after its cancellation, and was abandoned.

    `stack` says where it waits, the innermost line first.
    """

    level = logging.WARNING
    message = "a handler's coroutine was abandoned: it must not catch CancelledError"

    handler: str
    stack: str


class HandlerHeld(TelemetryEvent, frozen=True):
    """A handler no longer runs in this process, because too many of its calls were abandoned.

    `left` of them are of this handler, and `total` of all.
    """

    level = logging.ERROR
    message = "a handler is no longer called, because its calls don't end: fix it and restart"

    handler: str
    left: int
    total: int


class Unrunnable(TelemetryEvent, frozen=True):
    """Jobs wait for handlers whose code this process doesn't have."""

    level = logging.WARNING
    message = "jobs wait for unknown handlers: check --app"

    handlers: tuple[str, ...]
    jobs: int


class RowsNotWritten(TelemetryEvent, frozen=True):
    """Rows of a mapped table conflict, are owed or held (`state`), for a `reason`.

    Each reason is reported once, until no row has it.
    """

    level = logging.WARNING
    message = "rows of a mapped table aren't written: see logto-webhooks mapping check"

    mapping: str
    state: str
    reason: str
    count: int


class MembershipsDelayed(TelemetryEvent, frozen=True):
    """Memberships of a deleted or new `record` can't be ended or announced now.

    Something is locked or refused. They are tried again; those of others go on.
    """

    level = logging.WARNING
    message = "memberships can't be ended or announced now"

    record: str
    problem: str
    retry_in_s: float


class TablesNotMigrated(TelemetryEvent, frozen=True):
    """When the process started, a table or columns that a mapping needs didn't exist."""

    level = logging.WARNING
    message = "a mapped table or one of its columns doesn't exist: run your migrations"

    mapping: str
    problem: str


class ClockSetBack(TelemetryEvent, frozen=True):
    """The database's clock was set back by `seconds`. Waiting work was rescheduled."""

    level = logging.WARNING
    message = "the database's clock was set back"

    seconds: float


Observer = Callable[[TelemetryEvent], None]
