"""The ASGI application of the service: the webhook, and whether the service is well.

No redirect ever comes from the webhook's path: Logto would follow it with a GET without a
body, and log the loss as a success. So both spellings, with and without a slash, are routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from logto_webhooks.core.signature import HEADER
from logto_webhooks.errors import BodyTooLarge, BodyTooSlow, LogtoWebhooksError, NotTheWebhook
from logto_webhooks.service.receive import Answer, Receiver

READ_S: Final = 8.0  # Logto itself gives up after 10 s
_SIGNATURE = HEADER.encode()
_CODES: Final = {404: "not_found", 405: "method_not_allowed"}

Ready = Callable[[], Awaitable[None]]
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def application(
    receiver: Receiver, ready: Ready, lifespan: Lifespan, *, path: str, max_body: int
) -> ASGIApp:
    """Build the application. `ready` raises a LogtoWebhooksError that says what is missing."""

    async def webhook(request: Request) -> Response:
        return await _receive(receiver, request, max_body)

    async def healthz(request: Request) -> Response:
        return _json(200, {"status": "ok"})

    async def readyz(request: Request) -> Response:
        try:
            await ready()
        except LogtoWebhooksError as error:
            return _json(503, {"ready": False, "problem": str(error)})
        return _json(200, {"ready": True})

    bare = path.rstrip("/")
    routes = [Route(each, webhook, methods=["POST"]) for each in (bare, f"{bare}/")]
    routes += [Route("/healthz", healthz), Route("/readyz", readyz)]

    async def refused(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        if request.method == "POST":
            receiver.refuse(status, "", NotTheWebhook(path=request.url.path), f"POST {bare}")
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        return _json(status, {"error": _CODES.get(status, "error")}, headers)

    handlers = {404: refused, 405: refused}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


async def _receive(receiver: Receiver, request: Request, max_body: int) -> Response:
    try:
        body = await _read(request, max_body)
    except BodyTooLarge as error:
        return _answer(receiver.refuse(413, "too_large", error, "nothing was stored"), close=True)
    except TimeoutError:
        slow = BodyTooSlow(seconds=READ_S)
        return _answer(receiver.refuse(408, "too_slow", slow, "nothing was stored"), close=True)
    except ClientDisconnect:
        return Response(status_code=400)  # nobody reads it
    signatures = [value for name, value in request.headers.raw if name == _SIGNATURE]
    return _answer(await receiver.receive(signatures, body))


async def _read(request: Request, limit: int) -> bytes:
    """Read the body, never more than `limit`. Raises BodyTooLarge, TimeoutError, or
    ClientDisconnect when it ends too early."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise BodyTooLarge(limit=limit)
    chunks, size = [], 0
    async with asyncio.timeout(READ_S):
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise BodyTooLarge(limit=limit)
            chunks.append(chunk)
    return b"".join(chunks)


def _answer(answer: Answer, close: bool = False) -> Response:
    headers = {"connection": "close"} if close else {}
    if answer.retry_after_s is not None:
        headers["retry-after"] = str(answer.retry_after_s)
    return _json(answer.status, answer.content, headers)


def _json(status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
