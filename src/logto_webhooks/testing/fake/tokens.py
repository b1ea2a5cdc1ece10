"""Access tokens by client credentials."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from random import Random
from typing import Final
from urllib.parse import parse_qsl, unquote_plus

from starlette.requests import Request
from starlette.responses import Response

from logto_webhooks.samples.payloads import new_id
from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake.responses import answer, refuse

RESOURCE: Final = "https://default.logto.app/api"
LIVES_S: Final = 3600


class TokenRoutes:
    """Gives tokens to one application, and knows them again."""

    def __init__(self, app_id: str, app_secret: str, now: Callable[[], int], seed: int) -> None:
        self._credentials = (app_id, app_secret)
        self._now = now
        self._random = Random(seed + 3)
        self.has_role = True
        self._given: dict[str, tuple[int, str]] = {}

    async def give(self, request: Request) -> Response:
        """Answer `POST /oidc/token`."""
        form = dict(parse_qsl((await request.body()).decode(errors="replace")))
        made = self._give(request, form)
        made.headers["cache-control"] = "no-store"
        return made

    def refusal(self, request: Request) -> Response | None:
        """Say why the API is closed to a request; None if it is open."""
        given = request.headers.get("authorization")
        if given is None:
            message = "Authorization header is missing."
            return refuse(401, "auth.authorization_header_missing", message)
        if not given.startswith("Bearer "):
            message, data = "Authorization type is not supported.", {"supportedTypes": ["Bearer"]}
            return refuse(401, "auth.authorization_token_type_not_supported", message, data)
        return self._unfit(given.removeprefix("Bearer "))

    def revoke(self) -> None:
        """Make all tokens invalid."""
        self._given.clear()

    def _unfit(self, token: str) -> Response | None:
        expires_at, scope = self._given.get(token, (None, ""))
        if expires_at is None:
            return _unauthorized({"code": "ERR_JWS_INVALID", "name": "JWSInvalid"})
        if self._now() >= expires_at:
            return _unauthorized({"code": "ERR_JWT_EXPIRED", "name": "JWTExpired"})
        if scope != "all":
            message = "Forbidden. Please check your user roles and permissions."
            return refuse(403, "auth.forbidden", message)
        return None

    def _give(self, request: Request, form: dict[str, str]) -> Response:
        if (_basic(request) or (form.get("client_id"), form.get("client_secret"))) != (
            self._credentials
        ):
            return _invalid_client(request)
        if form.get("grant_type") != "client_credentials":
            message = "unsupported grant_type requested"
            return _oidc(400, "unsupported_grant_type", message, message)
        if form.get("resource") != RESOURCE:
            problem = "resource indicator is missing, or unknown"
            return _oidc(400, "invalid_target", "Invalid resource indicator.", problem)
        return answer(self._new_token(form))

    def _new_token(self, form: dict[str, str]) -> Json:
        token = ".".join(new_id(self._random, length) for length in (96, 240, 128))
        scope = "all" if self.has_role and "all" in form.get("scope", "").split() else ""
        self._given[token] = (self._now() + LIVES_S * 1000, scope)
        made = {"access_token": token, "expires_in": LIVES_S, "token_type": "Bearer"}
        return made | ({"scope": scope} if scope else {})


def _basic(request: Request) -> tuple[str, str] | None:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind != "Basic":
        return None
    try:
        user, _, secret = base64.b64decode(given).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return ("", "")
    return unquote_plus(user), unquote_plus(secret)


def _unauthorized(data: Json) -> Response:
    message = "Unauthorized. Please check credentials and its scope."
    return refuse(401, "auth.unauthorized", message, data)


def _invalid_client(request: Request) -> Response:
    problem = "client authentication failed"
    message = "An OIDC error occurred: oidc.invalid_client."
    made = _oidc(401, "invalid_client", message, problem)
    if "authorization" in request.headers:
        realm = f"{request.url.scheme}://{request.url.netloc}/oidc"
        told = f'Basic realm="{realm}", error="invalid_client", error_description="{problem}"'
        made.headers["www-authenticate"] = told
    return made


def _oidc(status: int, error: str, message: str, problem: str) -> Response:
    told = {"code": f"oidc.{error}", "message": message}
    return answer(told | {"error": error, "error_description": problem}, status)
