"""Events about organizations and their members."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from msgspec import Struct

from logto_webhooks.events.base import Event, Id, Json, has_whole_record

WHOLE_ROUTES: Final = ("/organizations", "/organizations/:id")


class Organization(Struct, frozen=True, kw_only=True, rename="camel"):
    """An organization as Logto's API returns it. It has no `updatedAt`."""

    id: Id
    name: str
    description: str | None = None
    custom_data: Json = {}
    created_at: int | None = None


class OrganizationEvent(Event, frozen=True, kw_only=True):
    """An event about one organization."""

    strict: ClassVar[frozenset[str]] = frozenset({"createdAt", "organizationId", "organization"})
    id_as: ClassVar[str | None] = "organizationId"

    organization_id: Id


class WholeOrganizationEvent(OrganizationEvent, frozen=True, kw_only=True):
    """An event with the whole new state; None if this release doesn't know Logto's route."""

    organization: Organization | None = None

    @classmethod
    def shape(cls, payload: Json) -> Json:
        """Use `data` as the organization only if the route says so."""
        whole = payload.get("data") if has_whole_record(payload, WHOLE_ROUTES) else None
        return super().shape(payload) | {"organization": whole}


class OrganizationCreated(WholeOrganizationEvent, frozen=True, kw_only=True):
    """An organization was created."""

    name: ClassVar[str] = "Organization.Created"


class OrganizationDataUpdated(WholeOrganizationEvent, frozen=True, kw_only=True):
    """An organization was changed."""

    name: ClassVar[str] = "Organization.Data.Updated"


class OrganizationDeleted(OrganizationEvent, frozen=True, kw_only=True):
    """An organization was deleted, with its memberships."""

    name: ClassVar[str] = "Organization.Deleted"


class OrganizationMembershipUpdated(OrganizationEvent, frozen=True, kw_only=True):
    """Members were added or removed. Logto cuts each list at 5,000 without notice, and leaves out
    an empty list. Without any list, only the Management API knows what changed. There is one
    exception: if the call removes one member, `removed_user_ids` has this user."""

    name: ClassVar[str] = "Organization.Membership.Updated"
    strict: ClassVar[frozenset[str]] = frozenset(
        {"createdAt", "organizationId", "addedUserIds", "removedUserIds"}
    )
    # Only `organizationId` is reliable: `params.id` may be the id of an invitation.
    id_as: ClassVar[str | None] = None

    @classmethod
    def shape(cls, payload: Json) -> Json:
        """Without lists (Logto before mid 2026), take the removed member from the API call.

        The status of the call doesn't matter: older Logto returns 404 for a successful change.
        """
        shaped, params = super().shape(payload), payload.get("params")
        removal = _REMOVALS.get((str(payload.get("method")), str(payload.get("matchedRoute"))))
        if removal and isinstance(params, dict) and payload.keys().isdisjoint(_LISTS):
            name, param = removal
            if params.get(param) is not None:
                shaped[name] = [params[param]]
        return shaped

    added_user_ids: list[Id] = []
    removed_user_ids: list[Id] = []
    added_application_ids: list[str] = []
    removed_application_ids: list[str] = []

    def derived(self) -> list[OrganizationMemberEvent]:
        """Return one event for each user who was added or removed. Logto doesn't send these."""
        shared = {name: getattr(self, name) for name in OrganizationEvent.__struct_fields__}
        moves: list[tuple[type[OrganizationMemberEvent], list[str]]] = [
            (OrganizationUserAdded, self.added_user_ids),
            (OrganizationUserRemoved, self.removed_user_ids),
        ]
        return [
            cls(**shared | {"event": cls.name, "user_id": user_id})
            for cls, user_ids in moves
            for user_id in user_ids
        ]


_LISTS: Final = ("addedUserIds", "removedUserIds", "addedApplicationIds", "removedApplicationIds")
_REMOVALS: Final[dict[Any, tuple[str, str]]] = {
    ("DELETE", "/organizations/:id/users/:userId"): ("removedUserIds", "userId"),
    ("DELETE", "/organizations/:id/applications/:applicationId"): (
        "removedApplicationIds",
        "applicationId",
    ),
}


class OrganizationMemberEvent(OrganizationEvent, frozen=True, kw_only=True):
    """A user joined or left an organization. Derived from the membership event."""

    strict: ClassVar[frozenset[str]] = frozenset({"createdAt", "organizationId", "userId"})

    user_id: Id


class OrganizationUserAdded(OrganizationMemberEvent, frozen=True, kw_only=True):
    """A user became a member."""

    name: ClassVar[str] = "Organization.User.Added"


class OrganizationUserRemoved(OrganizationMemberEvent, frozen=True, kw_only=True):
    """A user is no longer a member."""

    name: ClassVar[str] = "Organization.User.Removed"
