"""A generated life: what a Logto does, sends and says at the end, made up but true to its rules.

Each change starts, is executed and is dispatched at most 100 ms later; changes overlap. A whole
user carries the start of its transaction as `updatedAt`; a part carries nothing. What was
executed last is the truth, whatever was dispatched last.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from logto_webhooks.samples.history import FinalState
from logto_webhooks.samples.payloads import Scene, organization, payload, user

Json = dict[str, Any]
LAG_MS = 100


class Life:
    """Lives by `step`; `bodies` are all deliveries, `take` gives the new ones."""

    def __init__(self, rng: random.Random, pause_ms: tuple[int, int]) -> None:
        """`pause_ms`: how long from the execution of one change to that of the next."""
        self._random = rng
        self._pause = pause_ms
        self._now = 1_795_485_335_000
        self._number = 0
        self._sent: list[tuple[int, bytes]] = []
        self._taken = 0
        self._users: dict[str, Json] = {}
        self._organizations: dict[str, Json] = {}
        self._members: set[tuple[str, str]] = set()
        self._deleted_users: list[str] = []
        self._deleted_organizations: list[str] = []

    @property
    def bodies(self) -> list[bytes]:
        """All deliveries, in the order of dispatch."""
        return [body for _, body in sorted(self._sent)]

    def take(self) -> list[bytes]:
        """The deliveries since this was last asked, in the order of dispatch."""
        new, self._taken = self._sent[self._taken :], len(self._sent)
        return [body for _, body in sorted(new)]

    def final(self) -> FinalState:
        """What Logto says at the end."""
        members: dict[str, list[Json]] = {name: [] for name in self._organizations}
        for organization_id, user_id in sorted(self._members):
            members[organization_id].append({"id": user_id})
        return FinalState(
            list(self._users.values()),
            self._deleted_users,
            list(self._organizations.values()),
            self._deleted_organizations,
            members,
        )

    def step(self) -> None:
        """Do one thing."""
        self._now += self._random.randint(*self._pause)
        self._number += 1
        self._random.choice(self._possible())()

    def _possible(self) -> list[Callable[[], None]]:
        possible = [self._create_user, self._sign_up, self._create_organization]
        if self._users:
            possible += [self._change, self._change, self._custom_data, self._profile]
            possible += [self._suspend, self._sign_in, self._delete_user]
        if self._organizations:
            possible += [self._rename, self._delete_organization]
        if self._organizations and self._users:
            possible += [self._join, self._join, self._join]
        if self._members:
            possible += [self._leave]
        return possible

    def _create_user(self) -> None:
        made = self._new_user()
        self._send("User.Created", made["id"], data=made)

    def _sign_up(self) -> None:
        made = self._new_user()
        self._send("User.Created", made["id"], path=None, params=None, matchedRoute=None, data=made)
        self._now += 30
        made["lastSignInAt"] = made["updatedAt"] = self._now
        self._send("PostRegister", made["id"], user=made)
        self._send("PostSignIn", made["id"], user=made)

    def _change(self) -> None:
        changed = self._some_user()
        field = self._random.choice(["name", "primaryEmail", "username"])
        value = f"{field}{self._number % 4}"
        is_taken = any(each[field] == value for each in self._users.values() if each is not changed)
        changed[field] = None if is_taken else self._random.choice([None, value])
        if self._random.random() < 0.3:
            changed["customData"] = {"whole": self._number % 3}
        self._send("User.Data.Updated", changed["id"], data=self._touched(changed))

    def _custom_data(self) -> None:
        changed = self._some_user()
        other = self._random.choice(list(self._users))
        forged = {"id": other, "primaryEmail": "attacker@example.com", "updatedAt": 9 * 10**12}
        changed["customData"] = self._random.choice([forged, {"n": self._number % 3}, {}])
        self._touched(changed)
        self._send_part("/users/:userId/custom-data", changed["id"], changed["customData"])

    def _profile(self) -> None:
        changed = self._some_user()
        changed["profile"] = {"nickname": f"n{self._number % 3}"}
        self._touched(changed)
        self._send_part("/users/:userId/profile", changed["id"], changed["profile"])

    def _suspend(self) -> None:
        changed = self._some_user()
        changed["isSuspended"] = not changed["isSuspended"]
        data = self._touched(changed)
        self._send("User.SuspensionStatus.Updated", changed["id"], data=data)

    def _sign_in(self) -> None:
        changed = self._some_user()
        changed["lastSignInAt"] = self._now
        self._send("PostSignIn", changed["id"], user=self._touched(changed))

    def _delete_user(self) -> None:
        gone = self._some_user()
        del self._users[gone["id"]]
        self._deleted_users.append(gone["id"])
        self._members = {pair for pair in self._members if pair[1] != gone["id"]}
        self._send("User.Deleted", gone["id"], data=gone)

    def _create_organization(self) -> None:
        made = organization(self._scene(f"o{self._number}"))
        self._organizations[made["id"]] = made
        self._send("Organization.Created", made["id"], data=made)

    def _rename(self) -> None:
        changed = self._some_organization()
        changed["name"] = f"name{self._number % 3}"
        self._send("Organization.Data.Updated", changed["id"], data=changed)

    def _delete_organization(self) -> None:
        gone = self._some_organization()["id"]
        del self._organizations[gone]
        self._deleted_organizations.append(gone)
        self._members = {pair for pair in self._members if pair[0] != gone}
        self._send("Organization.Deleted", gone)

    def _join(self) -> None:
        pair = self._some_organization()["id"], self._some_user()["id"]
        new = [pair[1]] if pair not in self._members else []
        self._members.add(pair)
        self._send_members(pair[0], addedUserIds=new)

    def _leave(self) -> None:
        pair = self._random.choice(sorted(self._members))
        self._members.remove(pair)
        self._send_members(pair[0], removedUserIds=[pair[1]])

    def _new_user(self) -> Json:
        made = user(self._scene(f"u{self._number}"))
        self._users[made["id"]] = made
        return made

    def _some_user(self) -> Json:
        return self._random.choice(list(self._users.values()))

    def _some_organization(self) -> Json:
        return self._random.choice(list(self._organizations.values()))

    def _touched(self, changed: Json) -> Json:
        """`updatedAt` is the start of the transaction: it ties, and even goes back."""
        changed["updatedAt"] = self._now - self._random.randint(0, 40)
        return changed

    def _scene(self, name: str) -> Scene:
        return Scene(self._random, self._now, name)

    def _send_members(self, organization_id: str, **moved: list[str]) -> None:
        told = {name: ids for name, ids in moved.items() if ids}
        self._send(
            "Organization.Membership.Updated", organization_id, without="addedUserIds", **told
        )

    def _send_part(self, route: str, user_id: str, data: Json) -> None:
        self._send("User.Data.Updated", user_id, matchedRoute=route, data=data)

    def _send(self, event: str, about: str, without: str = "", **fields: Any) -> None:
        at = self._now + self._random.randint(0, LAG_MS - 40)
        made = payload(event, {}, at=at, rng=self._random, id=about)
        made.pop(without, None)
        self._sent.append((at, msgspec.json.encode(made | fields)))
