"""What one act makes Logto send, and short stories of it: several payloads, in Logto's order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.samples.payloads import new_id, payload
from logto_webhooks.samples.shapes import Json, public

_OF_SESSION: Final = ("createdAt", "userAgent", "hookId", "interactionEvent", "sessionId")
_HOOK_LATER_MS: Final = 40  # PostRegister comes so much after User.Created
_ACT_MS: Final = 200  # between two acts of a story: enough to be told apart
# Eight parallel changes to one user, as measured: when each was sent, and its updatedAt. Some tie,
# and twice it goes back.
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
    """A person registers; `organizations` take them in at once (just-in-time provisioning).

    The memberships come before the user, all with the same createdAt; then the interaction's hook.
    """
    who = id or new_id(rng)
    created = payload("User.Created", fields, at=at, rng=rng, id=who)
    registered = payload("PostRegister", fields, at=at + _HOOK_LATER_MS, rng=rng, id=who)
    registered["user"]["createdAt"] = created["data"]["createdAt"]
    registered["hookId"] = created["hookId"]
    session = {name: registered[name] for name in _OF_SESSION} | {
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
    """A person whom single sign-on makes in Logto signs in: their user is as new as that."""
    return payload("PostSignIn", {"user.createdAt": at} | dict(fields or {}), at=at, rng=rng, id=id)


class _Story(Struct, frozen=True):
    """Of one person; it begins at `at`."""

    at: int
    rng: random.Random
    who: str

    def later(self, acts: int) -> int:
        """When so many acts have passed."""
        return self.at + acts * _ACT_MS

    def tell(self, event: str, at: int, fields: Json | None = None, *, id: str = "") -> Json:
        """What an event makes Logto send: about the person, if no `id` is given."""
        return payload(event, fields, at=at, rng=self.rng, id=id or self.who)

    def change(self, event: str, at: int, **fields: Any) -> Json:
        """The same of the person, who was created when the story began."""
        return self.tell(event, at, fields | {"data.createdAt": self.at})

    def create_organization(self, organization: str) -> Json:
        """An organization is made when the story begins."""
        fields = {"data.createdAt": self.at}
        return self.tell("Organization.Created", self.at, fields, id=organization)


def _signs_up(story: _Story) -> list[Json]:
    organization, at = new_id(story.rng), story.later(1)
    joining = sign_up(at=at, rng=story.rng, id=story.who, organizations=[organization])
    return [story.create_organization(organization), *joining]


def _burst(story: _Story) -> list[Json]:
    begun = story.later(1)
    parallel = [
        story.change("User.Data.Updated", begun + sent, name=name, updatedAt=begun + changed)
        for name, sent, changed in zip(_NAMES, _SENT_MS, _UPDATED_MS, strict=True)
    ]
    return [story.tell("User.Created", story.at), *parallel]


def _single_sign_on(story: _Story) -> list[Json]:
    moments, known_since = (story.at, story.later(1)), {"user.createdAt": story.at}
    return [story.tell("PostSignIn", at, known_since) for at in moments]


def _suspension(story: _Story) -> list[Json]:
    changes = [
        story.change("User.SuspensionStatus.Updated", story.later(acts), isSuspended=acts != 2)
        for acts in (1, 2, 3)
    ]
    return [story.tell("User.Created", story.at), *changes]


def _deletion(story: _Story) -> list[Json]:
    organization, at = new_id(story.rng), story.later(1)
    member = {"organizationId": organization, "addedUserIds": [story.who]}
    return [
        story.create_organization(organization),
        story.tell("User.Created", story.at),
        story.tell("Organization.Membership.Updated", at, member, id=organization),
        story.change("User.Deleted", story.later(2)),
    ]


SCENARIOS: Final[dict[str, Callable[[_Story], list[Json]]]] = {
    "sign-up": _signs_up,
    "burst": _burst,
    "sso": _single_sign_on,
    "suspension": _suspension,
    "deletion": _deletion,
}


def scenario(name: str, *, at: int, rng: random.Random, id: str | None = None) -> list[Json]:
    """Tell one of SCENARIOS, which begins at `at`, about the user `id`.

    `sign-up`: just-in-time provisioning, so the membership comes before its user. `burst`: eight
    changes at once. `sso`: a person nobody told of signs in through an enterprise's own service,
    twice; Logto sends PostSignIn alone. `suspension`: suspended, let in, suspended again.
    `deletion`: of a member; Logto doesn't tell that the membership ended.
    """
    return SCENARIOS[name](_Story(at, rng, id or new_id(rng)))
