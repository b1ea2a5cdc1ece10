"""Recorded histories: what a real Logto 1.42 sent during some life, and what it said at the end.

Everybody in them is made up, and so are the keys.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, Literal

import msgspec
from msgspec import Struct

from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.signing_keys import HEADER

Name = Literal["people", "calm", "race", "lossy"]
NAMES: tuple[Name, ...] = ("people", "calm", "race", "lossy")
Json = dict[str, Any]


class Final(Struct, frozen=True):
    """What Logto's API said at the end; `members` by organization."""

    users: list[Json]
    deleted_users: list[str]
    organizations: list[Json]
    deleted_organizations: list[str]
    members: dict[str, list[Json]]


class History(Struct, frozen=True):
    """Deliveries in their order of arrival, with the key that signed them."""

    signing_key: str
    deliveries: list[SignedRequest]
    final: Final


class _Recorded(Struct):
    headers: list[tuple[str, str]]
    body: str


class _Event(Struct):
    event: str


class _Hook(Struct, rename="camel"):
    signing_key: str


def load(name: Name) -> History:
    """Load a history: people (217 deliveries), calm (414), race (765) or lossy (588)."""
    folder = resources.files(__package__) / "histories" / name
    lines = (folder / "deliveries.jsonl").read_bytes().splitlines()
    return History(
        signing_key=msgspec.json.decode(
            (folder / "hook.json").read_bytes(), type=_Hook
        ).signing_key,
        deliveries=[_signed(msgspec.json.decode(line, type=_Recorded)) for line in lines],
        final=msgspec.json.decode((folder / "final.json").read_bytes(), type=Final),
    )


def _signed(recorded: _Recorded) -> SignedRequest:
    body = recorded.body.encode()
    kept = (HEADER, "user-agent", "content-type")
    headers = [(name, value) for name, value in recorded.headers if name in kept]
    return SignedRequest(msgspec.json.decode(body, type=_Event).event, body, headers)
