"""Telemetry events: everything that is logged or counted, in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from msgspec import Struct

from logto_webhooks.flow import Why

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
    """A delivery is in the inbox (or was already), and 200 is the answer."""

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
    """Requests that no key signed are kept, in case that a key proves them."""

    count: int


class QuarantineReleased(Struct, frozen=True):
    """What was set aside was proved by a key that was learnt, and is in the inbox."""

    count: int


class NotStored(Struct, frozen=True):
    """Deliveries couldn't be stored: 503."""

    count: int
    problem: str


class Retrying(Struct, frozen=True):
    """The database doesn't take deliveries for now; they are tried again."""

    count: int
    problem: str


class Spooled(Struct, frozen=True):
    """The database didn't take deliveries in time; they are in the spool directory: 200."""

    count: int
    problem: str


class Unspooled(Struct, frozen=True):
    """Deliveries of the spool directory are in the inbox."""

    count: int


class NotUnspooled(Struct, frozen=True):
    """A file of the spool directory can't be stored; it stays there under another name."""

    file: str
    problem: str


class DeliverySynced(Struct, frozen=True):
    """A delivery was applied; `took_ms` since it was received.

    One that is `older_than_installation`, or came `later_than_replay_window`, runs no handlers.
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
    """A delivery couldn't be applied; it is dead when `retry_in_s` is None."""

    id: int
    event: str
    subject: str | None
    error: str
    attempt: int
    retry_in_s: float | None


class Stalled(Struct, frozen=True):
    """The worker can't go on for now, and tries again."""

    problem: str
    retry_in_s: float


class Resumed(Struct, frozen=True):
    """The worker goes on after a stall."""


class LogRecovered(Struct, frozen=True):
    """Logto's log was compared with the inbox; `causes` says why what it lacked had failed."""

    entries: int
    recovered: int
    causes: str
    doubts: str


class Refetched(Struct, frozen=True):
    """Logto was asked about a subject, as `kind:id`; `why` it had to be."""

    subject: str
    why: tuple[str, ...]


class Reconciled(Struct, frozen=True):
    """All records were compared with Logto's own; `fields` says which columns differed."""

    users: int
    organizations: int
    drifted: int
    fields: str
    doubts: str


class ApiUnavailable(Struct, frozen=True):
    """Logto's API can't be asked now; it is asked again."""

    problem: str
    retry_in_s: float


class FlowStopped(Struct, frozen=True):
    """Nothing has come for `since_s`, or all was rejected (`why`); `usual_s` is a usual gap."""

    why: Why
    since_s: int
    usual_s: int | None


class FlowResumed(Struct, frozen=True):
    """Deliveries come again, after `silent_s`."""

    silent_s: int


class HandlersKnown(Struct, frozen=True):
    """From now on jobs are made for these handlers, which this process has."""

    handlers: tuple[str, ...]


class HandlerRan(Struct, frozen=True):
    """A handler did a job; `took_ms` since it was called."""

    job: int
    handler: str
    event: str
    subject: str
    attempt: int
    took_ms: float


class HandlerFailed(Struct, frozen=True):
    """A handler raised; `state` is what its job is now: waiting (`retry_in_s`), dead, discarded.

    `error` is the name of what it raised, `where` the line of its code that did.
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
    """A handler's coroutine has blocked its event loop for `blocked_s`; `stack` says where it is,
    the innermost line first."""

    handler: str
    blocked_s: float
    stack: str


class HandlerHeld(Struct, frozen=True):
    """No call of a handler starts in this process: too many threads were left behind, `left` of
    them by this handler, `total` by all."""

    handler: str
    left: int
    total: int


class Unrunnable(Struct, frozen=True):
    """Jobs of these handlers wait, and nobody here has their code."""

    handlers: tuple[str, ...]
    jobs: int


class ClockSetBack(Struct, frozen=True):
    """The database's clock was set back by so many seconds; what waits is due so much sooner."""

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
