"""Generated lives through mapped tables: the application's rows equal the mirror, in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from logto_webhooks.testing import make
from tests.support.generated_lives import live_on_server, live_on_sqlite, settle, tell
from tests.support.mapped_application import Application
from tests.support.stores import StoreKind

EMAILS = [f"{letter}@x.example" for letter in "abcdef"]
TEAMS = ["acme", "best"]


class People:
    """Users with emails that go round and are used again, in organizations that come and go."""

    def __init__(self, rng: random.Random, possible_emails: Sequence[str] = EMAILS) -> None:
        self._rng = rng
        self._possible_emails = possible_emails
        self._now = 1_795_485_562_263
        self._emails: dict[str, str] = {}  # of the users who are there
        self._teams: set[str] = set()
        self._dissolved: set[str] = set()
        self._members: set[tuple[str, str]] = set()
        self._born: dict[str, int] = {}
        self.bodies: list[bytes] = []

    def step(self) -> None:
        self._now += 1_000
        changes = [self._sign_up, self._sign_up, self._swap, self._rename, self._delete]
        changes += [self._join, self._leave, self._found, self._dissolve]
        self._rng.choice(changes)()

    def _list_free_emails(self) -> list[str]:
        return sorted(set(self._possible_emails) - set(self._emails.values()))

    def _sign_up(self) -> None:
        free = self._list_free_emails()
        if not free:
            return
        user = f"u{len(self._born)}"
        self._emails[user], self._born[user] = self._rng.choice(free), self._now
        created = make.user_created(id=user, at=self._now, email=self._emails[user])
        self.bodies.append(created.body)
        if self._teams and self._rng.random() < 0.5:
            self._join(user)

    def _swap(self) -> None:
        """Two or three users, one after the other, by way of none at all."""
        users = self._rng.sample(sorted(self._emails), min(len(self._emails), 3))
        emails = [self._emails[user] for user in users]
        for user in users:
            self._change(user, None)
        for user, email in zip(users, emails[1:] + emails[:1], strict=True):
            self._change(user, email)

    def _rename(self) -> None:
        free = self._list_free_emails()
        if free and self._emails:
            self._change(self._rng.choice(sorted(self._emails)), self._rng.choice(free))

    def _change(self, user: str, email: str | None) -> None:
        self._now += 1_000
        if email is not None:
            self._emails[user] = email
        fields: dict[str, Any] = {
            "email": email,
            "data.createdAt": self._born[user],
            "updatedAt": self._now,
        }
        self.bodies.append(make.user_data_updated(id=user, at=self._now, **fields).body)

    def _delete(self) -> None:
        if self._emails:
            user = self._rng.choice(sorted(self._emails))
            self._remove(user)
            self.bodies.append(make.user_deleted(id=user, at=self._now).body)

    def _remove(self, user: str) -> None:
        del self._emails[user]
        self._members = {pair for pair in self._members if pair[1] != user}

    def _found(self) -> None:
        for team in sorted(set(TEAMS) - self._teams - self._dissolved):
            self._teams.add(team)
            founded = make.event("Organization.Created", id=team, name=team, at=self._now)
            self.bodies.append(founded.body)

    def _dissolve(self) -> None:
        """Logto's ids don't come again, so this happens once."""
        if "best" in self._teams and self._rng.random() < 0.2:
            self._teams.remove("best")
            self._dissolved.add("best")
            self._members = {pair for pair in self._members if pair[0] != "best"}
            dissolved = make.event("Organization.Deleted", id="best", at=self._now)
            self.bodies.append(dissolved.body)

    def _join(self, user: str | None = None) -> None:
        if self._teams and self._emails:
            team = self._rng.choice(sorted(self._teams))
            user = user or self._rng.choice(sorted(self._emails))
            self._members.add((team, user))
            self._change_members(team, addedUserIds=[user], removedUserIds=[])

    def _leave(self) -> None:
        if self._members:
            team, user = pair = self._rng.choice(sorted(self._members))
            self._members.remove(pair)
            self._change_members(team, addedUserIds=[], removedUserIds=[user])

    def _change_members(self, team: str, **fields: Any) -> None:
        self._now += 1_000
        name = "Organization.Membership.Updated"
        changed = make.event(name, organizationId=team, at=self._now, **fields)
        self.bodies.append(changed.body)


async def live(application: Application, rng: random.Random, steps: int) -> None:
    people = People(rng)
    for _ in range(steps):
        people.step()
    await tell(application, await application.map(), people.bodies, rng, change_own_rows, most=19)
    await settle(application)
    await application.check()


def change_own_rows(application: Application, rng: random.Random) -> None:
    """The application changes mapped columns, or takes a value that somebody needs."""
    own = application.users
    with application.engine.begin() as connection:
        ids = list(connection.scalars(sa.select(own.c.id)))
        if ids:
            some = own.c.id == rng.choice(ids)
            change = {"first_name": "mine"} if rng.random() < 0.5 else {"email": None}
            connection.execute(sa.update(own).where(some).values(change))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(rng=st.randoms(use_true_random=False), steps=st.integers(1, 40))
def test_own_rows_equal_the_mirror_on_sqlite(rng: random.Random, steps: int) -> None:
    """Swaps, reused emails, sign-ups with memberships, deletions, and the application's edits."""
    live_on_sqlite(Application, live, rng, steps)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", ["asyncpg", "postgres-thread"])
def test_own_rows_equal_the_mirror_on_postgresql(kind: StoreKind, tmp_path: Path) -> None:
    """The same, on a server."""
    live_on_server(Application, live, kind, tmp_path, 30)
