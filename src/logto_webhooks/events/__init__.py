"""Typed events: all events of Logto 1.42, two of a later Logto, two derived events, and the local
events, which report changes in your database.

`parse` turns a verified body into an event.
"""

import difflib
from typing import Final

from msgspec.structs import replace

from logto_webhooks import canonical_json
from logto_webhooks.errors import NotADelivery, UnknownEventName
from logto_webhooks.events.base import (
    Application,
    Event,
    Json,
    TestPayload,
    UnknownEvent,
    build,
    corrected,
    is_test,
)
from logto_webhooks.events.local import (
    LocalEvent,
    LocalMemberAdded,
    LocalMemberRemoved,
    LocalOrganizationCreated,
    LocalOrganizationDeleted,
    LocalOrganizationUpdated,
    LocalUserCreated,
    LocalUserDeleted,
    LocalUserUpdated,
)
from logto_webhooks.events.organizations import (
    Organization,
    OrganizationCreated,
    OrganizationDataUpdated,
    OrganizationDeleted,
    OrganizationMembershipUpdated,
    OrganizationUserAdded,
    OrganizationUserRemoved,
)
from logto_webhooks.events.rbac import (
    OrganizationRoleCreated,
    OrganizationRoleDataUpdated,
    OrganizationRoleDeleted,
    OrganizationRoleScopesUpdated,
    OrganizationScopeCreated,
    OrganizationScopeDataUpdated,
    OrganizationScopeDeleted,
    Role,
    RoleCreated,
    RoleDataUpdated,
    RoleDeleted,
    RoleScopesUpdated,
    Scope,
    ScopeCreated,
    ScopeDataUpdated,
    ScopeDeleted,
)
from logto_webhooks.events.users import (
    GrantLimitExceeded,
    IdentifierLockout,
    MessageRateLimited,
    PostRegister,
    PostResetPassword,
    PostSignIn,
    PostSignInAdaptiveMfaTriggered,
    TrustedDeviceCreated,
    TrustedDeviceDeleted,
    User,
    UserCreated,
    UserDataUpdated,
    UserDeleted,
    UserSuspensionStatusUpdated,
)
from logto_webhooks.signing_keys import VerifiedBody

__all__ = [
    "Application",
    "Event",
    "GrantLimitExceeded",
    "IdentifierLockout",
    "LocalEvent",
    "LocalMemberAdded",
    "LocalMemberRemoved",
    "LocalOrganizationCreated",
    "LocalOrganizationDeleted",
    "LocalOrganizationUpdated",
    "LocalUserCreated",
    "LocalUserDeleted",
    "LocalUserUpdated",
    "MessageRateLimited",
    "Organization",
    "OrganizationCreated",
    "OrganizationDataUpdated",
    "OrganizationDeleted",
    "OrganizationMembershipUpdated",
    "OrganizationRoleCreated",
    "OrganizationRoleDataUpdated",
    "OrganizationRoleDeleted",
    "OrganizationRoleScopesUpdated",
    "OrganizationScopeCreated",
    "OrganizationScopeDataUpdated",
    "OrganizationScopeDeleted",
    "OrganizationUserAdded",
    "OrganizationUserRemoved",
    "PostRegister",
    "PostResetPassword",
    "PostSignIn",
    "PostSignInAdaptiveMfaTriggered",
    "Role",
    "RoleCreated",
    "RoleDataUpdated",
    "RoleDeleted",
    "RoleScopesUpdated",
    "Scope",
    "ScopeCreated",
    "ScopeDataUpdated",
    "ScopeDeleted",
    "TestPayload",
    "TrustedDeviceCreated",
    "TrustedDeviceDeleted",
    "UnknownEvent",
    "User",
    "UserCreated",
    "UserDataUpdated",
    "UserDeleted",
    "UserSuspensionStatusUpdated",
    "named",
    "parse",
]

