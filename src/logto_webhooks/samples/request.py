"""A delivery as Logto sends it: headers and body, signed."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from logto_webhooks.signing_keys import HEADER, sign


class SignedRequest(Struct, frozen=True):
    """A signed request. `event` is the event's name. A slow network sends the body in `pieces`."""

    event: str
    body: bytes
    headers: list[tuple[str, str]]
    pieces: int = 1


def sign_request(payload: dict[str, Any], key: str) -> SignedRequest:
    """Sign a payload with a hook's key."""
    body = msgspec.json.encode(payload)
    return SignedRequest(payload["event"], body, make_headers(body, key))


def make_headers(body: bytes, key: str) -> list[tuple[str, str]]:
    """The headers with which Logto would send a body."""
    return [
        (HEADER, sign(body, key)),
        ("user-agent", "Logto (https://logto.io/)"),
        ("content-type", "application/json"),
    ]
