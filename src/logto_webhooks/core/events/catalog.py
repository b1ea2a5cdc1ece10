"""Every event by its name. An event that isn't in this table is unknown."""

from __future__ import annotations

import difflib
from typing import Final

from logto_webhooks.core.events import access, organizations, security, users
from logto_webhooks.core.events.base import Event
from logto_webhooks.errors import UnknownEventName

_ALL: Final[tuple[type[Event], ...]] = (
    users.PostRegister,
    users.PostSignIn,
    users.PostSignInAdaptiveMfaTriggered,
    users.PostResetPassword,
    users.UserCreated,
    users.UserDeleted,
    users.UserDataUpdated,
    users.UserSuspensionStatusUpdated,
    access.RoleCreated,
    access.RoleDeleted,
    access.RoleDataUpdated,
    access.RoleScopesUpdated,
    access.ScopeCreated,
    access.ScopeDeleted,
    access.ScopeDataUpdated,
    organizations.OrganizationCreated,
    organizations.OrganizationDeleted,
    organizations.OrganizationDataUpdated,
    organizations.OrganizationMembershipUpdated,
    access.OrganizationRoleCreated,
    access.OrganizationRoleDeleted,
    access.OrganizationRoleDataUpdated,
    access.OrganizationRoleScopesUpdated,
    access.OrganizationScopeCreated,
    access.OrganizationScopeDeleted,
    access.OrganizationScopeDataUpdated,
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
