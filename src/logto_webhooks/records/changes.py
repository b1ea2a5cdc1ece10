"""Turn an event into changes of records."""

from __future__ import annotations

from collections.abc import Collection, Container
from typing import Final

from msgspec import UNSET

from logto_webhooks import canonical_json
from logto_webhooks.errors import MalformedEvent
from logto_webhooks.events import (
    Event,
    Organization,
    OrganizationCreated,
    OrganizationDeleted,
    OrganizationMembershipUpdated,
    OrganizationUserAdded,
    OrganizationUserRemoved,
    User,
    UserCreated,
    UserDataUpdated,
    UserDeleted,
    from_payload,
    payload_of,
)
from logto_webhooks.events.base import Json, corrected
from logto_webhooks.events.organizations import WholeOrganizationEvent
from logto_webhooks.events.users import InteractionEvent, UserEvent
from logto_webhooks.records.record import (
    MEMBERS,
    OWN_FIELD,
    UNKNOWN_CHANGE,
    USER_PARTS,
    WRONG_CLOCK,
    DeliveryChange,
    Key,
    RefetchRequest,
    Tombstone,
    Upsert,
    Value,
    membership,
)
from logto_webhooks.signing_keys import VerifiedBody

LAG_MS: Final = 100  # how long before its webhook a change happened, if Logto sends no time
MAX_LISTED: Final = 5000  # Logto cuts longer lists of members without notice


def read(
    body: VerifiedBody, occurred_at: int, lag_ms: int = LAG_MS
) -> tuple[Event, list[DeliveryChange]]:
    """Parse a delivery; return its event and the changes. `occurred_at` (ms) is its date in the
    inbox. If this differs from the date that Logto sent, the records are in doubt.

    Raises NotADelivery, MalformedEvent.
    """
    payload = payload_of(body)
    at = corrected(payload, occurred_at)
    event = from_payload(payload, at)
    changes = changes_from_event(event, lag_ms)
    if at is not None:
        keys = dict.fromkeys(change.key for change in changes)
        changes += [RefetchRequest(key, WRONG_CLOCK, at) for key in keys]
    return event, changes


def changes_from_event(event: Event, lag_ms: int = LAG_MS) -> list[DeliveryChange]:
    """Return what an event changes: nothing if it's a test payload or about no record.

    Raises MalformedEvent.
    """
    match event:
        case UserDeleted():
            return [Tombstone(Key("user", event.user_id), event.at)]
        case UserDataUpdated() if event.custom_data is not None or event.profile is not None:
            return [_make_part_change(event, lag_ms)]
        case UserEvent() | InteractionEvent():
            return _list_user_changes(event, lag_ms)
        case OrganizationDeleted():
            return [Tombstone(Key("organization", event.organization_id), event.at)]
        case WholeOrganizationEvent():
            return _list_organization_changes(event, lag_ms)
        case OrganizationMembershipUpdated():
            return _list_member_changes(event, lag_ms)
        case OrganizationUserAdded() | OrganizationUserRemoved():
            present = isinstance(event, OrganizationUserAdded)
            return [_make_member(event.organization_id, event.user_id, present, event.at, lag_ms)]
    return []


def _list_user_changes(event: UserEvent | InteractionEvent, lag_ms: int) -> list[DeliveryChange]:
    key = Key("user", event.user_id)
    if event.user is None:
        return [RefetchRequest(key, UNKNOWN_CHANGE, event.at)]
    _check_same_id(event, event.user_id, event.user.id)
    user = event.user
    stamp, start = _find_stamp_and_start(user.updated_at, event.at, lag_ms)
    is_new = isinstance(event, UserCreated)  # its missing fields are null
    sent = event.payload.get("user" if isinstance(event, InteractionEvent) else "data")
    contents = user_groups(user, None if is_new else sent)
    values = {name: Value(content, stamp, start, event.at) for name, content in contents.items()}
    upsert = Upsert(key, values, user_facts(user, event.at) | {"updatedAt": stamp})
    return _add_refetch(upsert, event.at, () if is_new else USER_PARTS)


def user_facts(user: User, latest: int) -> dict[str, int]:
    """Return the times that a whole user contains, at most `latest` (ms)."""
    moments = {
        "lastSignInAt": user.last_sign_in_at,
        "createdAt": user.created_at,
        "updatedAt": user.updated_at,
    }
    return {name: min(at, latest) for name, at in moments.items() if at is not None and at >= 0}


