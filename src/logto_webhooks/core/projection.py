"""What an event means for the records."""

from __future__ import annotations

from typing import Final

from msgspec import UNSET

from logto_webhooks.core.events import (
    Event,
    Organization,
    OrganizationDeleted,
    OrganizationMembershipUpdated,
    OrganizationUserAdded,
    OrganizationUserRemoved,
    User,
    UserDataUpdated,
    UserDeleted,
)
from logto_webhooks.core.events.base import Json
from logto_webhooks.core.events.organizations import WholeOrganizationEvent
from logto_webhooks.core.events.users import InteractionEvent, UserEvent
from logto_webhooks.core.record import (
    MEMBERS,
    UNKNOWN_CHANGE,
    Drop,
    Key,
    Put,
    Refetch,
    Told,
    Value,
    membership,
)
from logto_webhooks.errors import MalformedEvent

LAG_MS: Final = 100  # a change is older than its dispatch: how much, where no stamp tells
CAP: Final = 5000  # Logto cuts a list of members here, without a word


def plan(event: Event, lag_ms: int = LAG_MS) -> list[Told]:
    """Say what an event changes; nothing for test payloads, and for events of no record.

    Raises MalformedEvent.
    """
    match event:
        case UserDeleted():
            return [Drop(Key("user", event.user_id), event.at)]
        case UserDataUpdated() if event.custom_data is not None or event.profile is not None:
            return [_user_part(event, lag_ms)]
        case UserEvent() | InteractionEvent():
            return [_user(event, lag_ms)]
        case OrganizationDeleted():
            return [Drop(Key("organization", event.organization_id), event.at)]
        case WholeOrganizationEvent():
            return [_organization(event, lag_ms)]
        case OrganizationMembershipUpdated():
            return _members(event, lag_ms)
        case OrganizationUserAdded() | OrganizationUserRemoved():
            present = isinstance(event, OrganizationUserAdded)
            return [_member(event.organization_id, event.user_id, present, event.at, lag_ms)]
    return []


def _user(event: UserEvent | InteractionEvent, lag_ms: int) -> Told:
    key = Key("user", event.user_id)
    if event.user is None:
        return Refetch(key, UNKNOWN_CHANGE, event.at)
    _same_id(event, event.user_id, event.user.id)
    user = event.user
    stamp, start = _stamp_and_start(user.updated_at, event.at, lag_ms)
    contents = user_groups(user)
    values = {name: Value(content, stamp, start, event.at) for name, content in contents.items()}
    facts = {
        "lastSignInAt": user.last_sign_in_at,
        "createdAt": user.created_at,
        "updatedAt": stamp,
    }
    return Put(key, values, {name: fact for name, fact in facts.items() if fact is not None})


def user_groups(user: User) -> Json:
    """Split a whole user into the contents of its groups, named as Logto names the fields."""
    contents = {
        "own": {
            "username": user.username,
            "primaryEmail": user.primary_email,
            "primaryPhone": user.primary_phone,
            "name": user.name,
            "avatar": user.avatar,
            "identities": user.identities,
        },
        "suspension": user.is_suspended,
        "custom_data": user.custom_data,
        "profile": user.profile,
    }
    return {name: content for name, content in contents.items() if content is not UNSET}


def _user_part(event: UserDataUpdated, lag_ms: int) -> Told:
    parts = {"custom_data": event.custom_data, "profile": event.profile}
    values = {
        name: Value(content, event.at, event.at - lag_ms, event.at)
        for name, content in parts.items()
        if content is not None
    }
    return Put(Key("user", event.user_id), values, {"updatedAt": event.at})


def _organization(event: WholeOrganizationEvent, lag_ms: int) -> Told:
    organization = event.organization
    if organization is None:
        return Refetch(Key("organization", event.organization_id), UNKNOWN_CHANGE, event.at)
    _same_id(event, event.organization_id, organization.id)
    value = Value(organization_group(organization), event.at, event.at - lag_ms, event.at)
    facts = {"updatedAt": event.at}
    if organization.created_at is not None:
        facts["createdAt"] = organization.created_at
    return Put(Key("organization", event.organization_id), {"own": value}, facts)


def organization_group(organization: Organization) -> Json:
    """Return the content of an organization's one group, named as Logto names the fields."""
    return {
        "name": organization.name,
        "description": organization.description,
        "customData": organization.custom_data,
    }


def _members(event: OrganizationMembershipUpdated, lag_ms: int) -> list[Told]:
    organization, at = event.organization_id, event.at
    added, removed = event.added_user_ids, event.removed_user_ids
    changes: list[Told] = [_member(organization, user, True, at, lag_ms) for user in added]
    changes += [_member(organization, user, False, at, lag_ms) for user in removed]
    of_applications = event.added_application_ids or event.removed_application_ids
    untold = not (added or removed or of_applications)
    if untold or len(added) >= CAP or len(removed) >= CAP:
        changes.append(Refetch(Key("organization", organization), MEMBERS, at))
    return changes


def _member(organization: str, user: str, present: bool, at: int, lag_ms: int) -> Told:
    value = Value(present, at, at - lag_ms, at)
    facts = {"addedAt": at} if present else {}
    return Put(membership(organization, user), {"present": value}, facts)


def _stamp_and_start(updated_at: int | None, at: int, lag_ms: int) -> tuple[int, int]:
    if updated_at is None:
        return at, at - lag_ms
    stamp = min(updated_at, at)  # nothing is sent before it was made
    return stamp, stamp


def _same_id(event: Event, expected: str, found: str) -> None:
    if expected != found:
        raise MalformedEvent(event=event.event, problem="it names two different ids")
