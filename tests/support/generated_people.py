"""People whose life a FakeLogto lives: random changes of all kinds, told and untold."""

from __future__ import annotations

import random
from collections.abc import Callable

from logto_webhooks.testing.fake import FakeLogto


class Town:
    """Lives by `step`."""

    def __init__(self, logto: FakeLogto, rng: random.Random) -> None:
        self._logto = logto
        self._random = rng
        self._users: list[str] = []
        self._organizations: list[str] = []
        self._number = 0

    def step(self) -> None:
        """Change something."""
        self._number += 1
        if len(self._users) < 3:
            self._arrive()
        elif len(self._organizations) < 2:
            self._found()
        else:
            self._random.choice(self._ways())()

    def _ways(self) -> list[Callable[[], object]]:
        logto, user = self._logto, self._random.choice(self._users)
        organization = self._random.choice(self._organizations)
        some = self._random.sample(self._users, min(3, len(self._users)))
        number, mark = self._number, {"n": self._number}
        return [
            self._arrive,
            lambda: self._users.append(logto.sign_up([organization])["id"]),
            lambda: logto.update_user(user, name=f"Name {number}"),
            lambda: logto.set_custom_data(user, mark),
            lambda: logto.set_profile(user, {"nickname": str(number)}),
            lambda: logto.suspend(user, bool(number % 2)),
            lambda: logto.sign_in(user),
            lambda: logto.add_members(organization, some),
            lambda: logto.remove_members(organization, some[:1]),
            lambda: logto.replace_members(organization, some),
            lambda: logto.update_organization(organization, name=f"Organization {number}"),
            lambda: logto.set_identities(user, {"google": {"userId": f"g{number}"}}),
            lambda: logto.assign_role(user, f"role {number % 3}"),
            lambda: logto.remove_role(user, f"role {number % 3}"),
            lambda: self._promote(organization),
            lambda: self._leave(user),
            lambda: self._close(organization),
        ]

    def _arrive(self) -> None:
        made = self._logto.create_user(primaryEmail=f"p{self._number}@example.com")
        self._users.append(made["id"])

    def _found(self) -> None:
        self._organizations.append(self._logto.create_organization()["id"])

    def _promote(self, organization: str) -> None:
        user = self._random.choice(self._users)
        self._logto.add_members(organization, [user])
        self._logto.assign_organization_role(organization, user, f"role {self._number % 2}")

    def _leave(self, user: str) -> None:
        self._logto.delete_user(user)
        self._users.remove(user)

    def _close(self, organization: str) -> None:
        self._logto.delete_organization(organization)
        self._organizations.remove(organization)
