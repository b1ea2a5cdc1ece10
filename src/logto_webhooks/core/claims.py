"""What the claims of a token tell of its user: enough to begin with, and less than anything that
Logto says of the user itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from logto_webhooks.core.events.base import Id
from logto_webhooks.core.record import Key, Put, Value
from logto_webhooks.errors import ClaimsUnusable


class Claims(Struct, frozen=True, kw_only=True):
    """The claims of an ID token or of `/oidc/me`, as Logto names them."""

    sub: Id
    username: str | None = None
    email: str | None = None
    phone_number: str | None = None
    name: str | None = None
    picture: str | None = None


def change_of(claims: Mapping[str, Any]) -> Put:
    """What the claims tell, with the lowest stamp: whatever Logto says, before or after, wins.

    Raises ClaimsUnusable.
    """
    try:
        told = msgspec.convert(dict(claims), Claims)
    except msgspec.ValidationError as error:
        raise ClaimsUnusable(problem=str(error)) from None
    own: dict[str, Any] = {
        "username": told.username,
        "primaryEmail": told.email,
        "primaryPhone": told.phone_number,
        "name": told.name,
        "avatar": told.picture,
        "identities": {},
    }
    return Put(Key("user", told.sub), {"own": Value(own, 0, 0, 0)})
