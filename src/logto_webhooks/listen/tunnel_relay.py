"""Verify and forward what comes through a tunnel."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from logto_webhooks.deliveries import identify
from logto_webhooks.errors import NotADelivery, SignatureRejected
from logto_webhooks.interfaces import Clock
from logto_webhooks.listen.log_reader import (
    Forward,
    ForwardResponse,
    ForwardResult,
    describe_forward,
)
from logto_webhooks.signing_keys import HEADER, verify


class Relay:
    """Between the tunnel and the application: anybody can reach the one, only Logto the other."""

    def __init__(
        self,
        forward: Forward,
        clock: Clock,
        show: Callable[[ForwardResult], None],
        count: int | None,
    ) -> None:
        """`enough` is set after so many."""
        self.enough = asyncio.Event()
        self._forward = forward
        self._clock = clock
        self._show = show
        self._left = count
        self._open = asyncio.Event()
        self._keys: tuple[str, ...] = ()

    def open(self, key: str) -> None:
        """Take what is signed with the webhook's key; until it is known, who comes waits."""
        self._keys = (key,)
        self._open.set()

    async def take(self, body: bytes, signatures: Sequence[bytes]) -> ForwardResponse:
        """Pass a delivery on, and the application's answer back."""
        await self._open.wait()
        try:
            verified = verify(body, signatures, self._keys)
            delivery = identify(verified, self._clock.now())
        except SignatureRejected:
            return ForwardResponse(status=401)
        except NotADelivery:
            return ForwardResponse(status=400)
        if self.enough.is_set():
            return ForwardResponse(status=503)
        answer = await self._forward(body)
        self._show(describe_forward(delivery, answer))
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self.enough.set()
        return answer


Take = Callable[[bytes, Sequence[bytes]], Awaitable[ForwardResponse]]


def make_tunnel_app(take: Take, probe: str, mark: str, limit: int) -> ASGIApp:
    """Give every POST to `take`, and the mark to who asks for it. Bodies end at the limit."""

    async def delivered(request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                return Response(status_code=413)
        signatures = [each.encode("latin-1") for each in request.headers.getlist(HEADER)]
        answer = await take(bytes(body), signatures)
        if answer.problem is not None:
            return PlainTextResponse(answer.problem, 502)
        return Response(answer.body, answer.status or 502)

    async def marked(request: Request) -> Response:
        return PlainTextResponse(mark)

    routes = [
        Route(probe, marked, methods=["GET"]),
        Route("/{path:path}", delivered, methods=["POST"]),
    ]
    return Starlette(routes=routes)
