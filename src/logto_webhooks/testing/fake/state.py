"""What Logto's database holds, and the views of it that its API answers."""

from __future__ import annotations

from logto_webhooks.samples.shapes import Json, public
from logto_webhooks.testing.fake.log import Log
from logto_webhooks.testing.fake.roll import UserTable


class FakeState:
    """Records are replaced, never changed in place: what was sent of one stays as it was."""

    def __init__(self) -> None:
        self.users: UserTable = UserTable()
        self.organizations: dict[str, Json] = {}
        self.members: dict[str, dict[str, list[Json]]] = {}
        self.roles: dict[str, Json] = {}
        self.user_roles: dict[str, list[Json]] = {}
        self.hooks: dict[str, Json] = {}
        self.logs: dict[str, Log] = {}

    def user(self, user_id: str) -> Json:
        """A user. Raises KeyError."""
        found = self.users.get(user_id)
        if found is None:
            raise KeyError(user_id)
        return found

    def all_organizations(self) -> list[Json]:
        """The organizations in the order of Logto's listing."""
        return [self.organizations[each] for each in sorted(self.organizations)]

    def organization_users(self, organization_id: str, offset: int, size: int) -> list[Json]:
        """Some members, with their roles in the organization; none where it is unknown."""
        members = self.members.get(organization_id, {})
        listed = sorted(members)[offset : offset + size]
        return [
            public(self.user(each)) | {"organizationRoles": list(members[each])} for each in listed
        ]

    def user_organizations(self, user_id: str) -> list[Json]:
        """A user's organizations, with the roles there."""
        return [
            each | {"organizationRoles": list(self.members[each["id"]][user_id])}
            for each in self.all_organizations()
            if user_id in self.members[each["id"]]
        ]

    def all_roles(self) -> list[Json]:
        """The roles, with what the listing says of who has them."""
        return [
            role
            | {
                "usersCount": len(self._holders(role["id"])),
                "featuredUsers": [],
                "applicationsCount": 0,
                "featuredApplications": [],
            }
            for role in self.roles.values()
        ]

    def holders(self, role_id: str, offset: int, size: int) -> tuple[list[Json], int]:
        """Some users who have a role, and how many there are."""
        holders = self._holders(role_id)
        return [public(self.user(each)) for each in holders[offset : offset + size]], len(holders)

    def _holders(self, role_id: str) -> list[str]:
        return sorted(
            user_id
            for user_id, roles in self.user_roles.items()
            if any(role["id"] == role_id for role in roles)
        )

    def all_hooks(self) -> list[Json]:
        """The webhooks, the newest first."""
        newest_last = sorted(self.hooks.values(), key=lambda hook: int(hook["createdAt"]))
        return newest_last[::-1]

    def add_organization(self, organization: Json) -> None:
        """Add an organization, without members."""
        self.organizations[organization["id"]] = organization
        self.members[organization["id"]] = {}

    def drop_organization(self, organization_id: str) -> None:
        """Delete an organization with its memberships. Raises KeyError."""
        del self.organizations[organization_id]
        del self.members[organization_id]

    def drop_user(self, user_id: str) -> None:
        """Delete a user with the memberships and roles. Raises KeyError."""
        self.users.drop(user_id)
        self.user_roles.pop(user_id, None)
        for members in self.members.values():
            members.pop(user_id, None)

    def add_hook(self, hook: Json) -> None:
        """Add a webhook, with an empty log."""
        self.hooks[hook["id"]] = hook
        self.logs[hook["id"]] = Log()

    def drop_hook(self, hook_id: str) -> None:
        """Delete a webhook with its log, of which nothing is shown any more. Raises KeyError."""
        del self.hooks[hook_id]
        del self.logs[hook_id]

    def log(self, hook_id: str) -> Log:
        """A webhook's log; an empty one where it is unknown."""
        return self.logs.get(hook_id) or Log()
