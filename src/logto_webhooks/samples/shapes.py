"""The records as Logto 1.42 has them, key by key in its order."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from logto_webhooks.events import BY_NAME

Json = dict[str, Any]

TENANT: Final = "default"
# Those a hook of Logto 1.42 can subscribe to.
EVENTS: Final = tuple(
    name for name in BY_NAME if not name.startswith(("Organization.User.", "TrustedDevice."))
)


def user(user_id: str, at: int, fields: Json) -> Json:
    """A user as `GET /users/:id` answers it. Raises TypeError for a field that users lack."""
    made: Json = {
        "id": user_id,
        "username": None,
        "primaryEmail": None,
        "primaryPhone": None,
        "name": None,
        "avatar": None,
        "customData": {},
        "identities": {},
        "lastSignInAt": None,
        "createdAt": at,
        "updatedAt": at,
        "profile": {},
        "applicationId": None,
        "cimdClientId": None,
        "isSuspended": False,
        "hasPassword": False,
    }
    return changed(made, fields)


def public(user: Json) -> Json:
    """A user as all but the routes of `/users` show it."""
    return {name: value for name, value in user.items() if name != "hasPassword"}


def organization(organization_id: str, at: int, fields: Json) -> Json:
    """An organization. Raises TypeError for a field that organizations lack."""
    made: Json = {
        "tenantId": TENANT,
        "id": organization_id,
        "name": f"Organization {organization_id}",
        "description": None,
        "customData": {},
        "isMfaRequired": False,
        "color": {},
        "branding": {},
        "customCss": None,
        "createdAt": at,
    }
    return changed(made, fields)


def role(role_id: str, name: str) -> Json:
    """A role of users."""
    return {
        "tenantId": TENANT,
        "id": role_id,
        "name": name,
        "description": name,
        "type": "User",
        "isDefault": False,
    }


def organization_role(role_id: str, name: str) -> Json:
    """A role of an organization's members."""
    return {
        "tenantId": TENANT,
        "id": role_id,
        "name": name,
        "description": name,
        "type": "User",
    }


def scope(scope_id: str, at: int, resource_id: str, name: str) -> Json:
    """A scope of an API resource."""
    return {
        "tenantId": TENANT,
        "id": scope_id,
        "resourceId": resource_id,
        "name": name,
        "description": name,
        "createdAt": at,
    }


def organization_scope(scope_id: str, name: str) -> Json:
    """A scope of organizations."""
    return {"tenantId": TENANT, "id": scope_id, "name": name, "description": name}


def iso(at: int) -> str:
    """Milliseconds since the epoch, as JavaScript writes them."""
    moment = datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds")
    return moment.replace("+00:00", "Z")


def hook(
    hook_id: str, at: int, url: str, events: list[str], signing_key: str, name: str | None = None
) -> Json:
    """A webhook's settings."""
    return {
        "tenantId": TENANT,
        "id": hook_id,
        "name": hook_id if name is None else name,
        "event": None,
        "events": events,
        "config": {"url": url},
        "signingKey": signing_key,
        "enabled": True,
        "createdAt": at,
    }


def changed(record: Json, fields: Json) -> Json:
    """The record with other fields. Raises TypeError for a field that it lacks."""
    unknown = sorted(fields.keys() - record.keys())
    if unknown:
        raise TypeError(f"Logto has no {', '.join(unknown)} here, only {', '.join(record)}")
    return record | fields
