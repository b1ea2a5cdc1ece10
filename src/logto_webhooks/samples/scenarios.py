"""What one act of a person makes Logto send: several payloads, in Logto's order."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Final

from logto_webhooks.samples.payloads import Json, new_id, payload

_OF_SESSION: Final = ("createdAt", "userAgent", "hookId", "interactionEvent", "sessionId")
_HOOK_LATER_MS: Final = 40  # PostRegister comes so much after User.Created


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
        "ip": registered["ip"],
    }
    joined = [
        {"event": "Organization.Membership.Updated"}
        | session
        | {"organizationId": each, "addedUserIds": [who]}
        for each in organizations
    ]
    return [*joined, {"event": "User.Created"} | session | {"data": created["data"]}, registered]


def first_sign_in(
    fields: Mapping[str, Any] | None = None,
    *,
    at: int,
    rng: random.Random,
    id: str | None = None,
) -> Json:
    """A person whom single sign-on makes in Logto signs in: their user is as new as that."""
    return payload("PostSignIn", {"user.createdAt": at} | dict(fields or {}), at=at, rng=rng, id=id)
