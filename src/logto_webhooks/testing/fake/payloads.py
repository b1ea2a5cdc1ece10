"""The webhooks' bodies as Logto 1.42 shapes them, but for `hookId`, which the sender adds."""

from __future__ import annotations

from typing import Final

from logto_webhooks.samples.shapes import Json, iso, public

MEMBERS_AT_MOST: Final = 5000
APPLICATION: Final[Json] = {
    "id": "fakespa0application00",
    "type": "SPA",
    "name": "Fake",
    "description": None,
}
_BROWSER: Final = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"
_CLIENT_IP: Final = "203.0.113.9"


def managed(
    event: str, at: int, call: str, params: dict[str, str], *, status: int = 200, **rest: object
) -> Json:
    """What a call of the Management API sends; `call` is `PATCH /users/:userId`."""
    method, route = call.split(" ")
    path = route
    for name, value in params.items():
        path = path.replace(f":{name}", value)
    made = {
        "event": event,
        "createdAt": iso(at),
        "userAgent": "fake-logto/1.0",
        "ip": "::ffff:127.0.0.1",
        "path": path,
        "method": method,
        "status": status,
        "params": params,
        "matchedRoute": route,
    }
    return made | rest


def registered(event: str, at: int, session: str, **rest: object) -> Json:
    """What a sign-up sends of the records that it made."""
    made = {
        "event": event,
        "createdAt": iso(at),
        "interactionEvent": "Register",
        "userAgent": _BROWSER,
        "applicationId": APPLICATION["id"],
        "sessionId": session,
        "ip": _CLIENT_IP,
        "application": APPLICATION,
    }
    return made | rest


def interaction(event: str, kind: str, at: int, session: str, user: Json) -> Json:
    """`PostRegister` or `PostSignIn`; `kind` is Register or SignIn."""
    return {
        "event": event,
        "interactionEvent": kind,
        "createdAt": iso(at),
        "sessionId": session,
        "userAgent": _BROWSER,
        "userId": user["id"],
        "userIp": _CLIENT_IP,
        "user": public(user),
        "application": APPLICATION,
    }


def moved(added: list[str], removed: list[str]) -> dict[str, list[str]]:
    """Who joined and who left: absent when empty, cut without a word."""
    told = {"addedUserIds": added, "removedUserIds": removed}
    return {name: ids[:MEMBERS_AT_MOST] for name, ids in told.items() if ids}


def console_test(event: str, hook_id: str, at: int) -> Json:
    """What "send test payload" sends, `hookId` included."""
    head = {
        "event": event,
        "hookId": hook_id,
        "createdAt": iso(at),
        "userAgent": "fake-user-agent",
    }
    return head | (_fake_session(at) if event.startswith("Post") else _FAKE_CALL)


_FAKE_CALL: Final[Json] = {
    "path": "/fake-path/:id",
    "method": "POST",
    "status": 200,
    "params": {"id": "fake-id"},
    "data": {"result": "success"},
}


def _fake_session(at: int) -> Json:
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
    return {
        "sessionId": "fake-session-id",
        "userIp": "fake-user-ip",
        "userId": "fake-id",
        "user": user,
        "application": application,
    }
