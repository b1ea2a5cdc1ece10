"""The records of Logto's database, and the views of them that its API returns."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from logto_webhooks.samples import shapes
from logto_webhooks.samples.shapes import Json, public
from logto_webhooks.testing.fake.log import Log, MadeUsers


class FakeState:
    """Records are replaced, never changed in place, so that queued payloads don't change."""

    def __init__(self) -> None:
        self.users: UserTable = UserTable()
        self.organizations: dict[str, Json] = {}
        self.members: dict[str, dict[str, list[Json]]] = {}
        self.roles: dict[str, Json] = {}
        self.user_roles: dict[str, list[Json]] = {}
        self.hooks: dict[str, Json] = {}
        self.logs: dict[str, Log] = {}

    def user(self, user_id: str) -> Json:
        """Return a user. Raises KeyError."""
        user = self.users.get(user_id)
        if user is None:
            raise KeyError(user_id)
        return user

    def all_organizations(self) -> list[Json]:
        """Return the organizations in the order of Logto's listing."""
        return [organization for _, organization in sorted(self.organizations.items())]

    def organization_users(self, organization_id: str) -> Sequence[Json]:
        """Return members with their roles in the organization; none if it is unknown."""
        members = self.members.get(organization_id, {})
        ids = sorted(members)

        def make(place: int) -> Json:
            roles = list(members[ids[place]])
            return public(self.user(ids[place])) | {"organizationRoles": roles}

        return MadeUsers(len(ids), make)

    def user_organizations(self, user_id: str) -> list[Json]:
        """Return a user's organizations, with the user's roles there."""
        return [
            organization | {"organizationRoles": list(self.members[organization["id"]][user_id])}
            for organization in self.all_organizations()
            if user_id in self.members[organization["id"]]
        ]

    def all_roles(self) -> list[Json]:
        """Return the roles, with the listing's fields about their users."""
        featured = {"featuredUsers": [], "applicationsCount": 0, "featuredApplications": []}
        return [
            role | {"usersCount": len(self.holders(role["id"]))} | featured
            for role in self.roles.values()
        ]

    def holders(self, role_id: str) -> Sequence[Json]:
        """Return the users who have a role."""
        ids = sorted(
            user_id
            for user_id, roles in self.user_roles.items()
            if any(role["id"] == role_id for role in roles)
        )
        return MadeUsers(len(ids), lambda place: public(self.user(ids[place])))

    def all_hooks(self) -> list[Json]:
        """Return the webhooks, the newest first."""
        return sorted(self.hooks.values(), key=_get_start)[::-1]

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
        """Delete a webhook with its log. Raises KeyError."""
        del self.hooks[hook_id]
        del self.logs[hook_id]

    def log(self, hook_id: str) -> Log:
        """Return a webhook's log; an empty one if it is unknown."""
        return self.logs.get(hook_id) or Log()


class UserTable:
    """All users: a few added ones, and many older ones that may be made on access."""

    def __init__(self) -> None:
        self._own: dict[str, Json] = {}
        self._many: Sequence[Json] = ()
        self._numbers: dict[str, int] | None = None
        self._changed: dict[int, Json] = {}
        self._gone: list[int] = []

    def hold(self, users: Sequence[Json]) -> None:
        """Set older users, in any number, oldest first. All must be older than added ones."""
        self._many, self._numbers = users, None
        self._changed, self._gone = {}, []

    def add(self, user: Json) -> None:
        """Add a user."""
        self._own[user["id"]] = user

    def get(self, user_id: str) -> Json | None:
        """Find a user."""
        if user_id in self._own:
            return self._own[user_id]
        number = self._find_number(user_id)
        return None if number is None else self._get_at(number)

    def put(self, user: Json) -> None:
        """Replace a user with a newer version. Raises KeyError."""
        if user["id"] in self._own:
            self._own[user["id"]] = user
        else:
            self._changed[self._get_number(user["id"])] = user

    def drop(self, user_id: str) -> None:
        """Delete a user. Raises KeyError."""
        if user_id in self._own:
            del self._own[user_id]
        else:
            bisect.insort(self._gone, self._get_number(user_id))

    def newest_first(self) -> Sequence[Json]:
        """List the users as Logto does."""
        own = sorted(self._own.values(), key=_get_start)[::-1]
        total = len(own) + len(self._many) - len(self._gone)

        def make(place: int) -> Json:
            return (
                own[place] if place < len(own) else self._get_at(self._skip_gone(total - 1 - place))
            )

        return MadeUsers(total, make)

    def _skip_gone(self, place: int) -> int:
        """Return the number of the user at a place among the many that aren't deleted."""
        number = place
        while number != (shifted := place + bisect.bisect_right(self._gone, number)):
            number = shifted
        return number

    def _get_at(self, number: int) -> Json:
        return self._changed.get(number) or self._many[number]

    def _get_number(self, user_id: str) -> int:
        number = self._find_number(user_id)
        if number is None:
            raise KeyError(user_id)
        return number

    def _find_number(self, user_id: str) -> int | None:
        if isinstance(self._many, LazyUsers):
            number = self._many.find(user_id)
        else:
            if self._numbers is None:
                self._numbers = {user["id"]: number for number, user in enumerate(self._many)}
            number = self._numbers.get(user_id)
        return None if number in self._gone else number


class LazyUsers(MadeUsers[Json]):
    """Users `user00000000`, `user00000001`, …, oldest first, created a millisecond apart."""

    def __init__(self, count: int, born_until: int) -> None:
        super().__init__(count, lambda number: _make_user(number, born_until - count + number))

    def find(self, user_id: str) -> int | None:
        """Return the number in an id."""
        digits = user_id.removeprefix("user")
        if digits == user_id or len(digits) != 8 or not digits.isdecimal():
            return None
        number = int(digits)
        return number if number < len(self) else None


def _make_user(number: int, at: int) -> Json:
    name = f"user{number:08}"
    return shapes.user(name, at, {"primaryEmail": f"{name}@example.com", "name": name})


def _get_start(record: Json) -> int:
    return int(record["createdAt"])
