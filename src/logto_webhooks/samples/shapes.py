"""Logto's records and the bodies of its webhooks, as in Logto 1.42, with its order of keys."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from logto_webhooks.events import BY_NAME

Json = dict[str, Any]

TENANT: Final = "default"
APPLICATION: Final[Json] = {
    "id": "fakespa0application00",
    "type": "SPA",
    "name": "Fake",
    "description": None,
}
CLIENT_IP: Final = "203.0.113.9"
_BROWSER: Final = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"
# The events that a webhook of Logto 1.42 can subscribe to.
EVENTS: Final = tuple(
    name for name in BY_NAME if not name.startswith(("Organization.User.", "TrustedDevice."))
)


def user(user_id: str, at: int, fields: Json) -> Json:
    """Make a user as `GET /users/:id` returns it. Raises TypeError for a field that users lack."""
    record: Json = {
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
    return change(record, fields)


def public(user: Json) -> Json:
    """Make a user as everything except the routes of `/users` returns it."""
    return {name: value for name, value in user.items() if name != "hasPassword"}


def organization(organization_id: str, at: int, fields: Json) -> Json:
    """Make an organization. Raises TypeError for a field that organizations lack."""
    record: Json = {
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
    return change(record, fields)


def role(role_id: str, name: str) -> Json:
    """Make a role of users."""
    return organization_role(role_id, name) | {"isDefault": False}


def organization_role(role_id: str, name: str) -> Json:
    """Make a role of an organization's members."""
    return organization_scope(role_id, name) | {"type": "User"}


def scope(scope_id: str, at: int, resource_id: str, name: str) -> Json:
    """Make a scope of an API resource."""
    return {
        "tenantId": TENANT,
        "id": scope_id,
        "resourceId": resource_id,
        "name": name,
        "description": name,
        "createdAt": at,
    }


def organization_scope(scope_id: str, name: str) -> Json:
    """Make a scope of organizations."""
    return {"tenantId": TENANT, "id": scope_id, "name": name, "description": name}


def to_iso(at: int) -> str:
    """Format milliseconds since the epoch as JavaScript does."""
    moment = datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds")
    return moment.replace("+00:00", "Z")


def webhook(
    webhook_id: str, at: int, url: str, events: list[str], signing_key: str, name: str | None = None
) -> Json:
    """Make a webhook as Logto's API returns it."""
    return {
        "tenantId": TENANT,
        "id": webhook_id,
        "name": webhook_id if name is None else name,
        "event": None,
        "events": events,
        "config": {"url": url},
        "signingKey": signing_key,
        "enabled": True,
        "createdAt": at,
    }


def change(record: Json, fields: Json) -> Json:
    """Return the record with changed fields. Raises TypeError for a field that it lacks."""
    unknown = sorted(fields.keys() - record.keys())
    if unknown:
        raise TypeError(f"Logto has no {', '.join(unknown)} here, only {', '.join(record)}")
    return record | fields


def managed(event: str, at: int, call: str, params: dict[str, str], **rest: object) -> Json:
    """Make the body for a call of the Management API, such as `PATCH /users/:userId`."""
    method, route = call.split(" ")
    path = route
    for name, value in params.items():
        path = path.replace(f":{name}", value)
    call_fields = {
        "path": path,
        "method": method,
        "status": 204 if method == "DELETE" else 200,
        "params": params,
        "matchedRoute": route,
    }
    return head(event, at) | call_fields | rest


def registered(
    event: str, at: int, session_id: str, application: Json = APPLICATION, **rest: object
) -> Json:
    """Make the body for a record that a sign-up created or changed."""
    body = {
        "event": event,
        "createdAt": to_iso(at),
        "interactionEvent": "Register",
        "userAgent": _BROWSER,
        "applicationId": application["id"],
        "sessionId": session_id,
        "ip": CLIENT_IP,
        "application": application,
    }
    return body | rest


def interaction(
    event: str, kind: str, at: int, session_id: str, user: Json, application: Json = APPLICATION
) -> Json:
    """Make the body for an interaction. `kind` is Register, SignIn or ForgotPassword."""
    return {
        "event": event,
        "interactionEvent": kind,
        "createdAt": to_iso(at),
        "sessionId": session_id,
        "userAgent": _BROWSER,
        "userId": user["id"],
        "userIp": CLIENT_IP,
        "user": public(user),
        "application": application,
    }


def head(event: str, at: int) -> Json:
    """Make the first fields of most bodies."""
    return {"event": event, "createdAt": to_iso(at), "userAgent": _BROWSER, "ip": CLIENT_IP}


def console_test(event: str, webhook_id: str, at: int) -> Json:
    """Make the body that "send test payload" in Logto's console sends."""
    head = {
        "event": event,
        "hookId": webhook_id,
        "createdAt": to_iso(at),
        "userAgent": "fake-user-agent",
    }
    return head | (_make_fake_session(at) if event.startswith("Post") else _FAKE_CALL)


_FAKE_CALL: Final[Json] = {
    "path": "/fake-path/:id",
    "method": "POST",
    "status": 200,
    "params": {"id": "fake-id"},
    "data": {"result": "success"},
}


def _make_fake_session(at: int) -> Json:
    user = {
        "id": "fake-id",
        "username": "fake-user",
        "primaryEmail": "fake-user@fake-service.com",
        "primaryPhone": "1234567890",
        "name": "Fake User",
        "avatar": "https://fake-service.com/avatars/fake-user.png",
        "customData": {"theme": "light"},
        "identities": {"google": {"userId": "fake-google-user-id"}},
        "profile": {},
        "applicationId": "fake-application-id",
        "cimdClientId": None,
        "isSuspended": False,
        "lastSignInAt": at,
        "createdAt": at,
        "updatedAt": at,
    }
    application = {
        "id": "fake-spa-application-id",
        "type": "SPA",
        "name": "Fake Application",
        "description": "Fake application data for testing",
    }
    session = {"sessionId": "fake-session-id", "userIp": "fake-user-ip", "userId": "fake-id"}
    return session | {"user": user, "application": application}
