"""Typed events: all that Logto 1.42 sends, two of a later Logto, two that are derived, and the
record's own, which tell what changed here.

`parse` turns a verified body into one of them. To add an event, write its class beside its
kin and name it in `catalog.py`, which makes it known everywhere.
"""

from logto_webhooks.core.events.access import (
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
from logto_webhooks.core.events.base import (
    Application,
    Event,
    TestPayload,
    UnknownEvent,
)
from logto_webhooks.core.events.catalog import named
from logto_webhooks.core.events.local import (
    LocalMemberAdded,
    LocalMemberRemoved,
    LocalOrganizationCreated,
    LocalOrganizationDeleted,
    LocalOrganizationUpdated,
    LocalUserCreated,
    LocalUserDeleted,
    LocalUserUpdated,
)
from logto_webhooks.core.events.organizations import (
    Organization,
    OrganizationCreated,
    OrganizationDataUpdated,
    OrganizationDeleted,
    OrganizationMembershipUpdated,
    OrganizationUserAdded,
    OrganizationUserRemoved,
)
from logto_webhooks.core.events.parsing import parse
from logto_webhooks.core.events.security import (
    GrantLimitExceeded,
    IdentifierLockout,
    MessageRateLimited,
    TrustedDeviceCreated,
    TrustedDeviceDeleted,
)
from logto_webhooks.core.events.users import (
    PostRegister,
    PostResetPassword,
    PostSignIn,
    PostSignInAdaptiveMfaTriggered,
    User,
    UserCreated,
    UserDataUpdated,
    UserDeleted,
    UserSuspensionStatusUpdated,
)

__all__ = [
    "Application",
    "Event",
    "GrantLimitExceeded",
    "IdentifierLockout",
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
