"""Scenarios: the payloads that Logto sends for one or more actions, in its order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.samples.payloads import new_id, payload
from logto_webhooks.samples.shapes import Json, public

_SESSION_FIELDS: Final = ("createdAt", "userAgent", "hookId", "interactionEvent", "sessionId")
_POST_REGISTER_MS: Final = 40  # the delay of PostRegister after User.Created
_ACTION_MS: Final = 200  # between two actions: long enough that their order is certain
LONGEST_MS: Final = 3 * _ACTION_MS  # from the beginning of a scenario to its end
# Measured for eight parallel changes to one user: when each was sent, and its updatedAt. Some are
# equal, and twice it goes back.
_SENT_MS: Final = (46, 54, 61, 63, 80, 83, 86, 87)
_UPDATED_MS: Final = (34, 34, 35, 48, 62, 73, 66, 62)
_NAMES: Final = ("Ada", "Bea", "Cleo", "Dora", "Eva", "Fay", "Gia", "Hana")


def sign_up(
    fields: Mapping[str, Any] | None = None,
    *,
    at: int,
    rng: random.Random,
    id: str | None = None,
    organizations: Sequence[str] = (),
) -> list[Json]:
    """A person signs up and joins `organizations` immediately (just-in-time provisioning).

    The memberships come before the user, all with the same createdAt. PostRegister comes last.
    """
    who = id or new_id(rng)
    created = payload("User.Created", fields, at=at, rng=rng, id=who)
    registered = payload("PostRegister", fields, at=at + _POST_REGISTER_MS, rng=rng, id=who)
    registered["user"]["createdAt"] = created["data"]["createdAt"]
    registered["hookId"] = created["hookId"]
    session = {name: registered[name] for name in _SESSION_FIELDS} | {
        "createdAt": created["createdAt"],
        "applicationId": registered["application"]["id"],
        "application": registered["application"],
        "ip": registered["userIp"],
    }
    joined = [
        {"event": "Organization.Membership.Updated"}
        | session
        | {"organizationId": organization_id, "addedUserIds": [who]}
        for organization_id in organizations
    ]
    created = {"event": "User.Created"} | session | {"data": public(created["data"])}
    return [*joined, created, registered]


def first_sign_in(
    fields: Mapping[str, Any] | None = None,
    *,
    at: int,
    rng: random.Random,
    id: str | None = None,
) -> Json:
    """A person signs in with single sign-on for the first time, which creates the user."""
    return payload("PostSignIn", {"user.createdAt": at} | dict(fields or {}), at=at, rng=rng, id=id)


class _Scenario(Struct, frozen=True):
    """A scenario about one person. It begins at `at`."""

    at: int
    rng: random.Random
    who: str

    def after(self, actions: int) -> int:
        """Return the time after this many actions."""
        return self.at + actions * _ACTION_MS

    def make(self, event: str, at: int, fields: Json | None = None, *, id: str = "") -> Json:
        """Make a payload about the person, or about another `id`."""
        return payload(event, fields, at=at, rng=self.rng, id=id or self.who)

    def change(self, event: str, at: int, **fields: Any) -> Json:
        """Make a payload about the person, who was created at the beginning."""
        return self.make(event, at, fields | {"data.createdAt": self.at})

    def create_organization(self, organization: str) -> Json:
        """Make the payload of an organization that is created at the beginning."""
        fields = {"data.createdAt": self.at}
        return self.make("Organization.Created", self.at, fields, id=organization)


def _signs_up(scenario: _Scenario) -> list[Json]:
    organization, at = new_id(scenario.rng), scenario.after(1)
    joining = sign_up(at=at, rng=scenario.rng, id=scenario.who, organizations=[organization])
    return [scenario.create_organization(organization), *joining]


def _burst(scenario: _Scenario) -> list[Json]:
    begun = scenario.after(1)
    parallel = [
        scenario.change("User.Data.Updated", begun + sent, name=name, updatedAt=begun + changed)
        for name, sent, changed in zip(_NAMES, _SENT_MS, _UPDATED_MS, strict=True)
    ]
    return [scenario.make("User.Created", scenario.at), *parallel]


def _single_sign_on(scenario: _Scenario) -> list[Json]:
    moments, known_since = (scenario.at, scenario.after(1)), {"user.createdAt": scenario.at}
    return [scenario.make("PostSignIn", at, known_since) for at in moments]


def _suspension(scenario: _Scenario) -> list[Json]:
    changes = [
        scenario.change(
            "User.SuspensionStatus.Updated", scenario.after(step), isSuspended=step != 2
        )
        for step in (1, 2, 3)
    ]
    return [scenario.make("User.Created", scenario.at), *changes]


def _deletion(scenario: _Scenario) -> list[Json]:
    organization, at = new_id(scenario.rng), scenario.after(1)
    member = {"organizationId": organization, "addedUserIds": [scenario.who]}
    return [
        scenario.create_organization(organization),
        scenario.make("User.Created", scenario.at),
        scenario.make("Organization.Membership.Updated", at, member, id=organization),
        scenario.change("User.Deleted", scenario.after(2)),
    ]


SCENARIOS: Final[dict[str, Callable[[_Scenario], list[Json]]]] = {
    "sign-up": _signs_up,
    "burst": _burst,
    "sso": _single_sign_on,
    "suspension": _suspension,
    "deletion": _deletion,
}


def scenario(name: str, *, at: int, rng: random.Random, id: str | None = None) -> list[Json]:
    """Make the payloads of a scenario about the user `id`. It begins at `at`.

    `sign-up`: with just-in-time provisioning, so the membership comes before its user. `burst`:
    eight changes at once. `sso`: an unknown person signs in with enterprise single sign-on, twice;
    Logto sends only PostSignIn. `suspension`: a user is suspended, unsuspended and suspended again.
    `deletion`: of a member; Logto sends nothing about the end of the membership.
    """
    return SCENARIOS[name](_Scenario(at, rng, id or new_id(rng)))
