"""Event classes by name, and the parsing of payloads."""

from __future__ import annotations

import difflib
from typing import Final

from logto_webhooks import canonical_json
from logto_webhooks.errors import NotADelivery, UnknownEventName
from logto_webhooks.events import organizations, rbac, security, users
from logto_webhooks.events.base import (
    Event,
    Json,
    TestPayload,
    UnknownEvent,
    build,
    corrected,
    is_test,
)
from logto_webhooks.signing_keys import VerifiedBody

_ALL: Final[tuple[type[Event], ...]] = (
    users.PostRegister,
    users.PostSignIn,
    users.PostSignInAdaptiveMfaTriggered,
    users.PostResetPassword,
    users.UserCreated,
    users.UserDeleted,
    users.UserDataUpdated,
    users.UserSuspensionStatusUpdated,
    rbac.RoleCreated,
    rbac.RoleDeleted,
    rbac.RoleDataUpdated,
    rbac.RoleScopesUpdated,
    rbac.ScopeCreated,
    rbac.ScopeDeleted,
    rbac.ScopeDataUpdated,
    organizations.OrganizationCreated,
    organizations.OrganizationDeleted,
    organizations.OrganizationDataUpdated,
    organizations.OrganizationMembershipUpdated,
    rbac.OrganizationRoleCreated,
    rbac.OrganizationRoleDeleted,
    rbac.OrganizationRoleDataUpdated,
    rbac.OrganizationRoleScopesUpdated,
    rbac.OrganizationScopeCreated,
    rbac.OrganizationScopeDeleted,
    rbac.OrganizationScopeDataUpdated,
    security.IdentifierLockout,
    security.MessageRateLimited,
    security.GrantLimitExceeded,
    security.TrustedDeviceCreated,
    security.TrustedDeviceDeleted,
    organizations.OrganizationUserAdded,
    organizations.OrganizationUserRemoved,
)

BY_NAME: Final[dict[str, type[Event]]] = {event.name: event for event in _ALL}

# Names found in the wild, which mean what they say.
ALIASES: Final[dict[str, str]] = {
    "User.Updated": "User.Data.Updated",
    "Organization.Updated": "Organization.Data.Updated",
    "Post.SignIn": "PostSignIn",
    "Post.Register": "PostRegister",
    "Post.ResetPassword": "PostResetPassword",
}


# Made by this package of what Logto sends: whoever wants them names them.
DERIVED: Final = frozenset(
    {organizations.OrganizationUserAdded.name, organizations.OrganizationUserRemoved.name}
)


def named(name: str) -> type[Event]:
    """Find the class of an event by its name or alias. Raises UnknownEventName."""
    known = BY_NAME.get(ALIASES.get(name, name))
    if known is None:
        near = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(BY_NAME)}."
        raise UnknownEventName(name=name, hint=hint)
    return known


def parse(body: VerifiedBody, occurred_at: int | None = None) -> Event:
    """Parse a verified body. An event with an unknown name becomes an UnknownEvent.

    Values nested deeper than 64 levels become strings of JSON. `occurred_at` (ms) is the inbox's
    date of the delivery, and replaces an implausible `createdAt`.

    Raises NotADelivery, or MalformedEvent if a field that the sync needs has the wrong type.
    """
    payload = canonical_json.shown(payload_of(body))
    return from_payload(payload, None if occurred_at is None else corrected(payload, occurred_at))


def from_payload(payload: Json, at: int | None = None) -> Event:
    """Make the event of a payload that `payload_of` gave. Raises MalformedEvent."""
    if is_test(payload):
        return build(payload, TestPayload, at)
    name: str = payload["event"]
    return build(payload, BY_NAME.get(ALIASES.get(name, name), UnknownEvent), at)


def payload_of(body: VerifiedBody) -> Json:
    """Decode a verified body to a JSON object that names its event. Raises NotADelivery."""
    try:
        payload = canonical_json.decode(body.content)
    except ValueError as error:
        raise NotADelivery(problem=f"it isn't JSON ({_where(error)})") from None
    if not isinstance(payload, dict):
        raise NotADelivery(problem="it isn't a JSON object")
    if not isinstance(payload.get("event"), str) or not payload["event"]:
        raise NotADelivery(problem="it names no event")
    return payload


def _where(error: ValueError) -> str:
    # A UnicodeDecodeError's text shows bytes of the body.
    return "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
