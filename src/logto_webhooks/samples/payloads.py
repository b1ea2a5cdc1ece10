"""A realistic payload of every event, as Logto 1.42 shapes it."""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.deliveries import SAMPLE_WEBHOOK
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.events import named
from logto_webhooks.samples import shapes

Json = dict[str, Any]
_Shape = Callable[["Scene"], Json]

_NAMES: Final = ("Ana Lima", "Björk Jónsdóttir", "Chloé Martin", "Дмитрий Орлов", "Zoë Quinn")
_DAY_MS: Final = 86_400_000
_SHORT: Final = {"email": "primaryEmail", "phone": "primaryPhone"}
_BROWSER: Final = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"


class Scene(Struct, frozen=True):
    """Who and when a payload is about; `at` in milliseconds since the epoch."""

    random: random.Random
    at: int
    id: str

    def new_id(self, length: int = 12) -> str:
        """Make an id as Logto makes them."""
        return new_id(self.random, length)

    @property
    def born_at(self) -> int:
        """When the record was created: always the same for an id, some days ago."""
        return (self.at - 3 * _DAY_MS) // _DAY_MS * _DAY_MS + zlib.crc32(self.id.encode()) % _DAY_MS


def new_id(rng: random.Random, length: int = 12) -> str:
    """Make an id as Logto makes them."""
    return "".join(rng.choices(string.ascii_lowercase + string.digits, k=length))


def payload(
    event: str,
    fields: Mapping[str, Any] | None = None,
    *,
    at: int,
    rng: random.Random,
    id: str | None = None,
) -> Json:
    """Make a payload of `event`, sent at `at` (milliseconds since the epoch).

    `id` is that of the user, organization, role or scope. `fields` go where they belong: a
    field of the payload's top there, any other into the record; `a.b` goes below `a`; `email`
    and `phone` are short for Logto's names. Raises UnknownEventName or SettingInvalid.
    """
    scene = Scene(rng, at, new_id(rng) if id is None else id)
    made = _head(scene, event) | _SHAPES[named(event).name](scene)
    if "userIp" in made:
        del made["ip"]  # interactions have that instead
    made["hookId"] = SAMPLE_WEBHOOK + scene.new_id(15)
    for name, value in (fields or {}).items():
        _set(made, name, value)
    return made


def console_test(event: str, *, at: int) -> Json:
    """Make what Logto's console sends by "send test payload" for a data event."""
    scene = Scene(random.Random(0), at, "fake-id")
    managed = {"path": "/fake-path/:id", "method": "POST", "status": 200}
    head = _head(scene, event) | {"userAgent": "fake-user-agent"}
    return head | managed | {"params": {"id": "fake-id"}, "data": {"result": "success"}}


def user(scene: Scene) -> Json:
    """A whole user, as most events have it; the same person for an id."""
    return shapes.public(_user_of_api(scene))


def _user_of_api(scene: Scene) -> Json:
    """The same as the routes of `/users` answer it."""
    own = {
        "primaryEmail": f"{scene.id}@example.com",
        "name": _NAMES[zlib.crc32(scene.id.encode()) % len(_NAMES)],
        "updatedAt": scene.at,
    }
    return shapes.user(scene.id, scene.born_at, own)


def organization(scene: Scene) -> Json:
    """A whole organization."""
    own = {"name": f"Organization {scene.id[:4]}"}
    return shapes.organization(scene.id, scene.born_at, own)


def _new(record: Callable[[Scene], Json]) -> Callable[[Scene], Json]:
    return lambda scene: record(scene) | {"createdAt": scene.at}


def _head(scene: Scene, event: str) -> Json:
    return {
        "event": event,
        "createdAt": shapes.iso(scene.at),
        "userAgent": _BROWSER,
        "ip": "203.0.113.9",
    }


def _managed(method: str, route: str, param: str, data: Callable[[Scene], Any] | None) -> _Shape:
    """What a call of the Management API makes."""

    def shape(scene: Scene) -> Json:
        params = {param: scene.id} if f":{param}" in route else {}
        made = {
            "path": route.replace(f":{param}", scene.id),
            "method": method,
            "status": 204 if method == "DELETE" else 200,
            "params": params,
            "matchedRoute": route,
        }
        return made | ({"data": data(scene)} if data else {})

    return shape


def _interaction(kind: str, who: Callable[[Scene], Json] = user) -> _Shape:
    def shape(scene: Scene) -> Json:
        signed_in = who(scene) | {"lastSignInAt": scene.at}
        made = {"userId": scene.id, "userIp": "203.0.113.9", "user": signed_in}
        return _session(scene, kind) | made

    return shape


def _session(scene: Scene, kind: str) -> Json:
    application = {"id": scene.new_id(21), "type": "SPA", "name": "Sample", "description": None}
    return {
        "interactionEvent": kind,
        "sessionId": scene.new_id(43),
        "application": application,
    }


def _lockout(scene: Scene) -> Json:
    made = _session(scene, "SignIn")
    made["applicationId"] = made["application"]["id"]
    return made | {"type": "email", "value": f"{scene.id}@example.com"}


def _message_limit(scene: Scene) -> Json:
    return {"action": "VerificationCodeSend", "recipient": f"{scene.id}@example.com"}


