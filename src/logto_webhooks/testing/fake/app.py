"""Serves the fake on 127.0.0.1: who may ask, what goes wrong, and the headers of every answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from random import Random

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logto_webhooks.server import listen
from logto_webhooks.testing.fake.faults import Faults
from logto_webhooks.testing.fake.responses import refuse
from logto_webhooks.testing.fake.tokens import TokenRoutes


class FakeApp:
    """An ASGI application: what stands before the routes."""

    def __init__(
        self,
        routes: list[Route],
        tokens: TokenRoutes,
        faults: Callable[[], Faults],
        now: Callable[[], int],
        seed: int,
    ) -> None:
        token = Route("/oidc/token", tokens.give, methods=["POST"])
        self._app = Starlette(routes=[token, *routes])
        self._tokens = tokens
        self._faults = faults
        self._now = now
        self._random = Random(seed + 4)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["date"] = formatdate(self._now() / 1000, usegmt=True)
                headers["vary"] = "Accept-Encoding, Origin"
            await send(message)

        faults = self._faults()
        if faults.slow_ms:
            await asyncio.sleep(faults.slow_ms / 1000)
        app = self._fault(faults) or self._closed(Request(scope)) or self._app
        await app(scope, receive, dated)

    def _fault(self, faults: Faults) -> ASGIApp | None:
        busy, broken = self._random.random(), self._random.random()
        if busy < faults.status_429:
            made = refuse(429, "request.too_many_requests", "Too many requests.")
            if faults.retry_after_s is not None:
                made.headers["retry-after"] = str(faults.retry_after_s)
            return made
        if broken < faults.status_500:
            return Response("Internal Server Error", 500, media_type="text/plain")
        return None

    def _closed(self, request: Request) -> ASGIApp | None:
        path = request.url.path
        if not path.startswith("/api/") or path == "/api/status":
            return None
        return self._tokens.refusal(request)


@contextlib.asynccontextmanager
async def served(app: ASGIApp, port: int) -> AsyncIterator[str]:
    """Serve while the context lasts; gives the address. Raises AddressUnavailable."""
    listener = listen("127.0.0.1", port)
    # asyncio sets it only on sockets that name their protocol; without, each answer takes 40 ms.
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
    # Not `serve`: it takes the signals, and looks every 100 ms whether to stop.
    await server.startup([listener])
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        await server.shutdown([listener])
