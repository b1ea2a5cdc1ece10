"""Events about roles and scopes."""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct

from logto_webhooks.events.base import Event


class Role(Struct, frozen=True, kw_only=True, rename="camel"):
    """A role. Organization roles have no `is_default`."""

    id: str
    name: str | None = None
    description: str | None = None
    type: str | None = None
    is_default: bool | None = None


class Scope(Struct, frozen=True, kw_only=True, rename="camel"):
    """A scope. Organization scopes have no `resource_id`."""

    id: str
    name: str | None = None
    description: str | None = None
    resource_id: str | None = None


class RoleEvent(Event, frozen=True, kw_only=True):
    """An event about one role. `role` is its new state."""

    data_as: ClassVar[str | None] = "role"
    id_as: ClassVar[str | None] = "roleId"

    role_id: str | None = None
    role: Role | None = None


class RoleScopesEvent(Event, frozen=True, kw_only=True):
    """The scopes of a role changed. `scopes` are the new ones, if Logto sent them."""

    data_as: ClassVar[str | None] = "scopes"
    id_as: ClassVar[str | None] = "roleId"

    role_id: str | None = None
    scopes: list[Scope] | None = None


class ScopeEvent(Event, frozen=True, kw_only=True):
    """An event about one scope. `scope` is its new state."""

    data_as: ClassVar[str | None] = "scope"
    id_as: ClassVar[str | None] = "scopeId"
    id_param: ClassVar[str] = "scopeId"

    scope_id: str | None = None
    scope: Scope | None = None


class OrganizationScopeEvent(ScopeEvent, frozen=True, kw_only=True):
    """An event about one scope of the organization template."""

    id_param: ClassVar[str] = "id"


class RoleCreated(RoleEvent, frozen=True, kw_only=True):
    """A role was created."""

    name: ClassVar[str] = "Role.Created"


class RoleDataUpdated(RoleEvent, frozen=True, kw_only=True):
    """A role was changed."""

    name: ClassVar[str] = "Role.Data.Updated"


class RoleDeleted(RoleEvent, frozen=True, kw_only=True):
    """A role was deleted."""

    name: ClassVar[str] = "Role.Deleted"


class RoleScopesUpdated(RoleScopesEvent, frozen=True, kw_only=True):
    """A role got or lost scopes."""

    name: ClassVar[str] = "Role.Scopes.Updated"


class ScopeCreated(ScopeEvent, frozen=True, kw_only=True):
    """A scope was created."""

    name: ClassVar[str] = "Scope.Created"


class ScopeDataUpdated(ScopeEvent, frozen=True, kw_only=True):
    """A scope was changed."""

    name: ClassVar[str] = "Scope.Data.Updated"


class ScopeDeleted(ScopeEvent, frozen=True, kw_only=True):
    """A scope was deleted."""

    name: ClassVar[str] = "Scope.Deleted"


class OrganizationRoleCreated(RoleEvent, frozen=True, kw_only=True):
    """A role was added to the organization template."""

    name: ClassVar[str] = "OrganizationRole.Created"


class OrganizationRoleDataUpdated(RoleEvent, frozen=True, kw_only=True):
    """A role of the organization template was changed."""

    name: ClassVar[str] = "OrganizationRole.Data.Updated"


class OrganizationRoleDeleted(RoleEvent, frozen=True, kw_only=True):
    """A role of the organization template was deleted."""

    name: ClassVar[str] = "OrganizationRole.Deleted"


class OrganizationRoleScopesUpdated(RoleScopesEvent, frozen=True, kw_only=True):
    """A role of the organization template got or lost scopes."""

    name: ClassVar[str] = "OrganizationRole.Scopes.Updated"


class OrganizationScopeCreated(OrganizationScopeEvent, frozen=True, kw_only=True):
    """A scope was added to the organization template."""

    name: ClassVar[str] = "OrganizationScope.Created"


class OrganizationScopeDataUpdated(OrganizationScopeEvent, frozen=True, kw_only=True):
    """A scope of the organization template was changed."""

    name: ClassVar[str] = "OrganizationScope.Data.Updated"


class OrganizationScopeDeleted(OrganizationScopeEvent, frozen=True, kw_only=True):
    """A scope of the organization template was deleted."""

    name: ClassVar[str] = "OrganizationScope.Deleted"
