"""The changes in a fake Logto, and the webhooks that each change sends."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, Final

from logto_webhooks.samples import shapes
from logto_webhooks.samples.payloads import new_id
from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake.state import FakeState

TRANSACTION_MS: Final = 20
MEMBERS_AT_MOST: Final = 5000  # in one webhook


class Actions:
    """Each method changes the state at once, and queues the webhooks that Logto sends for it. Some
    return the changed record. Unknown ids raise KeyError, unknown fields TypeError."""

    def __init__(
        self,
        state: FakeState,
        now: Callable[[], int],
        seed: int,
        ties: bool,
        send: Callable[[Json], None],
        signing_key: str,
    ) -> None:
        self.signing_key = signing_key
        self._state = state
        self._now = now
        self._random = Random(seed)
        self._ties = ties
        self._send = send

    def create_user(self, **fields: Any) -> Json:
        """Create a user, as `POST /users` does."""
        user = self._add_user(fields)
        self._send_managed("User.Created", "POST /users", {}, data=user)
        return user

    def update_user(self, user_id: str, **fields: Any) -> Json:
        """Change fields, as `PATCH /users/:userId` does. Sends an event even if nothing changes."""
        user = self._touch(user_id, fields)
        self._send_user("User.Data.Updated", "", user)
        return user

    def set_custom_data(self, user_id: str, custom_data: Json) -> Json:
        """Merge into the custom data, as Logto does. Sends only the custom data."""
        return self._set_part(user_id, "customData", "/custom-data", custom_data)

    def set_profile(self, user_id: str, profile: Json) -> Json:
        """Merge into the profile, as Logto does. Sends only the profile."""
        return self._set_part(user_id, "profile", "/profile", profile)

    def suspend(self, user_id: str, suspended: bool = True) -> Json:
        """Suspend a user, or undo it."""
        user = self._touch(user_id, {"isSuspended": suspended})
        self._send_user("User.SuspensionStatus.Updated", "/is-suspended", user)
        return user

    def delete_user(self, user_id: str) -> None:
        """Delete a user with their memberships. Sends nothing about the memberships."""
        user = shapes.public(self._state.user(user_id))
        self._state.drop_user(user_id)
        params = {"userId": user_id}
        self._send_managed("User.Deleted", "DELETE /users/:userId", params, data=user)

    def set_identities(self, user_id: str, identities: Json) -> Json:
        """Replace the identities of social sign-in. Sends nothing."""
        return self._touch(user_id, {"identities": identities})

    def assign_role(self, user_id: str, name: str) -> None:
        """Assign a role to a user, and create it if needed. Sends nothing."""
        self._state.user(user_id)
        role = self._find_or_add_role(name)
        roles = self._state.user_roles.setdefault(user_id, [])
        if role not in roles:
            roles.append(role)

    def remove_role(self, user_id: str, name: str) -> None:
        """Remove a role from a user. Sends nothing."""
        roles = self._state.user_roles.get(user_id, [])
        self._state.user_roles[user_id] = [role for role in roles if role["name"] != name]

    def sign_in(self, user_id: str) -> Json:
        """Sign a user in. `lastSignInAt` and `updatedAt` change. Sends only `PostSignIn`."""
        at = self._now()
        fields = {"lastSignInAt": at, "applicationId": shapes.APPLICATION["id"]}
        user = self._touch(user_id, fields)
        self._send(shapes.interaction("PostSignIn", "SignIn", at, self._make_id(43), user))
        return user

    def sign_up(self, organization_ids: Iterable[str] = (), **fields: Any) -> Json:
        """Sign up a user who joins organizations just in time. Sends the memberships before the
        user, then `PostRegister`."""
        joined = {
            organization_id: self._state.members[organization_id]
            for organization_id in organization_ids
        }
        user = self._add_user(fields)
        session_id, at = self._make_id(43), self._now()
        for organization_id, members in joined.items():
            members[user["id"]] = []
            event, ids = "Organization.Membership.Updated", [user["id"]]
            self._send(
                shapes.registered(
                    event, at, session_id, organizationId=organization_id, addedUserIds=ids
                )
            )
        data = shapes.public(user)
        self._send(shapes.registered("User.Created", at, session_id, data=data))
        user = self._touch(user["id"], {"lastSignInAt": at})
        self._send(shapes.interaction("PostRegister", "Register", at, session_id, user))
        return user

    def create_organization(self, **fields: Any) -> Json:
        """Create an organization."""
        organization = shapes.organization(self._make_id(), self._begin_transaction(), fields)
        self._state.add_organization(organization)
        call = "POST /organizations"
        self._send_managed("Organization.Created", call, {}, status=201, data=organization)
        return organization

    def update_organization(self, organization_id: str, **fields: Any) -> Json:
        """Change fields of an organization."""
        organization = shapes.change(self._state.organizations[organization_id], fields)
        self._state.organizations[organization_id] = organization
        call, params = "PATCH /organizations/:id", {"id": organization_id}
        self._send_managed("Organization.Data.Updated", call, params, data=organization)
        return organization

    def delete_organization(self, organization_id: str) -> None:
        """Delete an organization with its memberships. Sends nothing about the memberships."""
        self._state.drop_organization(organization_id)
        call, params = "DELETE /organizations/:id", {"id": organization_id}
        self._send_managed("Organization.Deleted", call, params)

    def add_members(self, organization_id: str, user_ids: Iterable[str]) -> None:
        """Add users to an organization. Existing members are not sent."""
        members = self._state.members[organization_id]
        added = [user_id for user_id in dict.fromkeys(user_ids) if user_id not in members]
        members.update({self._state.user(user_id)["id"]: [] for user_id in added})
        self._send_members(organization_id, "POST", 201, added, [])

    def replace_members(self, organization_id: str, user_ids: Iterable[str]) -> None:
        """Replace all members of an organization."""
        before, after = self._state.members[organization_id], dict.fromkeys(user_ids)
        self._state.members[organization_id] = {
            self._state.user(user_id)["id"]: before.get(user_id, []) for user_id in after
        }
        added = [user_id for user_id in after if user_id not in before]
        removed = sorted(before.keys() - after)
        self._send_members(organization_id, "PUT", 204, added, removed)

    def remove_members(self, organization_id: str, user_ids: Iterable[str]) -> None:
        """Remove users from an organization."""
        removed, members = set(user_ids), self._state.members[organization_id]
        self.replace_members(organization_id, [user for user in members if user not in removed])

    def assign_organization_role(self, organization_id: str, user_id: str, name: str) -> None:
        """Assign an organization role to a member, and create it if needed. Sends nothing."""
        role = self._find_or_add_role(name)
        roles = self._state.members[organization_id][user_id]
        short = {"id": role["id"], "name": name}
        if short not in roles:
            roles.append(short)

    def add_hook(
        self,
        url: str,
        *,
        events: Sequence[str] = shapes.EVENTS,
        signing_key: str | None = None,
        name: str | None = None,
    ) -> Json:
        """Create a webhook for events, by default for all of them."""
        key = self.signing_key if signing_key is None else signing_key
        hook = shapes.webhook(self._make_id(21), self._now(), url, list(events), key, name)
        self._state.add_hook(hook)
        return hook

    def change_hook(self, hook_id: str, **fields: object) -> Json:
        """Replace fields of a webhook, including the whole `config`, as Logto does. Raises
        KeyError, TypeError."""
        hook = shapes.change(self._state.hooks[hook_id], fields)
        self._state.hooks[hook_id] = hook
        return hook

    def delete_hook(self, hook_id: str) -> None:
        """Delete a webhook and its log. Queued deliveries are still sent. Raises KeyError."""
        self._state.drop_hook(hook_id)

    def rotate_signing_key(self, hook_id: str) -> Json:
        """Give a webhook a new key. Queued deliveries keep the old one. Raises KeyError."""
        key = "".join(self._random.choices(string.ascii_letters + string.digits, k=32))
        return self.change_hook(hook_id, signingKey=key)

    def _begin_transaction(self) -> int:
        """Return when the transaction began, which Logto uses as a record's timestamp."""
        return self._now() - (self._random.randint(0, TRANSACTION_MS) if self._ties else 0)

    def _add_user(self, fields: Json) -> Json:
        user = shapes.user(self._make_id(), self._begin_transaction(), fields)
        self._state.users.add(user)
        return user

    def _touch(self, user_id: str, fields: Json) -> Json:
        fields = {"updatedAt": self._begin_transaction(), **fields}
        user = shapes.change(self._state.user(user_id), fields)
        self._state.users.put(user)
        return user

    def _set_part(self, user_id: str, name: str, route: str, part: Json) -> Json:
        merged = self._state.user(user_id)[name] | part
        user = self._touch(user_id, {name: merged})
        self._send_user("User.Data.Updated", route, user, data=merged)
        return user

    def _send_user(self, event: str, route: str, user: Json, data: Json | None = None) -> None:
        call, params = f"PATCH /users/:userId{route}", {"userId": user["id"]}
        self._send_managed(event, call, params, data=user if data is None else data)

    def _send_members(
        self, organization_id: str, method: str, status: int, added: list[str], removed: list[str]
    ) -> None:
        """Send who joined and who left. Empty lists are left out, and long ones are truncated."""
        lists = {"addedUserIds": added, "removedUserIds": removed}
        self._send_managed(
            "Organization.Membership.Updated",
            f"{method} /organizations/:id/users",
            {"id": organization_id},
            status=status,
            organizationId=organization_id,
            **{name: ids[:MEMBERS_AT_MOST] for name, ids in lists.items() if ids},
        )

    def _send_managed(self, event: str, call: str, params: dict[str, str], **rest: object) -> None:
        self._send(shapes.managed(event, self._now(), call, params, **rest))

    def _find_or_add_role(self, name: str) -> Json:
        if name not in self._state.roles:
            self._state.roles[name] = shapes.role(self._make_id(21), name)
        return self._state.roles[name]

    def _make_id(self, length: int = 12) -> str:
        return new_id(self._random, length)
