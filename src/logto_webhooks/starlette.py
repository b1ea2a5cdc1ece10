"""Starlette: `Starlette(routes=routes(logto), lifespan=logto.lifespan)`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from logto_webhooks.wiring.application import LogtoWebhooks


def routes(logto: LogtoWebhooks) -> list[Route]:
    """The webhook at its path, with and without a slash at its end."""

    async def receive(request: Request) -> Response:
        answer = await logto.answer(request.scope, request.receive)
        if answer is None:
            return Response(status_code=400)  # nobody is there to read it
        content = msgspec.json.encode(answer.content)
        return Response(content, answer.status, media_type="application/json")

    path = logto.path.rstrip("/")
    return [Route(each, receive, methods=["POST"]) for each in (path, f"{path}/")]
