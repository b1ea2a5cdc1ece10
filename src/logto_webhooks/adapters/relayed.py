"""What answers at the local end of a tunnel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from logto_webhooks.core.signature import HEADER
from logto_webhooks.service.listen import Answer

Take = Callable[[bytes, Sequence[bytes]], Awaitable[Answer]]


def application(take: Take, probe: str, mark: str, limit: int) -> ASGIApp:
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