def user_groups(user: User, sent: Container[str] | None = None) -> Json:
    """Split a user into the contents of its groups. Fields have Logto's names.

    `sent` contains the fields that Logto sent. If it is None, missing fields of `own` are null.
    """
    own = {
        "username": user.username,
        "primaryEmail": user.primary_email,
        "primaryPhone": user.primary_phone,
        "name": user.name,
        "avatar": user.avatar,
        "identities": user.identities,
    }
    contents = _group_own_fields(own, sent) | {
        "suspension": user.is_suspended,
        "custom_data": user.custom_data,
        "profile": user.profile,
    }
    return {
        name: canonical_json.shown(content)
        for name, content in contents.items()
        if content is not UNSET
    }


def _group_own_fields(fields: Json, sent: Container[str] | None) -> Json:
    """Make one group of all fields, or one per sent field if some weren't sent."""
    if sent is None or all(name in sent for name in fields):
        return {"own": fields}
    return {OWN_FIELD + name: content for name, content in fields.items() if name in sent}


def _add_refetch(upsert: Upsert, at: int, groups: Collection[str] = ()) -> list[DeliveryChange]:
    """Request a refetch if fields, or any of the groups, are missing: only Logto knows their
    values."""
    if {"own", *groups} <= upsert.values.keys():
        return [upsert]
    return [upsert, RefetchRequest(upsert.key, UNKNOWN_CHANGE, at)]


def _make_part_change(event: UserDataUpdated, lag_ms: int) -> DeliveryChange:
    parts = {"custom_data": event.custom_data, "profile": event.profile}
    values = {
        name: Value(canonical_json.shown(content), event.at, event.at - lag_ms, event.at)
        for name, content in parts.items()
        if content is not None
    }
    return Upsert(Key("user", event.user_id), values, {"updatedAt": event.at})


def _list_organization_changes(event: WholeOrganizationEvent, lag_ms: int) -> list[DeliveryChange]:
    organization, key = event.organization, Key("organization", event.organization_id)
    if organization is None:
        return [RefetchRequest(key, UNKNOWN_CHANGE, event.at)]
    _check_same_id(event, event.organization_id, organization.id)
    sent = None if isinstance(event, OrganizationCreated) else event.payload.get("data")
    values = {
        name: Value(content, event.at, event.at - lag_ms, event.at)
        for name, content in _group_own_fields(organization_group(organization), sent).items()
    }
    facts = organization_facts(organization, event.at) | {"updatedAt": event.at}
    return _add_refetch(Upsert(key, values, facts), event.at)


def organization_facts(organization: Organization, latest: int) -> dict[str, int]:
    """Return the times that an organization contains, at most `latest` (ms)."""
    created = organization.created_at
    return {} if created is None or created < 0 else {"createdAt": min(created, latest)}


def organization_group(organization: Organization) -> Json:
    """Return the content of an organization's only group. Fields have Logto's names."""
    content = {
        "name": organization.name,
        "description": organization.description,
        "customData": organization.custom_data,
    }
    shown: Json = canonical_json.shown(content)
    return shown


def _list_member_changes(event: OrganizationMembershipUpdated, lag_ms: int) -> list[DeliveryChange]:
    organization, at = event.organization_id, event.at
    added, removed = event.added_user_ids, event.removed_user_ids
    changes: list[DeliveryChange] = [
        _make_member(organization, user, True, at, lag_ms) for user in added
    ]
    changes += [_make_member(organization, user, False, at, lag_ms) for user in removed]
    applications = event.added_application_ids or event.removed_application_ids
    no_lists = not (added or removed or applications)
    if no_lists or len(added) >= MAX_LISTED or len(removed) >= MAX_LISTED:
        changes.append(RefetchRequest(Key("organization", organization), MEMBERS, at))
    return changes


def _make_member(organization: str, user: str, present: bool, at: int, lag_ms: int) -> Upsert:
    value = Value(present, at, at - lag_ms, at)
    facts = {"addedAt": at} if present else {}
    return Upsert(membership(organization, user), {"present": value}, facts)


def _find_stamp_and_start(updated_at: int | None, at: int, lag_ms: int) -> tuple[int, int]:
    if updated_at is None:
        return at, at - lag_ms
    stamp = max(0, min(updated_at, at))  # a change can't be newer than its webhook
    return stamp, stamp


def _check_same_id(event: Event, expected: str, found: str) -> None:
    if expected != found:
        raise MalformedEvent(event=event.event, problem="it contains two different ids")
