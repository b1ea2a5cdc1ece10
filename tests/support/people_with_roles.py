"""People of whom an application learns in every way: by webhooks, which can be lost, by tokens, and
by answers of Logto's API."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import Span
from logto_webhooks.records.record import Change, membership
from logto_webhooks.testing import make
from tests.integration.test_generated_mapping import TEAMS, People
from tests.support.generated_schemas import ROLES

# To Logto, emails that differ only in the case of letters are two.
POSSIBLE_EMAILS: Final = [f"{letter}@x.example" for letter in "abcdAB"]
LATER_MS: Final = 100_000  # what Logto shows so long after a deletion was restored


class Claims(Struct, frozen=True):
    """The claims of a user's token, with which the user comes before the webhook."""

    values: dict[str, Any]


Told = bytes | list[Change] | Claims


class PeopleWithRoles(People):
    """People who also have roles, come before their webhooks, and are restored after deletions."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng, POSSIBLE_EMAILS)
        self.told: list[Told] = []
        self.emails: dict[str, set[str]] = {}  # all that each user ever had
        self.deleted: set[str] = set()  # users who were deleted once
        self.joined: set[tuple[str, str]] = set()  # all memberships that there ever were

    def step(self) -> None:
        if self._rng.random() < 0.25:
            self._do(
                self._rng.choice([self._rotate, self._come_back, self._vanish, self._use_token])
            )
        else:
            self._do(super().step)
        if self._members and self._rng.random() < 0.25:
            pair = membership(*self._rng.choice(sorted(self._members)))
            self.told.append(
                api_responses.read_pairs([pair], {pair: self._draw_roles()}, self._tick())
            )
        if self._emails and self._rng.random() < 0.2:
            user = self._rng.choice(sorted(self._emails))
            roles = [{"id": id_, "name": name} for id_, name in self._draw_roles().items()]
            self.told.append([api_responses.read_roles(user, roles, self._tick())])

    def _do(self, step: Callable[[], None]) -> None:
        done = len(self.bodies)
        step()
        self.told += self.bodies[done:]
        self._note()

    def list_last_changes(self) -> list[Told]:
        """List what the last webhooks tell: that the emails of three users went round."""
        done = len(self.told)
        while len(self._emails) < 3:
            self._do(self._sign_up)
        self._do(self._rotate)
        return self.told[done:]

    def list_last_answers(self) -> list[Change]:
        """List what Logto's API answers in the end about everybody who may be in doubt."""
        answers = self._confirm_deletions(sorted(self.deleted - self._emails.keys()))
        when = self._tick()
        answers += [api_responses.read_user(user, self._show(user), when) for user in self._emails]
        pairs = {membership(team, user) for team in TEAMS for user in self._born}
        present = {membership(*pair): self._draw_roles() for pair in self._members}
        answers += api_responses.read_pairs(sorted(pairs), present, when)
        answers += [api_responses.settle_members(team, when) for team in sorted(self._teams)]
        return answers + [
            api_responses.settle_belongings(user, when) for user in sorted(self._emails)
        ]

    def _sign_up(self) -> None:
        super()._sign_up()
        if self._rng.random() < 0.2:
            self._use_token()

    def _show(self, user: str) -> dict[str, Any]:
        """Show a user as Logto's API does."""
        shown = make.user_data_updated(id=user, email=self._emails[user], at=self._now)
        data: dict[str, Any] = json.loads(shown.body)["data"]
        return data

    def _rotate(self) -> None:
        """Up to three users take each other's emails, and the webhooks between were lost."""
        users = self._rng.sample(sorted(self._emails), min(len(self._emails), 3))
        emails = [self._emails[user] for user in users]
        for user, email in zip(users, emails[1:] + emails[:1], strict=True):
            self._change(user, email)

    def _come_back(self) -> None:
        """A deleted user is restored, from a dump of Logto's database."""
        free, gone = self._list_free_emails(), sorted(self.deleted - self._emails.keys())
        if free and gone:
            self._now += LATER_MS
            user = self._rng.choice(gone)
            former = sorted(self.emails[user].intersection(free))
            self._change(user, self._rng.choice(former or free))

    def _vanish(self) -> None:
        """A user is deleted, but the webhook was lost: the API says so twice."""
        if self._emails:
            user = self._rng.choice(sorted(self._emails))
            self._remove(user)
            self.told += [[answer] for answer in self._confirm_deletions([user])]

    def _confirm_deletions(self, users: Sequence[str]) -> list[Change]:
        answers = []
        for _ in range(2):
            self._now += LATER_MS
            when = self._tick()
            answers += [api_responses.read_user(user, None, when) for user in users]
        return answers

    def _use_token(self) -> None:
        """A user comes with a token, which may have an email, perhaps before the first webhook."""
        if self._emails:
            user = self._rng.choice(sorted(self._emails))
            claims = {"sub": user}
            if self._rng.random() < 0.5:
                claims["email"] = self._emails[user]
            token = Claims(claims)
            self.told.insert(self._rng.randint(0, len(self.told)), token)

    def _change(self, user: str, email: str | None) -> None:
        super()._change(user, email)
        self._note()

    def _note(self) -> None:
        for user, email in self._emails.items():
            self.emails.setdefault(user, set()).add(email)
        self.deleted |= self._born.keys() - self._emails.keys()
        self.joined |= self._members

    def _tick(self) -> Span:
        self._now += 1_000
        return Span(self._now, self._now)

    def _draw_roles(self) -> dict[str, str]:
        """Draw roles by id; the same role can have another name the next time."""
        names = self._rng.sample(ROLES, self._rng.randint(0, 2))
        ids = self._rng.sample(["r1", "r2", "r3"], len(names))
        return dict(zip(ids, names, strict=True))
