"""Local events: changes in your database, whatever their source.

A local event is created in the transaction that changes the row, once per change. Several
deliveries that are applied in one transaction make one change.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Final, Literal

from msgspec import Struct

Source = Literal[
    "webhook", "log", "replay", "read", "reconcile", "backfill", "ensure_user", "existing"
]


class UserRow(Struct, frozen=True, kw_only=True):
    """A row of `logto_users`. `id` is the local id."""

    id: str
    logto_user_id: str
    username: str | None = None
    email: str | None = None
    phone: str | None = None
    name: str | None = None
    avatar: str | None = None
    profile: dict[str, Any] = {}
    identities: dict[str, Any] = {}
    custom_data: dict[str, Any] = {}
    is_suspended: bool = False
    last_sign_in_at: datetime | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    deleted_at: datetime | None = None


class OrganizationRow(Struct, frozen=True, kw_only=True):
    """A row of `logto_organizations`. `id` is the local id."""

    id: str
    logto_organization_id: str
    name: str
    description: str | None = None
    custom_data: dict[str, Any] = {}
    created_at: datetime | None = None
    updated_at: datetime | None = None
    deleted_at: datetime | None = None


Changes = dict[str, tuple[Any, Any]]  # column -> (old, new)


def _read_times(changes: Changes) -> None:
    """Make datetimes of the texts of times: a job's event was stored as JSON."""
    for name in [name for name in changes if name.endswith("_at")]:
        old, new = (
            datetime.fromisoformat(value) if isinstance(value, str) else value
            for value in changes[name]
        )
        changes[name] = (old, new)


class LocalEvent(Struct, frozen=True, kw_only=True):
    """The fields of all local events."""

    name: ClassVar[str] = ""

    source: Source


class LocalUserEvent(LocalEvent, frozen=True, kw_only=True):
    """An event about one user, with its current row."""

    user: UserRow


class LocalUserCreated(LocalUserEvent, frozen=True, kw_only=True):
    """A user was created in your database: once per Logto id, and again after a deletion
    (`restored`)."""

    name: ClassVar[str] = "LocalUserCreated"
    restored: bool = False


class LocalUserUpdated(LocalUserEvent, frozen=True, kw_only=True):
    """Columns of a user changed. `changes` has the old and the new value of each."""

    name: ClassVar[str] = "LocalUserUpdated"
    changes: Changes

    def __post_init__(self) -> None:
        """Read times."""
        _read_times(self.changes)


class LocalUserDeleted(LocalUserEvent, frozen=True, kw_only=True):
    """A user was deleted. `user` is the last state."""

    name: ClassVar[str] = "LocalUserDeleted"


class LocalOrganizationEvent(LocalEvent, frozen=True, kw_only=True):
    """An event about one organization, with its current row."""

    organization: OrganizationRow


class LocalOrganizationCreated(LocalOrganizationEvent, frozen=True, kw_only=True):
    """An organization was created in your database: once per Logto id, and again after a deletion
    (`restored`)."""

    name: ClassVar[str] = "LocalOrganizationCreated"
    restored: bool = False


class LocalOrganizationUpdated(LocalOrganizationEvent, frozen=True, kw_only=True):
    """Columns of an organization changed. `changes` has the old and the new value of each."""

    name: ClassVar[str] = "LocalOrganizationUpdated"
    changes: Changes

    def __post_init__(self) -> None:
        """Read times."""
        _read_times(self.changes)


class LocalOrganizationDeleted(LocalOrganizationEvent, frozen=True, kw_only=True):
    """An organization was deleted. `organization` is the last state."""

    name: ClassVar[str] = "LocalOrganizationDeleted"


class LocalMemberEvent(LocalEvent, frozen=True, kw_only=True):
    """An event about one membership. Both ids are Logto's."""

    organization_id: str
    user_id: str


class LocalMemberAdded(LocalMemberEvent, frozen=True, kw_only=True):
    """A user became a member. Both the user and the organization are in the tables."""

    name: ClassVar[str] = "LocalMemberAdded"


class LocalMemberRemoved(LocalMemberEvent, frozen=True, kw_only=True):
    """A user is no longer a member: the user was removed, or the user or the organization was
    deleted."""

    name: ClassVar[str] = "LocalMemberRemoved"


LOCAL: Final[dict[str, type[LocalEvent]]] = {
    event.name: event
    for event in (
        LocalUserCreated,
        LocalUserUpdated,
        LocalUserDeleted,
        LocalOrganizationCreated,
        LocalOrganizationUpdated,
        LocalOrganizationDeleted,
        LocalMemberAdded,
        LocalMemberRemoved,
    )
}
