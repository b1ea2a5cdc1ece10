"""Logto's log of recent deliveries: what its entries mean."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final

from logto_webhooks import canonical_json
from logto_webhooks.deliveries import NewDelivery, ReceivedBody, identify
from logto_webhooks.errors import NotADelivery
from logto_webhooks.events.base import is_test
from logto_webhooks.signing_keys import trust

Json = dict[str, Any]

ATTEMPT_MS: Final = 15_000  # an attempt ends 10 s after it began at the latest
ANSWERED: Final = "answered 200, but not in the inbox"
# How a connection that was closed before the answer is told, by what closed it.
RESETS: Final = ("ECONNRESET", "other side closed", "UND_ERR_SOCKET", "socket hang up", "EPIPE")
# What Logto writes as an attempt's error -> why it failed; the first that is found counts.
_CAUSES: Final = (
    ("status code 5", "answered 5xx"),
    ("status code 401", "wrong signature"),
    ("status code 4", "answered 4xx"),
    ("timed out", "timed out"),
    ("ETIMEDOUT", "timed out"),
    ("UND_ERR_CONNECT_TIMEOUT", "timed out"),
    ("UND_ERR_HEADERS_TIMEOUT", "timed out"),
    ("UND_ERR_BODY_TIMEOUT", "timed out"),
    ("ECONNREFUSED", "refused"),
    *((sign, "connection reset") for sign in RESETS),
)


def _payload(entry: Any) -> Json:
    payload = entry.get("payload") if isinstance(entry, dict) else None
    return payload if isinstance(payload, dict) else {}


def parse_delivery(entry: Any, received_at: int, ahead: int = 0) -> NewDelivery | None:
    """Make a delivery of an entry; None if it holds no body that Logto could have sent."""
    request = _payload(entry).get("hookRequest")
    body = request.get("body") if isinstance(request, dict) else None
    try:
        return identify(trust(canonical_json.encode(body)), received_at, origin="log", ahead=ahead)
    except NotADelivery:
        return None


def failure_cause(entry: Any) -> str:
    """Say why an entry's attempt came to nothing, in a word."""
    payload = _payload(entry)
    if payload.get("result") == "Success":
        return ANSWERED
    text = str(payload.get("error", ""))
    return next((word for sign, word in _CAUSES if sign in text), "another error")


def is_cut(recent: Iterable[ReceivedBody], hook: str, since: int, oldest: int) -> bool:
    """Whether a hook's log, whose oldest entry since a moment is of `oldest`, lacks what came
    before that: deliveries that the inbox has."""
    return any(
        since <= delivery.occurred_at < oldest - ATTEMPT_MS and read_hook_id(delivery.body) == hook
        for delivery in recent
    )


def read_hook_id(body: bytes) -> str | None:
    """The hook that sent a body; None for a test, which isn't logged."""
    payload = canonical_json.decode(body)
    hook = payload.get("hookId")
    return hook if isinstance(hook, str) and not is_test(payload) else None


def leads_here(
    hook: Any, seen: Collection[str], keys: Collection[str], public_url: str | None
) -> bool:
    """Whether a hook is one of ours: by its key, by its accepted deliveries, or by its URL."""
    if not isinstance(hook, dict) or not isinstance(hook.get("id"), str):
        return False
    config = hook.get("config")
    url = config.get("url") if isinstance(config, dict) else None
    same_url = bool(public_url) and str(url).rstrip("/") == str(public_url).rstrip("/")
    key = hook.get("signingKey")
    has_our_key = isinstance(key, str) and key != "" and key in keys
    return has_our_key or hook["id"] in seen or same_url