# All events of Logto and all derived events, in the order in which docs and messages list them.
_ALL: Final[tuple[type[Event], ...]] = (
    PostRegister,
    PostSignIn,
    PostSignInAdaptiveMfaTriggered,
    PostResetPassword,
    UserCreated,
    UserDeleted,
    UserDataUpdated,
    UserSuspensionStatusUpdated,
    RoleCreated,
    RoleDeleted,
    RoleDataUpdated,
    RoleScopesUpdated,
    ScopeCreated,
    ScopeDeleted,
    ScopeDataUpdated,
    OrganizationCreated,
    OrganizationDeleted,
    OrganizationDataUpdated,
    OrganizationMembershipUpdated,
    OrganizationRoleCreated,
    OrganizationRoleDeleted,
    OrganizationRoleDataUpdated,
    OrganizationRoleScopesUpdated,
    OrganizationScopeCreated,
    OrganizationScopeDeleted,
    OrganizationScopeDataUpdated,
    IdentifierLockout,
    MessageRateLimited,
    GrantLimitExceeded,
    TrustedDeviceCreated,
    TrustedDeviceDeleted,
    OrganizationUserAdded,
    OrganizationUserRemoved,
)

BY_NAME: Final[dict[str, type[Event]]] = {event.name: event for event in _ALL}

# Other names that people use for some events.
ALIASES: Final[dict[str, str]] = {
    "User.Updated": "User.Data.Updated",
    "Organization.Updated": "Organization.Data.Updated",
    "Post.SignIn": "PostSignIn",
    "Post.Register": "PostRegister",
    "Post.ResetPassword": "PostResetPassword",
}


# This package derives these from Logto's events. A handler must name them.
DERIVED: Final = frozenset({OrganizationUserAdded.name, OrganizationUserRemoved.name})


def named(name: str) -> type[Event]:
    """Find the class of an event by its name or alias. Raises UnknownEventName."""
    event = BY_NAME.get(ALIASES.get(name, name))
    if event is None:
        near = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Known events: {', '.join(BY_NAME)}."
        raise UnknownEventName(name=name, hint=hint)
    return event


def parse(body: VerifiedBody, occurred_at: int | None = None) -> Event:
    """Parse a verified body. An event with an unknown name becomes an UnknownEvent.

    Values nested deeper than 64 levels become JSON strings. `occurred_at` (ms) is the delivery's
    time in the inbox, and replaces an implausible `createdAt`.

    Raises NotADelivery, or MalformedEvent if a required field has the wrong type.
    """
    payload = canonical_json.shown(payload_of(body))
    return from_payload(payload, None if occurred_at is None else corrected(payload, occurred_at))


def parse_member(
    body: VerifiedBody, name: str, user_id: str, occurred_at: int | None = None
) -> Event:
    """Parse a verified body of a membership event as the derived event of one of its members. The
    others, which can be thousands, are neither checked nor made into events.

    Raises NotADelivery, MalformedEvent.
    """
    payload = canonical_json.shown(payload_of(body))
    lists = {list_: [user_id] for list_ in ("addedUserIds", "removedUserIds") if list_ in payload}
    at = None if occurred_at is None else corrected(payload, occurred_at)
    event = from_payload(payload | lists, at)
    if not isinstance(event, OrganizationMembershipUpdated):
        return event
    [member_event] = [one for one in event.derived() if (one.event, one.user_id) == (name, user_id)]
    return replace(member_event, payload=payload)


def from_payload(payload: Json, at: int | None = None) -> Event:
    """Make the event of a payload from `payload_of`. Raises MalformedEvent."""
    if is_test(payload):
        return build(payload, TestPayload, at)
    name: str = payload["event"]
    return build(payload, BY_NAME.get(ALIASES.get(name, name), UnknownEvent), at)


def payload_of(body: VerifiedBody) -> Json:
    """Decode a verified body to a JSON object that names its event. Raises NotADelivery."""
    try:
        payload = canonical_json.decode(body.content)
    except ValueError as error:
        raise NotADelivery(problem=f"it isn't JSON ({_describe(error)})") from None
    if not isinstance(payload, dict):
        raise NotADelivery(problem="it isn't a JSON object")
    if not isinstance(payload.get("event"), str) or not payload["event"]:
        raise NotADelivery(problem="it has no event")
    return payload


def _describe(error: ValueError) -> str:
    # The text of a UnicodeDecodeError would reveal bytes of the body.
    return "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
