"""What the claims of a token tell of its user: enough to begin with, and less than anything that
Logto says of the user itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from logto_webhooks.core.record import Key, Put, Value
from logto_webhooks.errors import ClaimsUnusable

# Alone they are no text: no database has them.
_SURROGATES: Final = r"\ud800-\udfff"
Text = Annotated[str, Meta(pattern=rf"\A[^{_SURROGATES}]*\Z")]
Sub = Annotated[str, Meta(min_length=1, max_length=256, pattern=rf"\A[^\0:{_SURROGATES}]*\Z")]


class Claims(Struct, frozen=True, kw_only=True):
    """The claims of an ID token, an access token or of `/oidc/me`, as Logto names them.

    An application's own token has its id in both `sub` and `client_id`.
    """

    sub: Sub
    client_id: Any = None
    username: Text | None = None
    email: Text | None = None
    phone_number: Text | None = None
    name: Text | None = None
    picture: Text | None = None


def change_of(claims: Mapping[str, Any]) -> Put:
    """What the claims tell, with the lowest stamp: whatever Logto says, before or after, wins.

    Raises ClaimsUnusable.
    """
    if not isinstance(claims, Mapping):
        raise ClaimsUnusable(problem=f"they are a {type(claims).__name__}, not a mapping")
    try:
        told = msgspec.convert(dict(claims), Claims)
    except msgspec.ValidationError as error:
        raise ClaimsUnusable(problem=str(error)) from None
    if told.client_id == told.sub:
        raise ClaimsUnusable(problem="they are an application's, whose `sub` is its `client_id`")
    own: dict[str, Any] = {
        "username": told.username,
        "primaryEmail": told.email,
        "primaryPhone": told.phone_number,
        "name": told.name,
        "avatar": told.picture,
        "identities": {},
    }
    return Put(Key("user", told.sub), {"own": Value(own, 0, 0, 0)})
