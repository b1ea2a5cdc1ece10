"""Turn an event into changes of records."""

from __future__ import annotations

from collections.abc import Container
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

LAG_MS: Final = 100  # a change is older than its dispatch: how much, where no stamp tells
CAP: Final = 5000  # Logto cuts a list of members here, without a word


def read(
    body: VerifiedBody, occurred_at: int, lag_ms: int = LAG_MS
) -> tuple[Event, list[DeliveryChange]]:
    """Parse a delivery that the inbox dated `occurred_at` (ms); return its event, and what that
    changes. If the delivery's own date was corrected, its records are in doubt.

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
    """Say what an event changes; nothing for test payloads, and for events of no record.

    Raises MalformedEvent.
    """
    match event:
        case UserDeleted():
            return [Tombstone(Key("user", event.user_id), event.at)]
        case UserDataUpdated() if event.custom_data is not None or event.profile is not None:
            return [_user_part(event, lag_ms)]
        case UserEvent() | InteractionEvent():
            return _user(event, lag_ms)
        case OrganizationDeleted():
            return [Tombstone(Key("organization", event.organization_id), event.at)]
        case WholeOrganizationEvent():
            return _organization(event, lag_ms)
        case OrganizationMembershipUpdated():
            return _members(event, lag_ms)
        case OrganizationUserAdded() | OrganizationUserRemoved():
            present = isinstance(event, OrganizationUserAdded)
            return [_member(event.organization_id, event.user_id, present, event.at, lag_ms)]
    return []


def _user(event: UserEvent | InteractionEvent, lag_ms: int) -> list[DeliveryChange]:
    key = Key("user", event.user_id)
    if event.user is None:
        return [RefetchRequest(key, UNKNOWN_CHANGE, event.at)]
    _same_id(event, event.user_id, event.user.id)
    user = event.user
    stamp, start = _stamp_and_start(user.updated_at, event.at, lag_ms)
    # Of a user who is new, what is left out is none.
    sent = event.payload.get("user" if isinstance(event, InteractionEvent) else "data")
    contents = user_groups(user, None if isinstance(event, UserCreated) else sent)
    values = {name: Value(content, stamp, start, event.at) for name, content in contents.items()}
    upsert = Upsert(key, values, user_facts(user, event.at) | {"updatedAt": stamp})
    return _with_refetch(upsert, event.at)


def user_facts(user: User, latest: int) -> dict[str, int]:
    """Return the moments that a whole user tells; none is later than it was told itself."""
    moments = {
        "lastSignInAt": user.last_sign_in_at,
        "createdAt": user.created_at,
        "updatedAt": user.updated_at,
    }
    return {name: min(at, latest) for name, at in moments.items() if at is not None and at >= 0}


def user_groups(user: User, sent: Container[str] | None = None) -> Json:
    """Split a user into the contents of its groups, named as Logto names the fields.

    `sent` has the fields that Logto sent; if it is None, those left out of `own` are null.
    """
    own = {
        "username": user.username,
        "primaryEmail": user.primary_email,
        "primaryPhone": user.primary_phone,
        "name": user.name,
        "avatar": user.avatar,
        "identities": user.identities,
    }
    contents = _own(own, sent) | {
        "suspension": user.is_suspended,
        "custom_data": user.custom_data,
        "profile": user.profile,
    }
    return {
        name: canonical_json.shown(content)
        for name, content in contents.items()
        if content is not UNSET
    }


def _own(fields: Json, sent: Container[str] | None) -> Json:
    """Make one group of all fields, or a group of each where some of them weren't sent."""
    if sent is None or all(name in sent for name in fields):
        return {"own": fields}
    return {OWN_FIELD + name: content for name, content in fields.items() if name in sent}


def _with_refetch(upsert: Upsert, at: int) -> list[DeliveryChange]:
    """Only Logto knows what some fields are that weren't sent."""
    if "own" in upsert.values:
        return [upsert]
    return [upsert, RefetchRequest(upsert.key, UNKNOWN_CHANGE, at)]


def _user_part(event: UserDataUpdated, lag_ms: int) -> DeliveryChange:
    parts = {"custom_data": event.custom_data, "profile": event.profile}
    values = {
        name: Value(canonical_json.shown(content), event.at, event.at - lag_ms, event.at)
        for name, content in parts.items()
        if content is not None
    }
    return Upsert(Key("user", event.user_id), values, {"updatedAt": event.at})


def _organization(event: WholeOrganizationEvent, lag_ms: int) -> list[DeliveryChange]:
    organization, key = event.organization, Key("organization", event.organization_id)
    if organization is None:
        return [RefetchRequest(key, UNKNOWN_CHANGE, event.at)]
    _same_id(event, event.organization_id, organization.id)
    sent = None if isinstance(event, OrganizationCreated) else event.payload.get("data")
    values = {
        name: Value(content, event.at, event.at - lag_ms, event.at)
        for name, content in _own(organization_group(organization), sent).items()
    }
    facts = organization_facts(organization, event.at) | {"updatedAt": event.at}
    return _with_refetch(Upsert(key, values, facts), event.at)


def organization_facts(organization: Organization, latest: int) -> dict[str, int]:
    """Return the moments that an organization tells; none is later than it was told itself."""
    created = organization.created_at
    return {} if created is None or created < 0 else {"createdAt": min(created, latest)}


def organization_group(organization: Organization) -> Json:
    """Return the content of an organization's one group, named as Logto names the fields."""
    content = {
        "name": organization.name,
        "description": organization.description,
        "customData": organization.custom_data,
    }
    shown: Json = canonical_json.shown(content)
    return shown


def _members(event: OrganizationMembershipUpdated, lag_ms: int) -> list[DeliveryChange]:
    organization, at = event.organization_id, event.at
    added, removed = event.added_user_ids, event.removed_user_ids
    changes: list[DeliveryChange] = [
        _member(organization, user, True, at, lag_ms) for user in added
    ]
    changes += [_member(organization, user, False, at, lag_ms) for user in removed]
    of_applications = event.added_application_ids or event.removed_application_ids
    untold = not (added or removed or of_applications)
    if untold or len(added) >= CAP or len(removed) >= CAP:
        changes.append(RefetchRequest(Key("organization", organization), MEMBERS, at))
    return changes


def _member(organization: str, user: str, present: bool, at: int, lag_ms: int) -> DeliveryChange:
    value = Value(present, at, at - lag_ms, at)
    facts = {"addedAt": at} if present else {}
    return Upsert(membership(organization, user), {"present": value}, facts)


def _stamp_and_start(updated_at: int | None, at: int, lag_ms: int) -> tuple[int, int]:
    if updated_at is None:
        return at, at - lag_ms
    stamp = max(0, min(updated_at, at))  # nothing is sent before it was made
    return stamp, stamp


def _same_id(event: Event, expected: str, found: str) -> None:
    if expected != found:
        raise MalformedEvent(event=event.event, problem="it contains two different ids")
