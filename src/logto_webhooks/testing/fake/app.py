"""Serves the fake on 127.0.0.1: tokens, authorization, faults and headers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from random import Random
from typing import Final
from urllib.parse import parse_qsl, unquote_plus

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logto_webhooks.samples.payloads import new_id
from logto_webhooks.samples.shapes import Json
from logto_webhooks.server import listen
from logto_webhooks.testing.fake.routes import Refusal, answer, refuse
from logto_webhooks.testing.fake.sender import Faults

RESOURCE: Final = "https://default.logto.app/api"
LIVES_S: Final = 3600


class FakeApp:
    """An ASGI application in front of the routes."""

    def __init__(
        self,
        routes: list[Route],
        tokens: TokenRoutes,
        faults: Callable[[], Faults],
        now: Callable[[], int],
        seed: int,
    ) -> None:
        token = Route("/oidc/token", tokens.issue, methods=["POST"])
        self._app = Starlette(
            routes=[token, *routes], exception_handlers={Refusal: _answer_refusal}
        )
        self._tokens = tokens
        self._faults = faults
        self._now = now
        self._random = Random(seed + 4)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def send_dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["date"] = formatdate(self._now() / 1000, usegmt=True)
                headers["vary"] = "Accept-Encoding, Origin"
            await send(message)

        faults = self._faults()
        if faults.slow_ms:
            await asyncio.sleep(faults.slow_ms / 1000)
        app = self._break(faults) or self._refuse_stranger(Request(scope)) or self._app
        await app(scope, receive, send_dated)

    def _break(self, faults: Faults) -> ASGIApp | None:
        busy, broken = self._random.random(), self._random.random()
        if busy < faults.status_429:
            refusal = refuse(429, "request.too_many_requests", "Too many requests.")
            if faults.retry_after_s is not None:
                refusal.headers["retry-after"] = str(faults.retry_after_s)
            return refusal
        if broken < faults.status_500:
            return Response("Internal Server Error", 500, media_type="text/plain")
        return None

    def _refuse_stranger(self, request: Request) -> ASGIApp | None:
        path = request.url.path
        if not path.startswith("/api/") or path == "/api/status":
            return None
        return self._tokens.check(request)


async def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response


@contextlib.asynccontextmanager
async def serve(app: ASGIApp, port: int) -> AsyncIterator[str]:
    """Serve within the context. Yields the address. Raises AddressUnavailable."""
    listener = listen("127.0.0.1", port)
    # asyncio sets this only on sockets that name their protocol. Without it, answers take 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=1,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    # Not `serve`, which handles signals, and checks only every 100 ms whether to stop.
    await server.startup([listener])
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        await server.shutdown([listener])


class TokenRoutes:
    """Issues tokens to one application, and checks them."""

    def __init__(self, app_id: str, app_secret: str, now: Callable[[], int], seed: int) -> None:
        self._credentials = (app_id, app_secret)
        self._now = now
        self._random = Random(seed + 3)
        self.has_role = True
        self._issued: dict[str, tuple[int, str]] = {}

    async def issue(self, request: Request) -> Response:
        """Answer `POST /oidc/token`."""
        form = dict(parse_qsl((await request.body()).decode(errors="replace")))
        response = self._issue(request, form)
        response.headers["cache-control"] = "no-store"
        return response

    def check(self, request: Request) -> Response | None:
        """Refuse a request without a valid token; None if it has one."""
        authorization = request.headers.get("authorization")
        if authorization is None:
            message = "Authorization header is missing."
            return refuse(401, "auth.authorization_header_missing", message)
        if not authorization.startswith("Bearer "):
            message, data = "Authorization type is not supported.", {"supportedTypes": ["Bearer"]}
            return refuse(401, "auth.authorization_token_type_not_supported", message, data)
        return self._check_token(authorization.removeprefix("Bearer "))

    def revoke(self) -> None:
        """Make all tokens invalid."""
        self._issued.clear()

    def _check_token(self, token: str) -> Response | None:
        expires_at, scope = self._issued.get(token, (None, ""))
        if expires_at is None:
            return _refuse_token({"code": "ERR_JWS_INVALID", "name": "JWSInvalid"})
        if self._now() >= expires_at:
            return _refuse_token({"code": "ERR_JWT_EXPIRED", "name": "JWTExpired"})
        if scope != "all":
            message = "Forbidden. Please check your user roles and permissions."
            return refuse(403, "auth.forbidden", message)
        return None

    def _issue(self, request: Request, form: dict[str, str]) -> Response:
        in_form = (form.get("client_id"), form.get("client_secret"))
        if (_read_basic(request) or in_form) != self._credentials:
            return _refuse_client(request)
        if form.get("grant_type") != "client_credentials":
            message = "unsupported grant_type requested"
            return _refuse_oidc(400, "unsupported_grant_type", message, message)
        if form.get("resource") != RESOURCE:
            problem = "resource indicator is missing, or unknown"
            return _refuse_oidc(400, "invalid_target", "Invalid resource indicator.", problem)
        return answer(self._make_token(form))

    def _make_token(self, form: dict[str, str]) -> Json:
        token = ".".join(new_id(self._random, length) for length in (96, 240, 128))
        scope = "all" if self.has_role and "all" in form.get("scope", "").split() else ""
        self._issued[token] = (self._now() + LIVES_S * 1000, scope)
        grant = {"access_token": token, "expires_in": LIVES_S, "token_type": "Bearer"}
        return grant | ({"scope": scope} if scope else {})


def _read_basic(request: Request) -> tuple[str, str] | None:
    kind, _, encoded = request.headers.get("authorization", "").partition(" ")
    if kind != "Basic":
        return None
    try:
        user, _, secret = base64.b64decode(encoded).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return ("", "")
    return unquote_plus(user), unquote_plus(secret)


def _refuse_token(data: Json) -> Response:
    message = "Unauthorized. Please check credentials and its scope."
    return refuse(401, "auth.unauthorized", message, data)


def _refuse_client(request: Request) -> Response:
    problem = "client authentication failed"
    message = "An OIDC error occurred: oidc.invalid_client."
    refusal = _refuse_oidc(401, "invalid_client", message, problem)
    if "authorization" in request.headers:
        realm = f"{request.url.scheme}://{request.url.netloc}/oidc"
        refusal.headers["www-authenticate"] = (
            f'Basic realm="{realm}", error="invalid_client", error_description="{problem}"'
        )
    return refusal


def _refuse_oidc(status: int, error: str, message: str, problem: str) -> Response:
    content = {"code": f"oidc.{error}", "message": message}
    return answer(content | {"error": error, "error_description": problem}, status)
