"""Telemetry events: everything that is logged or counted, in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

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


class DeliveryStored(Struct, frozen=True):
    """A delivery was answered 200. It is in the inbox, or it already was (`duplicate`)."""

    id: int
    event: str
    subject: str | None
    duplicate: bool
    took_ms: float


class RequestRefused(Struct, frozen=True):
    """A request was answered with a 4xx, or a 503 because its body couldn't be read."""

    status: int
    code: RefusedFor
    reason: str
    hint: str


class Quarantined(Struct, frozen=True):
    """Requests that no known key signed were quarantined."""

    count: int


class QuarantineReleased(Struct, frozen=True):
    """A new key proved that quarantined requests are genuine. They are now in the inbox."""

    count: int


class NotStored(Struct, frozen=True):
    """Deliveries couldn't be stored, and were answered 503."""

    count: int
    problem: str


class Retrying(Struct, frozen=True):
    """The database can't store deliveries now. Storing is retried."""

    count: int
    problem: str


class Spooled(Struct, frozen=True):
    """The database didn't store deliveries in time. They are in the spool directory."""

    count: int
    problem: str


class Unspooled(Struct, frozen=True):
    """Deliveries were moved from the spool directory to the inbox."""

    count: int


class NotUnspooled(Struct, frozen=True):
    """A file in the spool directory can't be stored. It was renamed."""

    file: str
    problem: str


class DeliverySynced(Struct, frozen=True):
    """A delivery was applied, `took_ms` after it was received.

    One that is `older_than_installation`, or arrived `later_than_replay_window`, runs no handlers.
    """

    id: int
    event: str
    subject: str | None
    outcome: str
    took_ms: int
    odd_fields: tuple[str, ...] = ()
    older_than_installation: bool = False
    later_than_replay_window: bool = False


class DeliveryFailed(Struct, frozen=True):
    """A delivery couldn't be applied. It is dead if `retry_in_s` is None."""

    id: int
    event: str
    subject: str | None
    error: str
    attempt: int
    retry_in_s: float | None


class Stalled(Struct, frozen=True):
    """The worker can't continue now. It retries."""

    problem: str
    retry_in_s: float


class Resumed(Struct, frozen=True):
    """The worker continues after a stall."""


class LogRecovered(Struct, frozen=True):
    """Logto's log was compared with the inbox. `causes` says why deliveries failed."""

    entries: int
    recovered: int
    causes: str
    doubts: str


class Refetched(Struct, frozen=True):
    """A record was refetched from Logto. `subject` is `kind:id`, and `why` has the reasons."""

    subject: str
    why: tuple[str, ...]


class Reconciled(Struct, frozen=True):
    """All records were compared with Logto. `fields` says which columns differed."""

    users: int
    organizations: int
    drifted: int
    fields: str
    doubts: str


class ApiUnavailable(Struct, frozen=True):
    """The Management API can't be reached now. The call is retried."""

    problem: str
    retry_in_s: float


class FlowStopped(Struct, frozen=True):
    """No delivery arrived for `since_s`, or all were rejected. A usual gap is `usual_s`."""

    why: Why
    since_s: int
    usual_s: int | None


class FlowResumed(Struct, frozen=True):
    """Deliveries arrive again, after `silent_s`."""

    silent_s: int


class HandlersKnown(Struct, frozen=True):
    """The process registered its handlers. From now on, jobs are created for them."""

    handlers: tuple[str, ...]


class HandlerRan(Struct, frozen=True):
    """A handler finished a job, `took_ms` after it was called."""

    job: int
    handler: str
    event: str
    subject: str
    attempt: int
    took_ms: float


class HandlerFailed(Struct, frozen=True):
    """A handler failed. Its job is now waiting (`retry_in_s`), dead or discarded (`state`).

    `error` is the kind of the exception, `where` the line of the handler's code that raised it.
    """

    job: int
    handler: str
    event: str
    subject: str
    attempt: int
    error: str
    state: str
    retry_in_s: float | None
    where: str | None = None


class HandlerBlocks(Struct, frozen=True):
    """A handler's coroutine has blocked its event loop for `blocked_s`.

    `stack` says where, the innermost line first.
    """

    handler: str
    blocked_s: float
    stack: str


class HandlerHeld(Struct, frozen=True):
    """A handler no longer runs in this process, because it has too many abandoned threads.

    `left` of them are of this handler, and `total` of all.
    """

    handler: str
    left: int
    total: int


class Unrunnable(Struct, frozen=True):
    """Jobs wait for handlers whose code this process doesn't have."""

    handlers: tuple[str, ...]
    jobs: int


class ClockSetBack(Struct, frozen=True):
    """The database's clock was set back by `seconds`. Waiting work was rescheduled."""

    seconds: float


TelemetryEvent = (
    DeliveryStored
    | RequestRefused
    | Quarantined
    | QuarantineReleased
    | NotStored
    | Retrying
    | Spooled
    | Unspooled
    | NotUnspooled
    | DeliverySynced
    | DeliveryFailed
    | Stalled
    | Resumed
    | LogRecovered
    | Refetched
    | Reconciled
    | ApiUnavailable
    | FlowStopped
    | FlowResumed
    | HandlersKnown
    | HandlerRan
    | HandlerFailed
    | HandlerBlocks
    | HandlerHeld
    | Unrunnable
    | ClockSetBack
)

Observer = Callable[[TelemetryEvent], None]
