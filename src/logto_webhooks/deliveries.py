"""Deliveries: how they are identified, and their form in each stage of the inbox."""

from __future__ import annotations

import re
from enum import StrEnum
from statistics import median_high, median_low
from typing import Any, Final, Literal, TypeVar

from msgspec import Struct

from logto_webhooks import canonical_json
from logto_webhooks.errors import NotADelivery
from logto_webhooks.events import (
    OrganizationDeleted,
    OrganizationMembershipUpdated,
    OrganizationUserAdded,
    OrganizationUserRemoved,
    UserDeleted,
    payload_of,
)
from logto_webhooks.events.base import Json, has_whole_record, sent_at
from logto_webhooks.events.users import WHOLE_USER_ROUTES
from logto_webhooks.signing_keys import VerifiedBody, trust

T = TypeVar("T")
SAMPLE_WEBHOOK: Final = "sample"  # prefix of the webhook ID in samples
LARGE: Final = 16 * 2**10  # from this size on, bodies aren't parsed on the loop that answers
FUTURE_MS: Final = 300_000  # how far a `createdAt` may be after the receipt
_ID = re.compile(r"[^\0:]{1,256}")
Origin = Literal["webhook", "log", "replay"]

# First part of an event's name -> the kind of its subject, and the parameter with its id.
_SUBJECTS: Final = {
    "User": ("user", "userId"),
    "Organization": ("organization", "id"),
    "Role": ("role", "id"),
    "Scope": ("scope", "scopeId"),
    "OrganizationRole": ("organization-role", "id"),
    "OrganizationScope": ("organization-scope", "id"),
    "TrustedDevice": ("user", "userId"),
}


class DeliveryState(StrEnum):
    """The state of a delivery."""

    PENDING = "pending"  # to be applied, now or at `due_at`
    DONE = "done"
    IGNORED = "ignored"  # a test payload, which changes nothing
    DEAD = "dead"  # not applied and not retried; its record is doubtful


class NewDelivery(Struct, frozen=True, kw_only=True):
    """A delivery to be stored in the inbox. Times are in milliseconds since the epoch.

    `digest` identifies it: 8 bytes of `createdAt`, and 16 of the SHA-256 of its canonical JSON
    without `hookId`, because Logto's log returns the same body with other bytes, and each webhook
    sends its own copy. The time comes first so that an index grows at its end. `occurred_at`
    differs from `createdAt` only if that is implausible.
    """

    body: bytes
    digest: bytes
    event: str
    subject: str | None
    occurred_at: int
    received_at: int
    origin: Origin = "webhook"


def identify(
    body: VerifiedBody, received_at: int, origin: Origin = "webhook", ahead: int = 0
) -> NewDelivery:
    """Make a delivery of a verified body. `ahead` (ms) is how far Logto's clock is ahead of the one
    that `received_at` was read from.

    A `createdAt` is replaced by the time of receipt if it is more than `FUTURE_MS` after that,
    missing, not a date, or before 1970. Raises NotADelivery.
    """
    payload = payload_of(body)
    occurred_at = sent_at(payload)
    receipt = received_at + ahead
    fields = {name: value for name, value in payload.items() if name != "hookId"}
    is_plausible = occurred_at is not None and 0 <= occurred_at <= receipt + FUTURE_MS
    return NewDelivery(
        body=body.content,
        digest=max(occurred_at or 0, 0).to_bytes(8, "big") + canonical_json.digest(fields)[:16],
        # PostgreSQL's text can't contain NUL, and a name needn't be longer.
        event=payload["event"].replace("\0", "")[:256],
        subject=_name_subject(payload),
        occurred_at=occurred_at if occurred_at is not None and is_plausible else receipt,
        received_at=received_at,
        origin=origin,
    )


def sent_at_of(digest: bytes) -> int:
    """Return a delivery's `createdAt` (ms); 0 if it isn't a date."""
    return int.from_bytes(digest[:8])


def _name_subject(payload: Json) -> str | None:
    """Return the record that a delivery is about, as `kind:id`."""
    entity = payload["event"].partition(".")[0]
    params, data = payload.get("params"), payload.get("data")
    kind, param = _SUBJECTS.get(entity, ("user", "userId"))
    candidates: list[Any] = [payload.get("organizationId")] if kind == "organization" else []
    candidates += [params.get(param)] if isinstance(params, dict) else []
    candidates += [payload.get("userId")] if kind == "user" else []
    if isinstance(data, dict) and entity == "TrustedDevice":
        candidates.insert(0, data.get("userId"))
    elif isinstance(data, dict) and (
        kind != "user" or has_whole_record(payload, WHOLE_USER_ROUTES)
    ):
        candidates.append(data.get("id"))
    logto_id = next((candidate for candidate in candidates if isinstance(candidate, str)), "")
    return f"{kind}:{logto_id}" if _ID.fullmatch(logto_id) else None


# These change a user's memberships, but their subject is the organization.
MEMBERSHIP_EVENTS: Final = tuple(
    event.name
    for event in (OrganizationMembershipUpdated, OrganizationUserAdded, OrganizationUserRemoved)
)
DELETIONS: Final = (UserDeleted.name, OrganizationDeleted.name)


class StoreResult(Struct, frozen=True):
    """A delivery's id in the inbox; a duplicate has the id of the first copy."""

    id: int
    duplicate: bool


class ClaimedDelivery(Struct, frozen=True, kw_only=True):
    """A delivery that a worker has claimed. `attempt` includes this one. `failures` counts earlier
    attempts that failed, except those that timed out."""

    id: int
    body: bytes
    event: str
    subject: str | None
    received_at: int
    attempt: int
    failures: int = 0
    digest: bytes = b""
    occurred_at: int = 0
    origin: str = "webhook"


