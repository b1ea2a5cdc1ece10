"""Make a realistic payload of any event, as Logto 1.42 sends it."""

from __future__ import annotations

import random
import re
import string
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.deliveries import SAMPLE_WEBHOOK
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.events import named
from logto_webhooks.samples import shapes
from logto_webhooks.samples.shapes import Json, head
from logto_webhooks.validation import nearest

_NAMES: Final = ("Ana Lima", "Björk Jónsdóttir", "Chloé Martin", "Дмитрий Орлов", "Zoë Quinn")
_DAY_MS: Final = 86_400_000
_SHORT_NAMES: Final = {"email": "primaryEmail", "phone": "primaryPhone"}


class Scene(Struct, frozen=True):
    """The subject's `id` and the time (`at`, in milliseconds since the epoch) of a payload."""

    random: random.Random
    at: int
    id: str

    def new_id(self, length: int = 12) -> str:
        """Make an id like Logto's."""
        return new_id(self.random, length)

    @property
    def created_at(self) -> int:
        """When the record was created: some days ago, always the same for an id."""
        return (self.at - 3 * _DAY_MS) // _DAY_MS * _DAY_MS + zlib.crc32(self.id.encode()) % _DAY_MS


def new_id(rng: random.Random, length: int = 12) -> str:
    """Make an id like Logto's."""
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

    `id` is the id of the user, organization, role or scope. Top-level `fields` change the payload,
    other fields the record. `a.b` sets a nested field; `email` and `phone` are short for Logto's
    names. Raises UnknownEventName, and SettingInvalid for an unknown field or an `id` that isn't
    text.
    """
    if id is not None and not isinstance(id, str):
        raise SettingInvalid(name="id", problem=f"it must be a text, not {id!r}")
    scene = Scene(rng, at, new_id(rng) if id is None else id)
    body = _BODIES[named(event).name](event, scene)
    body["hookId"] = SAMPLE_WEBHOOK + scene.new_id(15)
    for name, value in (fields or {}).items():
        _set(event, body, name, value)
    return body


def user(scene: Scene) -> Json:
    """Make a user as in most events, always the same person for an id."""
    return shapes.public(_user_of_api(scene))


def _user_of_api(scene: Scene) -> Json:
    """Make a user as the routes of `/users` return it."""
    fields = {
        "primaryEmail": f"{scene.id}@example.com",
        "name": _NAMES[zlib.crc32(scene.id.encode()) % len(_NAMES)],
        "updatedAt": scene.at,
    }
    return shapes.user(scene.id, scene.created_at, fields)


def organization(scene: Scene) -> Json:
    """Make an organization."""
    fields = {"name": f"Organization {scene.id[:4]}"}
    return shapes.organization(scene.id, scene.created_at, fields)


def _role(scene: Scene) -> Json:
    return shapes.role(scene.id, f"role-{scene.id[:4]}")


def _organization_role(scene: Scene) -> Json:
    return shapes.organization_role(scene.id, f"role-{scene.id[:4]}")


def _organization_scope(scene: Scene) -> Json:
    return shapes.organization_scope(scene.id, f"read:{scene.id[:4]}")


def _scopes(scene: Scene) -> list[Json]:
    return [{"id": scene.new_id(21), "name": "read:items", "description": None}]


def _new(record: Callable[[Scene], Json]) -> Callable[[Scene], Json]:
    return lambda scene: record(scene) | {"createdAt": scene.at}


_MakeBody = Callable[[str, Scene], Json]  # event


def _managed(call: str, record: Callable[[Scene], Any] | None = None) -> _MakeBody:
    """Make payloads that a call of the Management API causes."""

    def make_body(event: str, scene: Scene) -> Json:
        params = dict.fromkeys(re.findall(r":(\w+)", call), scene.id)
        body = shapes.managed(event, scene.at, call, params)
        return body | ({"data": record(scene)} if record else {})

    return make_body


def _managed_scope(method: str, path: str = "") -> _MakeBody:
    """Like `_managed`, for a scope of an API resource, whose route has two parameters."""

    def make_body(event: str, scene: Scene) -> Json:
        params = {"resourceId": scene.new_id(21)} | ({"scopeId": scene.id} if path else {})
        call = f"{method} /resources/:resourceId/scopes{path}"
        body = shapes.managed(event, scene.at, call, params)
        name = f"read:{scene.id[:4]}"
        scope = shapes.scope(scene.id, scene.created_at, params["resourceId"], name)
        return body | ({} if method == "DELETE" else {"data": scope})

    return make_body


def _interaction(kind: str, who: Callable[[Scene], Json] = user) -> _MakeBody:
    def make_body(event: str, scene: Scene) -> Json:
        application = _application(scene)
        signed_in = who(scene) | {"lastSignInAt": scene.at}
        session_id = scene.new_id(43)
        return shapes.interaction(event, kind, scene.at, session_id, signed_in, application)

    return make_body


def _application(scene: Scene) -> Json:
    return {"id": scene.new_id(21), "type": "SPA", "name": "Sample", "description": None}


def _lockout(event: str, scene: Scene) -> Json:
    application = _application(scene)
    session: Json = {
        "interactionEvent": "SignIn",
        "sessionId": scene.new_id(43),
        "application": application,
        "applicationId": application["id"],
    }
    locked = {"type": "email", "value": f"{scene.id}@example.com"}
    return head(event, scene.at) | session | locked


def _message_limit(event: str, scene: Scene) -> Json:
    limited = {"action": "VerificationCodeSend", "recipient": f"{scene.id}@example.com"}
    return head(event, scene.at) | limited


def _grant_limit(event: str, scene: Scene) -> Json:
    return head(event, scene.at) | {
        "userId": scene.id,
        "applicationId": scene.new_id(21),
        "revokedGrantIds": [scene.new_id(43)],
        "maxAllowedGrants": 1,
        "preRevocationActiveGrantCount": 2,
    }


def _device(event: str, scene: Scene) -> Json:
    trusted_until = scene.at + 30 * _DAY_MS
    device = {"id": scene.id, "userId": scene.new_id(), "expiresAt": trusted_until}
    return head(event, scene.at) | {"data": device}


def _membership(event: str, scene: Scene) -> Json:
    body = _managed("POST /organizations/:id/users")(event, scene)
    return body | {"organizationId": scene.id, "addedUserIds": [scene.new_id()]}


def _member(event: str, scene: Scene) -> Json:
    return head(event, scene.at) | {"organizationId": scene.id, "userId": scene.new_id()}


def _suspended_user(scene: Scene) -> Json:
    return _user_of_api(scene) | {"isSuspended": True}


_BODIES: Final[dict[str, _MakeBody]] = {
    "PostRegister": _interaction("Register", _new(user)),
    "PostSignIn": _interaction("SignIn"),
    "PostSignInAdaptiveMfaTriggered": _interaction("SignIn"),
    "PostResetPassword": _interaction("ForgotPassword"),
    "User.Created": _managed("POST /users", _new(_user_of_api)),
    "User.Deleted": _managed("DELETE /users/:userId", user),
    "User.Data.Updated": _managed("PATCH /users/:userId", _user_of_api),
    "User.SuspensionStatus.Updated": _managed("PATCH /users/:userId/is-suspended", _suspended_user),
    "Role.Created": _managed("POST /roles", _role),
    "Role.Deleted": _managed("DELETE /roles/:id"),
    "Role.Data.Updated": _managed("PATCH /roles/:id", _role),
    "Role.Scopes.Updated": _managed("POST /roles/:id/scopes", _scopes),
    "Scope.Created": _managed_scope("POST"),
    "Scope.Deleted": _managed_scope("DELETE", "/:scopeId"),
    "Scope.Data.Updated": _managed_scope("PATCH", "/:scopeId"),
    "Organization.Created": _managed("POST /organizations", _new(organization)),
    "Organization.Deleted": _managed("DELETE /organizations/:id"),
    "Organization.Data.Updated": _managed("PATCH /organizations/:id", organization),
    "Organization.Membership.Updated": _membership,
    "Organization.User.Added": _member,
    "Organization.User.Removed": _member,
    "OrganizationRole.Created": _managed("POST /organization-roles", _organization_role),
    "OrganizationRole.Deleted": _managed("DELETE /organization-roles/:id"),
    "OrganizationRole.Data.Updated": _managed("PATCH /organization-roles/:id", _organization_role),
    "OrganizationRole.Scopes.Updated": _managed("POST /organization-roles/:id/scopes"),
    "OrganizationScope.Created": _managed("POST /organization-scopes", _organization_scope),
    "OrganizationScope.Deleted": _managed("DELETE /organization-scopes/:id"),
    "OrganizationScope.Data.Updated": _managed(
        "PATCH /organization-scopes/:id", _organization_scope
    ),
    "Identifier.Lockout": _lockout,
    "Message.RateLimited": _message_limit,
    "Grant.LimitExceeded": _grant_limit,
    "TrustedDevice.Created": _device,
    "TrustedDevice.Deleted": _device,
}


# Top-level fields of some payloads, in addition to those of the sample.
_TOP_LEVEL: Final = frozenset(
    {
        *("path", "method", "status", "params", "matchedRoute", "data"),
        *("interactionEvent", "sessionId", "applicationId", "application", "ip"),
        *("userId", "userIp", "organizationId", "addedUserIds", "removedUserIds"),
        *("addedApplicationIds", "removedApplicationIds"),
    }
)
_USER_FIELDS: Final = shapes.user("", 0, {}).keys() | {"ssoIdentities", "mfaVerificationFactors"}


def _set(event: str, body: Json, name: str, value: Any) -> None:
    *path, last = _find_path(event, body, name)
    target = body
    for step in path:
        target = target.setdefault(step, {})
        if not isinstance(target, dict):
            raise SettingInvalid(name=f"the field {name!r}", problem=f"{step} has no fields")
    target[last] = value


def _find_path(event: str, body: Json, name: str) -> list[str]:
    """Find the path of a field in a payload. Raises SettingInvalid."""
    at = next((at for at in ("user", "data") if isinstance(body.get(at), dict)), "")
    record: Json = body.get(at, {})
    fields = record.keys() | (_USER_FIELDS if "avatar" in record else set())
    known = fields | {short for short, long in _SHORT_NAMES.items() if long in fields}
    first, *rest = name.split(".")
    if first == at and rest:
        first, *rest = rest
        if first in fields:
            return [at, first, *rest]
    elif first in body:
        return [first, *rest]
    elif first in known:
        return [at, _SHORT_NAMES.get(first, first), *rest]
    elif first in _TOP_LEVEL:
        return [first, *rest]
    else:
        known |= body.keys() | _TOP_LEVEL
    problem = f"{event} has no such field; {nearest(first, sorted(known))}"
    raise SettingInvalid(name=f"the field {name!r}", problem=problem)
