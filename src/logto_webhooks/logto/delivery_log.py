"""Parse Logto's log of recent deliveries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from logto_webhooks import canonical_json
from logto_webhooks.deliveries import LARGE, NewDelivery, ReceivedBody, identify
from logto_webhooks.errors import NotADelivery
from logto_webhooks.events.base import get_from, is_test
from logto_webhooks.signing_keys import read_webhook_id, trust

ATTEMPT_MS: Final = 15_000  # more than an attempt takes, which is at most 10 s
ANSWERED: Final = "answered 200, but not in the inbox"
# What an error contains if the connection was closed before the answer.
RESETS: Final = ("ECONNRESET", "other side closed", "UND_ERR_SOCKET", "socket hang up", "EPIPE")
# What an attempt's error contains -> why it failed. The first match counts.
_CAUSES: Final = (
    ("status code 5", "answered 5xx"),
    ("status code 401", "wrong signature"),
    ("status code 4", "answered 4xx"),
    ("timed out", "timed out"),
    ("ETIMEDOUT", "timed out"),
    ("UND_ERR_CONNECT_TIMEOUT", "timed out"),
    ("UND_ERR_HEADERS_TIMEOUT", "timed out"),
    ("UND_ERR_BODY_TIMEOUT", "timed out"),
    ("ECONNREFUSED", "connection refused"),
    *((sign, "connection reset") for sign in RESETS),
)


def parse_delivery(entry: Any, received_at: int, ahead: int = 0) -> NewDelivery | None:
    """Make a delivery from an entry. Return None if it has no body that Logto could have sent."""
    body = get_from(get_from(get_from(entry, "payload"), "hookRequest"), "body")
    try:
        return identify(trust(canonical_json.encode(body)), received_at, origin="log", ahead=ahead)
    except NotADelivery:
        return None


def read_end(entry: Any) -> int | None:
    """Return when an entry's attempt ended (ms); None if the entry doesn't say."""
    ended_at = get_from(entry, "createdAt")
    is_number = isinstance(ended_at, int | float) and not isinstance(ended_at, bool)
    return int(ended_at) if is_number else None


def failure_cause(entry: Any) -> str:
    """Say in a few words why an entry's attempt failed."""
    payload = get_from(entry, "payload")
    if get_from(payload, "result") == "Success":
        return ANSWERED
    text = str(get_from(payload, "error"))
    return next((word for sign, word in _CAUSES if sign in text), "another error")


def is_cut(recent: Iterable[ReceivedBody], webhook_id: str, since: int, oldest: int) -> bool:
    """Whether a webhook's log, whose first entry since `since` is from `oldest`, lacks earlier
    deliveries that the inbox has."""
    return any(
        since <= each.occurred_at < oldest - ATTEMPT_MS and find_sender(each.body) == webhook_id
        for each in recent
    )


def find_sender(body: bytes) -> str | None:
    """Return the ID of the webhook that sent a body; None for a test, which isn't logged."""
    webhook_id = read_webhook_id(body)
    # A test is small, so a large body needn't be decoded as a whole.
    if webhook_id is None or len(body) >= LARGE:
        return webhook_id
    return None if is_test(canonical_json.decode(body)) else webhook_id