class ReceivedBody(Struct, frozen=True):
    """A delivery as received; times in milliseconds, `occurred_at` on Logto's clock."""

    body: bytes
    occurred_at: int
    received_at: int


class DeliveryOutcome(Struct, frozen=True, kw_only=True):
    """The outcome of a claimed delivery. `retry_after_s` is set only if it is pending again.
    `failed` is whether the attempt counts as a failure; a time-out doesn't. If it was `released`,
    there was no attempt."""

    id: int
    state: DeliveryState
    result: str | None = None
    error: str | None = None
    retry_after_s: float = 0
    failed: bool = False
    released: bool = False


class StoredDelivery(Struct, frozen=True, kw_only=True):
    """A delivery in the inbox, with its state. Times are in milliseconds since the epoch.

    `result` is the outcome of the sync, or None before it. `error` is the last error.
    """

    id: int
    event: str
    subject: str | None
    occurred_at: int
    received_at: int
    origin: Origin
    state: DeliveryState
    result: str | None
    attempts: int
    error: str | None
    body: bytes

    @property
    def call(self) -> str:
        """The call to Logto's API, or the interaction, that caused the delivery. "" if Logto
        doesn't say, as with the account API."""
        return api_call(self.body)


def api_call(body: bytes) -> str:
    """Return the API call or the interaction that caused a delivery; "" if the body has none."""
    try:
        payload = payload_of(trust(body))
    except NotADelivery:
        return ""
    method, route = payload.get("method"), payload.get("matchedRoute")
    if isinstance(method, str) and isinstance(route, str):
        return f"{method} {route}"
    interaction = payload.get("interactionEvent")
    return interaction if isinstance(interaction, str) else ""


class DeliveryFilter(Struct, frozen=True, kw_only=True):
    """Which deliveries to list. All conditions must match.

    `subject` is `kind:id`. `origin` is `webhook`, `log` (Logto's log) or `replay` (a dead one that
    was replayed). `since` and `until` (exclusive) limit the time of receipt, in milliseconds.
    `text` is a literal part of the body. The list is newest first, or `oldest_first`, and continues
    `after` an id.
    """

    event: str | None = None
    state: DeliveryState | None = None
    subject: str | None = None
    origin: Origin | None = None
    since: int | None = None
    until: int | None = None
    text: str | None = None
    after: int | None = None
    oldest_first: bool = False
    limit: int = 20


class MappingStatus(Struct, frozen=True, kw_only=True):
    """How many records of a mapping have no correct row, by state, and whether it was applied to
    all records. `excluded` are users or organizations that get no row, because of `where` or
    `create=False`."""

    mapping: str
    is_applied: bool = True
    waiting: int = 0
    conflict: int = 0
    owed: int = 0
    held: int = 0
    excluded: int = 0


class Status(Struct, frozen=True, kw_only=True):
    """Counts of deliveries, records and jobs. `oldest_pending_s` is None if nothing is pending.

    `recovered` counts deliveries from Logto's log, which was last read at `complete_up_to` (ms).
    All records were last compared with Logto at `reconciled_at` (ms). Since `silent_since` (ms), no
    deliveries have arrived, or all were rejected; it is None while they arrive as usual.
    `memberships_to_end` counts memberships of deleted users and organizations that are still
    listed. `jobs` are counted by state, `unrunnable` are jobs of unregistered handlers, and
    `spooled` are deliveries in the spool directory. `mappings` are those of your own tables.
    """

    deliveries: dict[str, int]
    doubtful: int
    refetch: int
    oldest_pending_s: float | None
    recovered: int = 0
    complete_up_to: int | None = None
    reconciled_at: int | None = None
    silent_since: int | None = None
    memberships_to_end: int = 0
    jobs: dict[str, int] = {}
    unrunnable: dict[str, int] = {}
    spooled: int = 0
    mappings: list[MappingStatus] = []


class Dated(Struct, frozen=True):
    """A delivery's times, in milliseconds since the epoch: Logto's date, the inbox's (which differs
    if Logto's is implausible), and the receipt."""

    created_at: int
    occurred_at: int
    received_at: int
    origin: str = "webhook"

    @property
    def believed(self) -> bool:
        """Whether the inbox uses Logto's date."""
        return self.created_at == self.occurred_at


class Clocks(Struct, frozen=True):
    """The database's clock, and the times of the newest deliveries."""

    now: int
    recent: list[Dated]


RECENT: Final = 50  # deliveries used to estimate the difference of the clocks


def estimate_ahead(ours: int, clocks: Clocks) -> int:
    """Estimate how far Logto's clock is ahead of ours (ms), to judge a new delivery's date.

    It is the difference to the database's clock, plus the median of how far recent deliveries are
    dated ahead of that. A single delivery can't shift the median. Dates in the past don't count:
    usually, those deliveries were delayed or sent again.
    """
    database = clocks.now - ours
    offsets = [
        delivery.created_at - delivery.received_at - database
        for delivery in clocks.recent
        if delivery.origin == "webhook"
    ]
    return database + max(0, median_low([0, *offsets]))


def typical_delay(clocks: Clocks) -> int | None:
    """Return how far the receivers' clock is ahead of recent deliveries' dates (ms), None without
    any: by how much the clocks differ, and what a delivery takes.

    It is the median, which a few odd ones don't shift. What Logto's log brought back came late.
    """
    delays = [
        delivery.received_at - delivery.occurred_at
        for delivery in clocks.recent
        if delivery.origin == "webhook" and delivery.believed
    ]
    return median_high(delays) if delays else None
