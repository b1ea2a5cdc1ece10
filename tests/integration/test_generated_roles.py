"""Generated lives with roles: the application's rows equal the mirror, in any order."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import Span
from logto_webhooks.records.record import Change, membership
from logto_webhooks.testing import make
from tests.integration.test_mapping_roles import (
    ACME,
    RoleApplication,
    read_member_roles,
    read_user_roles,
)
from tests.support.generated_lives import Told, live_on_server, live_on_sqlite, settle, tell
from tests.support.mapped_application import learn
from tests.support.stores import StoreKind

NAMES = ["editor", "viewer", "author", "chief"]
USERS = ["ana", "bo"]


class Tenant:
    """Users who come and go, and roles that are assigned, taken away and renamed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._now = 1_795_485_562_263
        self._names = {f"r{n}": name for n, name in enumerate(NAMES[:3])}
        self._roles: dict[str, set[str]] = {user: set() for user in USERS}
        self._members: set[str] = set()
        self.told: list[Told] = [ACME]
        self.told += [self._create(user) for user in USERS]

    def step(self) -> None:
        self._now += 1_000
        self._rng.choice([self._come, self._change, self._change, self._rename, self._move])()

    def _come(self) -> None:
        user = self._rng.choice(USERS)
        if self._rng.random() < 0.2:
            self._roles[user] = set()
            self._members -= {user}
            self.told.append(make.user_deleted(id=user, at=self._now).body)
            self._now += 70_000  # or it would be in doubt whether the user exists
        self.told.append(self._create(user))

    def _create(self, user: str) -> bytes:
        return make.user_created(id=user, email=f"{user}@x", at=self._now).body

    def _change(self) -> None:
        user = self._rng.choice(USERS)
        self._roles[user] ^= {self._rng.choice(sorted(self._names))}
        self._tell(user)

    def _rename(self) -> None:
        """One takes a free name, or two swap theirs, by way of the free one."""
        free = self._rng.choice(sorted(set(NAMES) - set(self._names.values())))
        first, second = self._rng.sample(sorted(self._names), 2)
        if self._rng.random() < 0.5:
            self._names[first] = free
        else:
            self._names |= {first: self._names[second], second: self._names[first]}
        for user in USERS:
            self._tell(user)

    def _tell(self, user: str) -> None:
        self._now += 1_000
        roles = self._named(user)
        self.told.append(read_user_roles(user, roles, self._now))
        if user in self._members:
            self.told.append(read_member_roles(roles, self._now, user))

    def _move(self) -> None:
        user = self._rng.choice(USERS)
        self._members ^= {user}
        added, removed = ([user], []) if user in self._members else ([], [user])
        fields: dict[str, Any] = {"addedUserIds": added, "removedUserIds": removed}
        name = "Organization.Membership.Updated"
        self.told.append(make.event(name, id="acme", at=self._now, **fields).body)

    def answers(self) -> list[Change]:
        """What Logto answers in the end."""
        at = self._now + 100_000
        changes: list[Change] = []
        for user in USERS:
            pair = membership("acme", user)
            present = {pair: self._named(user)} if user in self._members else {}
            changes += read_user_roles(user, self._named(user), at)
            changes += api_responses.read_pairs([pair], present, Span(at, at))
            changes.append(api_responses.settle_belongings(user, Span(at, at)))
        return changes

    @property
    def user_roles(self) -> list[tuple[str, str]]:
        """The name of each user's role."""
        return sorted((user, name) for user in USERS for name in self._named(user).values())

    @property
    def member_roles(self) -> list[tuple[str, str]]:
        """The name of each member's role."""
        return [(user, name) for user, name in self.user_roles if user in self._members]

    def _named(self, user: str) -> dict[str, str]:
        return {role: self._names[role] for role in self._roles[user]}


def change_own_rows(application: RoleApplication, rng: random.Random) -> None:
    """The application adds a role, or deletes one, or somebody's row."""
    name = rng.choice(NAMES)
    roles, own = application.roles, application.user_roles
    ids = dict(application.rows(roles, "name", "id"))
    if name not in ids:
        application.insert(roles, name=name)
    elif rng.random() < 0.5:
        application.delete(own, own.c.role_id == ids[name])
        application.delete(roles, roles.c.name == name)
    else:
        application.delete(own, own.c.logto_role == rng.choice(["r0", "r1", "r2"]))
        application.delete(application.member_roles, application.member_roles.c.role == name)


async def live(application: RoleApplication, rng: random.Random, steps: int) -> None:
    tenant = Tenant(rng)
    for _ in range(steps):
        tenant.step()
    host = await application.map_roles()
    await tell(application, host, tenant.told, rng, change_own_rows, most=1)
    await learn(host, tenant.answers())
    for name in set(NAMES) - {name for (name,) in application.rows(application.roles, "name")}:
        application.insert(application.roles, name=name)
    await settle(application)
    await check(application, tenant)


async def check(application: RoleApplication, tenant: Tenant) -> None:
    """Each role of a user or a member is a row, and there are no others."""
    problems = await application.problems()
    assert problems == [], problems
    assert application.user_role_names == tenant.user_roles
    assert application.member_role_names == tenant.member_roles


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(rng=st.randoms(use_true_random=False), steps=st.integers(1, 30))
def test_own_rows_equal_the_mirror_on_sqlite(rng: random.Random, steps: int) -> None:
    """Renamed and swapped roles, deletions, and roles that the application lacks for a while."""
    live_on_sqlite(RoleApplication, live, rng, steps)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", ["asyncpg", "postgres-thread"])
def test_own_rows_equal_the_mirror_on_postgresql(kind: StoreKind, tmp_path: Path) -> None:
    """The same, on a server."""
    live_on_server(RoleApplication, live, kind, tmp_path, 20)
