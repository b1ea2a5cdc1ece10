"""Recorded histories: what a real Logto 1.42 sent, its state at the end, and how ours differs.

All people and keys in them are fictitious.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from typing import Any, Final, Literal, get_args

import msgspec
from msgspec import Struct

from logto_webhooks import canonical_json
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.records.record import Key, Kind, membership
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.samples.shapes import Json
from logto_webhooks.signing_keys import HEADER

Name = Literal["people", "calm", "race", "lossy"]
NAMES: Final[tuple[Name, ...]] = get_args(Name)


class FinalState(Struct, frozen=True):
    """Logto's state at the end, from its API. `members` are by organization."""

    users: list[Json]
    deleted_users: list[str]
    organizations: list[Json]
    deleted_organizations: list[str]
    members: dict[str, list[Json]]


class History(Struct, frozen=True):
    """Deliveries in their order of arrival, and the key that signed them."""

    signing_key: str
    deliveries: list[SignedRequest]
    final: FinalState


class Recorded(Struct):
    """A recorded delivery: the request, when it arrived (ms), and the status of the response."""

    headers: list[tuple[str, str]]
    body: str
    received_at: int
    answered: int

    def to_request(self) -> SignedRequest:
        """Make the request, with the relevant headers."""
        kept = (HEADER, "user-agent", "content-type")
        headers = [(name, value) for name, value in self.headers if name in kept]
        event = msgspec.json.decode(self.body)["event"]
        return SignedRequest(event, self.body.encode(), headers)


def load(name: Name) -> History:
    """Load a history: people (217 deliveries), calm (414), race (765) or lossy (588)."""
    webhook, deliveries, final = read(name)
    requests = [delivery.to_request() for delivery in deliveries]
    return History(signing_key=webhook["signingKey"], deliveries=requests, final=final)


def read(name: Name) -> tuple[Json, list[Recorded], FinalState]:
    """Read the files of a history: the webhook, its deliveries, and Logto's state at the end."""
    folder = resources.files(__package__) / "histories" / name
    lines = (folder / "deliveries.jsonl").read_bytes().splitlines()
    return (
        msgspec.json.decode((folder / "webhook.json").read_bytes(), type=Json),
        [msgspec.json.decode(line, type=Recorded) for line in lines],
        msgspec.json.decode((folder / "final.json").read_bytes(), type=FinalState),
    )


class FieldDifference(Struct, frozen=True):
    """A difference in one field of a record, or in its existence. Values are text."""

    key: Key
    field: str
    ours: str
    logto: str
    doubtful: bool


_USER_FIELDS = {
    "username": "username",
    "email": "primaryEmail",
    "phone": "primaryPhone",
    "name": "name",
    "avatar": "avatar",
    "identities": "identities",
    "profile": "profile",
    "custom_data": "customData",
    "is_suspended": "isSuspended",
    "last_sign_in_at": "lastSignInAt",
    "created_at": "createdAt",
}
_ORGANIZATION_FIELDS = {
    "name": "name",
    "description": "description",
    "custom_data": "customData",
    "created_at": "createdAt",
}


def differences(
    final: FinalState,
    users: list[FoundRow],
    organizations: list[FoundRow],
    waiting: list[RefetchNeed],
) -> list[FieldDifference]:
    """List all differences. The arguments contain the whole mirror, including deleted rows."""
    doubtful = {need.key for need in waiting if need.doubtful}
    marked_users = [
        user | {"customData": user["customData"] | {"logtoUserId": user["id"]}}
        for user in final.users
    ]
    differing = [
        *_compare_fields("user", users, marked_users, _USER_FIELDS),
        *_compare_fields("organization", organizations, final.organizations, _ORGANIZATION_FIELDS),
        *_compare_deleted("user", users, final.deleted_users),
        *_compare_deleted("organization", organizations, final.deleted_organizations),
        *_compare_members(organizations, final),
    ]
    return [
        FieldDifference(key, field, _to_text(mine), _to_text(logtos), key in doubtful)
        for key, field, mine, logtos in differing
    ]


_Differing = Iterable[tuple[Key, str, Any, Any]]  # field, our value, Logto's value


def _compare_fields(
    kind: Kind, mirror: list[FoundRow], records: list[Json], names: dict[str, str]
) -> _Differing:
    ours = {mirrored.row[f"logto_{kind}_id"]: mirrored.row for mirrored in mirror}
    theirs = {record["id"]: record for record in records}
    live = {logto_id for logto_id, row in ours.items() if row["deleted_at"] is None}
    for logto_id in sorted(live | theirs.keys()):
        key = Key(kind, logto_id)
        if logto_id not in live or logto_id not in theirs:
            yield key, "exists", logto_id in live, logto_id in theirs
            continue
        for column, name in names.items():
            mine, logtos = ours[logto_id][column], theirs[logto_id][name]
            if mine != logtos:
                yield key, column, mine, logtos


def _compare_deleted(kind: Kind, mirror: list[FoundRow], deleted: list[str]) -> _Differing:
    rows = [mirrored.row for mirrored in mirror]
    mine = {row[f"logto_{kind}_id"] for row in rows if row["deleted_at"] is not None}
    for logto_id in sorted(mine ^ set(deleted)):
        yield Key(kind, logto_id), "deleted", logto_id in mine, logto_id in deleted


def _compare_members(organizations: list[FoundRow], final: FinalState) -> _Differing:
    ours = {
        mirrored.row["logto_organization_id"]: set(mirrored.memberships)
        for mirrored in organizations
    }
    theirs = {name: {user["id"] for user in users} for name, users in final.members.items()}
    for organization in sorted(ours.keys() | theirs.keys()):
        mine, logtos = ours.get(organization, set()), theirs.get(organization, set())
        for user in sorted(mine ^ logtos):
            yield membership(organization, user), "member", user in mine, user in logtos


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json.encode(value).decode()
