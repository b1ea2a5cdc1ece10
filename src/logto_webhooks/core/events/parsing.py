"""From a verified body to a typed event."""

from __future__ import annotations

from logto_webhooks.core import canonical
from logto_webhooks.core.events.base import (
    Event,
    Json,
    TestPayload,
    UnknownEvent,
    build,
    corrected,
    is_test,
)
from logto_webhooks.core.events.catalog import ALIASES, BY_NAME
from logto_webhooks.core.signature import VerifiedBody
from logto_webhooks.errors import NotADelivery


def parse(body: VerifiedBody, occurred_at: int | None = None) -> Event:
    """Parse a verified body. An event of an unknown name becomes an UnknownEvent.

    Values nested deeper than `canonical.SHOWN` levels are strings with their JSON. `occurred_at`
    (ms) is how the inbox dates it: it replaces a `createdAt` that can't be believed.

    Raises NotADelivery, or MalformedEvent when a field that the sync needs is odd.
    """
    payload = canonical.shown(payload_of(body))
    return from_payload(payload, None if occurred_at is None else corrected(payload, occurred_at))


def from_payload(payload: Json, at: int | None = None) -> Event:
    """Make the event of a payload that `payload_of` gave. Raises MalformedEvent."""
    if is_test(payload):
        return build(payload, TestPayload, at)
    name: str = payload["event"]
    return build(payload, BY_NAME.get(ALIASES.get(name, name), UnknownEvent), at)


def payload_of(body: VerifiedBody) -> Json:
    """Decode a verified body to a JSON object that names its event. Raises NotADelivery."""
    try:
        payload = canonical.decode(body.content)
    except ValueError as error:
        raise NotADelivery(problem=f"it isn't JSON ({_where(error)})") from None
    if not isinstance(payload, dict):
        raise NotADelivery(problem="it isn't a JSON object")
    if not isinstance(payload.get("event"), str) or not payload["event"]:
        raise NotADelivery(problem="it names no event")
    return payload


def _where(error: ValueError) -> str:
    # A UnicodeDecodeError's text shows bytes of the body.
    return "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
