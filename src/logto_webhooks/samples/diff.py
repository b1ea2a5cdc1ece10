"""The mirror beside what Logto itself said: what differs, and whether that is in doubt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec import Struct

from logto_webhooks import canonical_json
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.records.record import Key, membership
from logto_webhooks.samples.history import Final, Json


class Difference(Struct, frozen=True):
    """One field, or the presence, of one record; the values as text."""

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
    final: Final, users: list[FoundRow], organizations: list[FoundRow], waiting: list[RefetchNeed]
) -> list[Difference]:
    """List all that differs. The arguments are the whole mirror, deleted rows included."""
    doubtful = {each.key for each in waiting if each.doubtful}
    their_users = {user["id"]: {**user, "customData": _marked(user)} for user in final.users}
    ours = {found.row["logto_user_id"]: found.row for found in users}
    found = list(_fields("user", ours, their_users, _USER_FIELDS))
    ours = {each.row["logto_organization_id"]: each.row for each in organizations}
    theirs = {each["id"]: each for each in final.organizations}
    found += _fields("organization", ours, theirs, _ORGANIZATION_FIELDS)
    found += _deleted("user", users, final.deleted_users)
    found += _deleted("organization", organizations, final.deleted_organizations)
    found += _members(organizations, final)
    return [
        Difference(key, field, _text(mine), _text(logtos), key in doubtful)
        for key, field, mine, logtos in found
    ]


_Found = Iterable[tuple[Key, str, Any, Any]]


def _fields(kind: Any, ours: dict[str, Json], theirs: dict[str, Json], names: Json) -> _Found:
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


def _deleted(kind: Any, found: list[FoundRow], deleted: list[str]) -> _Found:
    column = f"logto_{kind}_id"
    mine = {each.row[column] for each in found if each.row["deleted_at"] is not None}
    for logto_id in sorted(mine ^ set(deleted)):
        yield Key(kind, logto_id), "deleted", logto_id in mine, logto_id in deleted


def _members(organizations: list[FoundRow], final: Final) -> _Found:
    ours = {each.row["logto_organization_id"]: set(each.memberships) for each in organizations}
    theirs = {name: {user["id"] for user in users} for name, users in final.members.items()}
    for organization in sorted(ours.keys() | theirs.keys()):
        mine, logtos = ours.get(organization, set()), theirs.get(organization, set())
        for user in sorted(mine ^ logtos):
            yield membership(organization, user), "member", user in mine, user in logtos


def _text(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json.encode(value).decode()


def _marked(user: Json) -> Json:
    return {**user["customData"], "logtoUserId": user["id"]}
