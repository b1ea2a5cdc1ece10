"""A delivery: what the inbox keeps of one call of Logto."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Final, Literal

from msgspec import Struct

from logto_webhooks.core import canonical
from logto_webhooks.core.events.base import Json, to_millis
from logto_webhooks.core.events.parsing import payload_of
from logto_webhooks.core.signature import VerifiedBody

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
    "TrustedDevice": ("trusted-device", "id"),
}


class Delivery(Struct, frozen=True, kw_only=True):
    """One delivery on its way into the inbox; times in milliseconds since the epoch.

    `digest` identifies it: 8 bytes of `createdAt`, and 16 of the SHA-256 of its canonical JSON
    without `hookId`, because Logto's log returns the same body with other bytes, and each hook
    sends its own copy. The time in front keeps an index on it in order.
    """

    body: bytes
    digest: bytes
    event: str
    subject: str | None
    occurred_at: int
    received_at: int
    origin: Origin = "webhook"


def identify(body: VerifiedBody, received_at: int, origin: Origin = "webhook") -> Delivery:
    """Make a delivery of a verified body. Raises NotADelivery."""
    payload = payload_of(body)
    occurred_at = _moment(payload.get("createdAt"))
    return Delivery(
        body=body.content,
        digest=_digest(payload, occurred_at or 0),
        event=_clean(payload["event"]),
        subject=_subject(payload),
        occurred_at=received_at if occurred_at is None else occurred_at,
        received_at=received_at,
        origin=origin,
    )


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
    if isinstance(data, dict) and (kind != "user" or no_part):
        candidates.append(data.get("id"))
    found = next((each for each in candidates if isinstance(each, str)), "")
    return f"{kind}:{found}" if _ID.fullmatch(found) else None


def _moment(text: object) -> int | None:
    try:
        return to_millis(datetime.fromisoformat(text)) if isinstance(text, str) else None
    except (ValueError, OverflowError):
        return None


def _clean(text: str) -> str:
    """PostgreSQL's text can't hold NUL; and a label needn't be endless."""
    return text.replace("\0", "")[:256]
