"""A delivery: what the inbox keeps of one call of Logto."""

from __future__ import annotations

import re
from typing import Any, Final, Literal

from msgspec import Struct

from logto_webhooks.core import canonical
from logto_webhooks.core.events.base import Json, sent_at
from logto_webhooks.core.events.parsing import payload_of
from logto_webhooks.core.signature import VerifiedBody

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


class Delivery(Struct, frozen=True, kw_only=True):
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
) -> Delivery:
    """Make a delivery of a verified body. `ahead` is how far Logto's clock is known to be ahead of
    the one that told `received_at` (ms).

    A `createdAt` that can't be believed is replaced by the receipt: one of more than `FUTURE_MS`
    after it, or of no moment that a database holds. Raises NotADelivery.
    """
    payload = payload_of(body)
    occurred_at = sent_at(payload)
    receipt = received_at + ahead
    believed = occurred_at is not None and 0 <= occurred_at <= receipt + FUTURE_MS
    return Delivery(
        body=body.content,
        digest=_digest(payload, occurred_at or 0),
        event=_clean(payload["event"]),
        subject=_subject(payload),
        occurred_at=occurred_at if occurred_at is not None and believed else receipt,
        received_at=received_at,
        origin=origin,
    )


def sent_at_of(digest: bytes) -> int:
    """When Logto says that it sent a delivery (ms); 0 if it names no moment."""
    return int.from_bytes(digest[:8])


def _digest(payload: Json, occurred_at: int) -> bytes:
    known = canonical.digest({k: v for k, v in payload.items() if k != "hookId"})
    return max(occurred_at, 0).to_bytes(8, "big") + known[:16]


def _subject(payload: Json) -> str | None:
    """Say whom a delivery is about, as `kind:id`: for people, and to mark who is in doubt."""
    entity = payload["event"].partition(".")[0]
    params, data = payload.get("params"), payload.get("data")
    kind, param = _SUBJECTS.get(entity, ("user", "userId"))
    candidates: list[Any] = [payload.get("organizationId")] if kind == "organization" else []
    candidates += [params.get(param)] if isinstance(params, dict) else []
    candidates += [payload.get("userId")] if kind == "user" else []
    no_part = payload.get("matchedRoute") in (None, "/users")
    if isinstance(data, dict) and entity == "TrustedDevice":
        candidates.insert(0, data.get("userId"))
    elif isinstance(data, dict) and (kind != "user" or no_part):
        candidates.append(data.get("id"))
    found = next((each for each in candidates if isinstance(each, str)), "")
    return f"{kind}:{found}" if _ID.fullmatch(found) else None


def _clean(text: str) -> str:
    """PostgreSQL's text can't hold NUL; and a label needn't be endless."""
    return text.replace("\0", "")[:256]
