"""Everything that changes in this Logto, and which webhooks each change sends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import Any, Final

from logto_webhooks.samples import shapes
from logto_webhooks.samples.payloads import new_id
from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake import payloads
from logto_webhooks.testing.fake.state import FakeState

TRANSACTION_MS: Final = 20


class Actions:
    """Each method changes the state at once, and queues what Logto sends of it; those that give
    a record give it as it is now. Unknown ids raise KeyError, unknown fields TypeError."""

    def __init__(
        self, state: FakeState, now: Callable[[], int], seed: int, ties: bool, tell: _Tell
    ) -> None:
        self._state = state
        self._now = now
        self._random = Random(seed)
        self._ties = ties
        self._tell = tell

    def create_user(self, **fields: Any) -> Json:
        """Create a user, as `POST /users` does."""
        made = self._born(fields)
        self._tell([payloads.managed("User.Created", self._now(), "POST /users", {}, data=made)])
        return made

    def update_user(self, user_id: str, **fields: Any) -> Json:
        """Change fields, as `PATCH /users/:userId` does. Sends an event even if nothing changes."""
        changed = self._touch(user_id, fields)
        self._send_user("User.Data.Updated", "", changed)
        return changed

    def set_custom_data(self, user_id: str, custom_data: Json) -> Json:
        """Merge into the custom data, as Logto does. Sends only the custom data."""
        return self._set_part(user_id, "customData", "/custom-data", custom_data)

    def set_profile(self, user_id: str, profile: Json) -> Json:
        """Merge into the profile, as Logto does. Sends only the profile."""
        return self._set_part(user_id, "profile", "/profile", profile)

    def suspend(self, user_id: str, suspended: bool = True) -> Json:
        """Suspend a user, or undo it."""
        changed = self._touch(user_id, {"isSuspended": suspended})
        self._send_user("User.SuspensionStatus.Updated", "/is-suspended", changed)
        return changed

    def delete_user(self, user_id: str) -> None:
        """Delete a user with their memberships. Sends nothing about the memberships."""
        gone = shapes.public(self._state.user(user_id))
        self._state.drop_user(user_id)
        call, params = "DELETE /users/:userId", {"userId": user_id}
        at = self._now()
        self._tell([payloads.managed("User.Deleted", at, call, params, status=204, data=gone)])

    def set_identities(self, user_id: str, identities: Json) -> Json:
        """Replace the identities of social sign-in. Sends nothing."""
        return self._touch(user_id, {"identities": identities})

    def assign_role(self, user_id: str, name: str) -> None:
        """Assign a role to a user, and create it if needed. Sends nothing."""
        self._state.user(user_id)
        role = self._role(name)
        roles = self._state.user_roles.setdefault(user_id, [])
        if role not in roles:
            roles.append(role)

    def remove_role(self, user_id: str, name: str) -> None:
        """Remove a role from a user. Sends nothing."""
        kept = [role for role in self._state.user_roles.get(user_id, []) if role["name"] != name]
        self._state.user_roles[user_id] = kept

    def sign_in(self, user_id: str) -> Json:
        """Sign a user in. `lastSignInAt` and `updatedAt` change. Sends only `PostSignIn`."""
        at = self._now()
        fields = {"lastSignInAt": at, "applicationId": payloads.APPLICATION["id"]}
        changed = self._touch(user_id, fields)
        session = self._new_id(43)
        self._tell([payloads.interaction("PostSignIn", "SignIn", at, session, changed)])
        return changed

    def sign_up(self, organization_ids: Iterable[str] = (), **fields: Any) -> Json:
        """Sign up a user who joins organizations just in time. Sends the memberships before the
        user, then `PostRegister`."""
        joins = {each: self._state.members[each] for each in organization_ids}
        made = self._born(fields)
        session, at = self._new_id(43), self._now()
        told = []
        for each, members in joins.items():
            members[made["id"]] = []
            joined = {"organizationId": each, "addedUserIds": [made["id"]]}
            told.append(
                payloads.registered("Organization.Membership.Updated", at, session, **joined)
            )
        data = shapes.public(made)
        told.append(payloads.registered("User.Created", at, session, data=data))
        signed_in = self._touch(made["id"], {"lastSignInAt": at})
        told.append(payloads.interaction("PostRegister", "Register", at, session, signed_in))
        self._tell(told)
        return signed_in

    def create_organization(self, **fields: Any) -> Json:
        """Create an organization."""
        made = shapes.organization(self._new_id(), self._started(), fields)
        self._state.add_organization(made)
        self._send_organization("Organization.Created", "POST /organizations", made, status=201)
        return made

    def update_organization(self, organization_id: str, **fields: Any) -> Json:
        """Change fields of an organization."""
        changed = shapes.changed(self._state.organizations[organization_id], fields)
        self._state.organizations[organization_id] = changed
        self._send_organization("Organization.Data.Updated", "PATCH /organizations/:id", changed)
        return changed

    def delete_organization(self, organization_id: str) -> None:
        """Delete an organization with its memberships. Sends nothing about the memberships."""
        self._state.drop_organization(organization_id)
        call, params = "DELETE /organizations/:id", {"id": organization_id}
        at = self._now()
        self._tell([payloads.managed("Organization.Deleted", at, call, params, status=204)])

    def add_members(self, organization_id: str, user_ids: Iterable[str]) -> None:
        """Add users to an organization. Existing members are not sent."""
        members = self._state.members[organization_id]
        added = [each for each in dict.fromkeys(user_ids) if each not in members]
        members.update({self._state.user(each)["id"]: [] for each in added})
        self._send_moved(organization_id, "POST", 201, added, [])

    def replace_members(self, organization_id: str, user_ids: Iterable[str]) -> None:
        """Replace all members of an organization."""
        members = self._state.members[organization_id]
        wanted = dict.fromkeys(user_ids)
        added = [each for each in wanted if each not in members]
        removed = sorted(members.keys() - wanted)
        kept = {self._state.user(each)["id"]: members.get(each, []) for each in wanted}
        self._state.members[organization_id] = kept
        self._send_moved(organization_id, "PUT", 204, added, removed)

    def remove_members(self, organization_id: str, user_ids: Iterable[str]) -> None:
        """Remove users from an organization."""
        gone = set(user_ids)
        left = [each for each in self._state.members[organization_id] if each not in gone]
        self.replace_members(organization_id, left)

    def assign_organization_role(self, organization_id: str, user_id: str, name: str) -> None:
        """Assign an organization role to a member, and create it if needed. Sends nothing."""
        role = self._role(name)
        roles = self._state.members[organization_id][user_id]
        short = {"id": role["id"], "name": name}
        if short not in roles:
            roles.append(short)

    def _started(self) -> int:
        """When the transaction began, which is what Logto stamps a record with."""
        return self._now() - (self._random.randint(0, TRANSACTION_MS) if self._ties else 0)

    def _born(self, fields: Json) -> Json:
        made = shapes.user(self._new_id(), self._started(), fields)
        self._state.users.add(made)
        return made

    def _touch(self, user_id: str, fields: Json) -> Json:
        fields = {"updatedAt": self._started(), **fields}
        changed = shapes.changed(self._state.user(user_id), fields)
        self._state.users.put(changed)
        return changed

    def _set_part(self, user_id: str, name: str, route: str, part: Json) -> Json:
        merged = self._state.user(user_id)[name] | part
        changed = self._touch(user_id, {name: merged})
        self._send_user("User.Data.Updated", route, changed, data=merged)
        return changed

    def _send_user(self, event: str, route: str, user: Json, data: Json | None = None) -> None:
        call, params = f"PATCH /users/:userId{route}", {"userId": user["id"]}
        sent = user if data is None else data
        self._tell([payloads.managed(event, self._now(), call, params, data=sent)])

    def _send_organization(self, event: str, call: str, data: Json, status: int = 200) -> None:
        params = {"id": data["id"]} if ":id" in call else {}
        at = self._now()
        self._tell([payloads.managed(event, at, call, params, status=status, data=data)])

    def _send_moved(
        self, organization_id: str, method: str, status: int, added: list[str], removed: list[str]
    ) -> None:
        made = payloads.managed(
            "Organization.Membership.Updated",
            self._now(),
            f"{method} /organizations/:id/users",
            {"id": organization_id},
            status=status,
            organizationId=organization_id,
            **payloads.moved(added, removed),
        )
        self._tell([made])

    def _role(self, name: str) -> Json:
        if name not in self._state.roles:
            self._state.roles[name] = shapes.role(self._new_id(21), name)
        return self._state.roles[name]

    def _new_id(self, length: int = 12) -> str:
        return new_id(self._random, length)


_Tell = Callable[[list[Json]], None]