def _grant_limit(scene: Scene) -> Json:
    return {
        "userId": scene.id,
        "applicationId": scene.new_id(21),
        "revokedGrantIds": [scene.new_id(43)],
        "maxAllowedGrants": 1,
        "preRevocationActiveGrantCount": 2,
    }


def _device(scene: Scene) -> Json:
    trusted_until = scene.at + 30 * _DAY_MS
    return {"data": {"id": scene.id, "userId": scene.new_id(), "expiresAt": trusted_until}}


def _membership(scene: Scene) -> Json:
    made = _managed("POST", "/organizations/:id/users", "id", None)(scene)
    return made | {"organizationId": scene.id, "addedUserIds": [scene.new_id()]}


def _member(scene: Scene) -> Json:
    return {"organizationId": scene.id, "userId": scene.new_id()}


def _scope_call(method: str) -> _Shape:
    """A scope of an API resource: its route has two parameters."""

    def shape(scene: Scene) -> Json:
        params = {"resourceId": scene.new_id(21)}
        route, path = "/resources/:resourceId/scopes", f"/resources/{params['resourceId']}/scopes"
        if method != "POST":
            params["scopeId"] = scene.id
            route, path = f"{route}/:scopeId", f"{path}/{scene.id}"
        made = {"path": path, "method": method, "params": params, "matchedRoute": route}
        data = (
            {}
            if method == "DELETE"
            else {
                "data": shapes.scope(
                    scene.id, scene.born_at, params["resourceId"], f"read:{scene.id[:4]}"
                )
            }
        )
        return made | {"status": 204 if method == "DELETE" else 200} | data

    return shape


def _role(scene: Scene) -> Json:
    return shapes.role(scene.id, f"role-{scene.id[:4]}")


def _organization_role(scene: Scene) -> Json:
    return shapes.organization_role(scene.id, f"role-{scene.id[:4]}")


def _organization_scope(scene: Scene) -> Json:
    return shapes.organization_scope(scene.id, f"read:{scene.id[:4]}")


def _scopes(scene: Scene) -> list[Json]:
    return [{"id": scene.new_id(21), "name": "read:items", "description": None}]


_SHAPES: Final[dict[str, _Shape]] = {
    "PostRegister": _interaction("Register", _new(user)),
    "PostSignIn": _interaction("SignIn"),
    "PostSignInAdaptiveMfaTriggered": _interaction("SignIn"),
    "PostResetPassword": _interaction("ForgotPassword"),
    "User.Created": _managed("POST", "/users", "userId", _new(_user_of_api)),
    "User.Deleted": _managed("DELETE", "/users/:userId", "userId", user),
    "User.Data.Updated": _managed("PATCH", "/users/:userId", "userId", _user_of_api),
    "User.SuspensionStatus.Updated": _managed(
        "PATCH",
        "/users/:userId/is-suspended",
        "userId",
        lambda scene: _user_of_api(scene) | {"isSuspended": True},
    ),
    "Role.Created": _managed("POST", "/roles", "id", _role),
    "Role.Deleted": _managed("DELETE", "/roles/:id", "id", None),
    "Role.Data.Updated": _managed("PATCH", "/roles/:id", "id", _role),
    "Role.Scopes.Updated": _managed("POST", "/roles/:id/scopes", "id", _scopes),
    "Scope.Created": _scope_call("POST"),
    "Scope.Deleted": _scope_call("DELETE"),
    "Scope.Data.Updated": _scope_call("PATCH"),
    "Organization.Created": _managed("POST", "/organizations", "id", _new(organization)),
    "Organization.Deleted": _managed("DELETE", "/organizations/:id", "id", None),
    "Organization.Data.Updated": _managed("PATCH", "/organizations/:id", "id", organization),
    "Organization.Membership.Updated": _membership,
    "Organization.User.Added": _member,
    "Organization.User.Removed": _member,
    "OrganizationRole.Created": _managed("POST", "/organization-roles", "id", _organization_role),
    "OrganizationRole.Deleted": _managed("DELETE", "/organization-roles/:id", "id", None),
    "OrganizationRole.Data.Updated": _managed(
        "PATCH", "/organization-roles/:id", "id", _organization_role
    ),
    "OrganizationRole.Scopes.Updated": _managed(
        "POST", "/organization-roles/:id/scopes", "id", None
    ),
    "OrganizationScope.Created": _managed(
        "POST", "/organization-scopes", "id", _organization_scope
    ),
    "OrganizationScope.Deleted": _managed("DELETE", "/organization-scopes/:id", "id", None),
    "OrganizationScope.Data.Updated": _managed(
        "PATCH", "/organization-scopes/:id", "id", _organization_scope
    ),
    "Identifier.Lockout": _lockout,
    "Message.RateLimited": _message_limit,
    "Grant.LimitExceeded": _grant_limit,
    "TrustedDevice.Created": _device,
    "TrustedDevice.Deleted": _device,
}


def _set(made: Json, name: str, value: Any) -> None:
    first, *rest = name.split(".")
    record = next((made[key] for key in ("user", "data") if isinstance(made.get(key), dict)), made)
    target = made if first in made else record
    path = [_SHORT.get(first, first) if target is record else first, *rest]
    for step in path[:-1]:
        target = target.setdefault(step, {})
        if not isinstance(target, dict):
            raise SettingInvalid(name=f"--data {name}", problem=f"{step} holds no fields")
    target[path[-1]] = value
