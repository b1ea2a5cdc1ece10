"""A STAND-IN THAT YOU MUST REPLACE: authentication.

In an application of yours, `claims_of` verifies an access or ID token that Logto issued: its
signature by the keys of `{LOGTO_ENDPOINT}/oidc/jwks`, its issuer, audience and expiry, as the
library for JSON Web Tokens of your choice does it. So that this example runs without a Logto, a
token is here JSON signed with TOKEN_SECRET. `python -m app.auth '{"sub": "ana"}'` prints one.
"""

from __future__ import annotations

import base64
import hmac
import json
import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request

from app.settings import TOKEN_SECRET

HOUR_S = 3600


def token_of(claims: Mapping[str, Any]) -> str:
    """Make a token that expires after an hour."""
    content = json.dumps({"exp": time.time() + HOUR_S, **claims}).encode()
    return f"{base64.urlsafe_b64encode(content).decode()}.{_signature(content)}"


def claims_of(token: str) -> dict[str, Any]:
    """Return a token's claims. Raises ValueError if its signature is wrong or it has expired."""
    encoded, _, signature = token.partition(".")
    content = base64.urlsafe_b64decode(encoded)
    if not hmac.compare_digest(signature.encode(), _signature(content).encode()):
        raise ValueError("it isn't signed with the secret")
    claims: dict[str, Any] = json.loads(content)
    if claims["exp"] < time.time():
        raise ValueError("it has expired")
    return claims


def _signature(content: bytes) -> str:
    return hmac.digest(TOKEN_SECRET.encode(), content, "sha256").hex()


def _claims(request: Request) -> dict[str, Any]:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    try:
        if scheme.lower() != "bearer":
            raise ValueError("there is none")
        return claims_of(token)
    except ValueError:
        refused = {"WWW-Authenticate": "Bearer"}
        raise HTTPException(401, "a bearer token is needed", refused) from None


Claims = Annotated[dict[str, Any], Depends(_claims)]

if __name__ == "__main__":
    print(token_of(json.loads(sys.argv[1])))
