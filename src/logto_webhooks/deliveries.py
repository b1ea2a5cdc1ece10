"""Deliveries: how they are identified, and their form in each stage of the inbox."""

from __future__ import annotations

import re
from enum import StrEnum
from statistics import median_low
from typing import Any, Final, Literal

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

SAMPLE_WEBHOOK: Final = (
    "sample"  # how the id of the webhook begins from which a sample claims to be
)
LARGE: Final = 16 * 2**10  # from this size on, a body isn't parsed on an event loop that answers
FUTURE_MS: Final = 300_000  # so far ahead of its receipt a `createdAt` may be
_ID = re.compile(r"[^\0:]{1,256}")
Origin = Literal["webhook", "log", "replay"]

# The first word of an event's name -> the kind of its subject, and the parameter with its id.
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
    IGNORED = "ignored"  # a test payload: it touches nothing
    DEAD = "dead"  # given up; its record is doubtful


class NewDelivery(Struct, frozen=True, kw_only=True):
    """One delivery on its way into the inbox; times in milliseconds since the epoch.

    `digest` identifies it: 8 bytes of `createdAt`, and 16 of the SHA-256 of its canonical JSON
    without `hookId`, because Logto's log returns the same body with other bytes, and each hook
    sends its own copy. The time in front keeps an index on it in order; `occurred_at` is another
    one only where that `createdAt` can't be believed.
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
    """Make a delivery of a verified body. `ahead` is how far Logto's clock is known to be ahead of
    the one that told `received_at` (ms).

    A `createdAt` that can't be believed is replaced by the receipt: one of more than `FUTURE_MS`
    after it, or of no moment that a database holds. Raises NotADelivery.
    """
    payload = payload_of(body)
    occurred_at = sent_at(payload)
    receipt = received_at + ahead
    fields = {name: value for name, value in payload.items() if name != "hookId"}
    believed = occurred_at is not None and 0 <= occurred_at <= receipt + FUTURE_MS
    return NewDelivery(
        body=body.content,
        digest=max(occurred_at or 0, 0).to_bytes(8, "big") + canonical_json.digest(fields)[:16],
        # PostgreSQL's text can't hold NUL; and a label needn't be endless.
        event=payload["event"].replace("\0", "")[:256],
        subject=_name_subject(payload),
        occurred_at=occurred_at if occurred_at is not None and believed else receipt,
        received_at=received_at,
        origin=origin,
    )


def sent_at_of(digest: bytes) -> int:
    """When Logto says that it sent a delivery (ms); 0 if it names no moment."""
    return int.from_bytes(digest[:8])


def _name_subject(payload: Json) -> str | None:
    """Name the record that a delivery is about, as `kind:id`."""
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


# What tells of a user's memberships has an organization as its subject.
MEMBERSHIP_EVENTS: Final = tuple(
    event.name
    for event in (OrganizationMembershipUpdated, OrganizationUserAdded, OrganizationUserRemoved)
)
DELETIONS: Final = (UserDeleted.name, OrganizationDeleted.name)


class StoreResult(Struct, frozen=True):
    """Where a delivery stands in the inbox; a duplicate has the id of the first."""

    id: int
    duplicate: bool


class ClaimedDelivery(Struct, frozen=True, kw_only=True):
    """A delivery that a worker holds; `attempt` counts this one, `failures` those before that
    failed for a reason that isn't a lock."""

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
    """The outcome of a claimed delivery; `retry_after_s` only when it is pending again. It
    `failed` if that says something against the delivery."""

    id: int
    state: DeliveryState
    result: str | None = None
    error: str | None = None
    retry_after_s: float = 0
    failed: bool = False


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
    """Return the API call or the interaction that a body names."""
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

    `subject` is `kind:id`. `origin` is `webhook` or `log` (Logto's log). `since` and `until`
    (exclusive) limit the time of receipt, in milliseconds. `text` is a literal part of the body.
    The list is newest first, or `oldest_first`, and continues `after` an id.
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


class Status(Struct, frozen=True, kw_only=True):
    """Counts of deliveries, records and jobs. `oldest_pending_s` is None if nothing is pending.

    `recovered` counts deliveries from Logto's log, which was last read at `complete_up_to` (ms).
    All records were last compared with Logto at `reconciled_at` (ms). Since `silent_since` (ms), no
    deliveries have arrived, or all were rejected; it is None while they arrive as usual.
    `memberships_to_end` counts memberships of deleted users and organizations that are still
    listed. `jobs` are counted by state, `unrunnable` are jobs of unregistered handlers, and
    `spooled` are deliveries in the spool directory.
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


class Dated(Struct, frozen=True):
    """How one delivery is dated, in milliseconds since the epoch: by Logto, by the inbox (another
    date where Logto's can't be believed), and when it was received."""

    created_at: int
    occurred_at: int
    received_at: int
    origin: str = "webhook"

    @property
    def believed(self) -> bool:
        """Whether the inbox took Logto's own date."""
        return self.created_at == self.occurred_at


class Clocks(Struct, frozen=True):
    """The database's clock, and how the newest deliveries are dated."""

    now: int
    recent: list[Dated]


RECENT: Final = 50  # deliveries that tell how far apart the clocks are


def estimate_ahead(ours: int, clocks: Clocks) -> int:
    """Return how far Logto's clock is ahead of ours (ms), by which a new delivery is judged.

    It is the distance to the database's clock, plus the median of how far recent deliveries are
    dated ahead of that. One delivery alone doesn't shift the median. Dates in the past don't
    count: most often they are of deliveries that were held up or sent again.
    """
    database = clocks.now - ours
    offsets = [
        delivery.created_at - delivery.received_at - database
        for delivery in clocks.recent
        if delivery.origin == "webhook"
    ]
    return database + max(0, median_low([0, *offsets]))
