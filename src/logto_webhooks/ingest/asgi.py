"""The ASGI application: the webhook, health checks and metrics.

The webhook's path never redirects: Logto would follow with a GET without a body, and log the
loss as a success. So the path answers with and without a trailing slash.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeVar

import msgspec
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logto_webhooks.errors import (
    BodyIncomplete,
    BodyReadBefore,
    BodyTooLarge,
    BodyTooSlow,
    LogtoWebhooksError,
    NoRoom,
    UnknownPath,
    UserHasNoRow,
    UserIsDeletedError,
    UserNotReady,
)
from logto_webhooks.ingest import RETRY_AFTER_S, Receiver, WebhookResponse
from logto_webhooks.ingest.body import ByteLimiter, RequestBody, SharedTimeout
from logto_webhooks.ingest.group_commit import retrieve_error
from logto_webhooks.instrumentation import RefusedFor
from logto_webhooks.signing_keys import HEADER

READ_S: Final = 8.0  # Logto itself gives up after 10 s
_SIGNATURE: Final = HEADER.encode()
_SIGNATURE_SIZE: Final = 64
_UNREAD: Final = {"too_slow", "too_large", "no_room"}
_CODES: Final[dict[int, RefusedFor]] = {404: "not_found", 405: "method_not_allowed"}

T = TypeVar("T")
logger = logging.getLogger("logto_webhooks")
_NOTHING_CAME: Final = "no byte arrived: the client is slow, or middleware has read the body"
Ready = Callable[[], Awaitable[dict[str, Any]]]
Scrape = Callable[[str], Awaitable[tuple[bytes, str]]]
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def make_application(
    webhook: WebhookApp,
    receiver: Receiver,
    ready: Ready,
    lifespan: Lifespan,
    path: str,
    scrape: Scrape | None = None,
) -> ASGIApp:
    """Build the application. `ready` raises a LogtoWebhooksError that says what is missing, and
    otherwise returns what else the answer says.

    `scrape` gets the Accept header, and returns the metrics with their content type. Without it,
    there are no metrics.
    """
    paths = path_variants(path)
    routes = [Route("/metrics", _make_metrics(scrape))] if scrape else []
    other_paths = _make_other_paths(receiver, ready, lifespan, paths, routes)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in paths:
            await webhook(scope, receive, send)
        else:
            await other_paths(scope, receive, send)

    return app


def path_variants(path: str) -> set[str]:
    """Return a path with and without a trailing slash, because neither may redirect."""
    return {path.rstrip("/"), path.rstrip("/") + "/"}


class WebhookApp:
    """The webhook itself, as bare ASGI for speed."""

    def __init__(self, receiver: Receiver, max_body: int, room: ByteLimiter) -> None:
        self._receiver = receiver
        self._max_body = max_body
        self._room = room
        self._timeout = SharedTimeout(READ_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. The connection is closed if its body wasn't read."""
        response = await self.answer(scope, receive)
        if response is not None:  # otherwise, the client is gone
            await send_response(send, response)

    async def answer(self, scope: Scope, receive: Receive) -> WebhookResponse | None:
        """Read a request, and decide the answer; None if the body never arrived."""
        began = asyncio.get_running_loop().time()
        signatures: list[bytes] = []
        announced = 0
        for name, value in scope["headers"]:
            if name == _SIGNATURE:
                signatures.append(value)
            elif name == b"content-length" and value.isdigit():
                announced = int(value)
        # A body that can't be signed is read, so that the answer arrives, but not kept.
        may_be_signed = len(signatures) == 1 and len(signatures[0].strip()) == _SIGNATURE_SIZE
        body = RequestBody(self._room, began, keep=may_be_signed)
        try:
            try:
                with self._timeout.limit():
                    content = await body.read(receive, announced, self._max_body)
            except BodyIncomplete:
                return None
            except (BodyTooLarge, BodyReadBefore, NoRoom, TimeoutError) as error:
                return self._refuse(error, body)
            return await self._receiver.receive(signatures, content, began + READ_S, body)
        finally:
            body.close()

    def _refuse(self, error: Exception, body: RequestBody) -> WebhookResponse:
        """Answer a request whose body couldn't be read."""
        refuse, hint = self._receiver.refuse, "nothing was stored"
        match error:
            case BodyTooLarge():
                return refuse(413, "too_large", error, hint)
            case BodyReadBefore():
                return refuse(503, "body_gone", error, hint)
            case NoRoom():
                hint = "many large or slow bodies arrive at the same time, probably not from Logto"
                response = refuse(503, "no_room", error, hint)
                return replace(response, retry_after_s=RETRY_AFTER_S)
        slow = BodyTooSlow(seconds=READ_S)
        return refuse(408, "too_slow", slow, hint if body.size else _NOTHING_CAME)


def refuse_other_path(scope: Scope, paths: set[str]) -> WebhookResponse | None:
    """Answer a request that isn't to the webhook, without a framework; None if it is. The path may
    include where this is mounted (uvicorn's --root-path)."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    if path not in paths and not (path.startswith(f"{root}/") and path[len(root) :] in paths):
        return WebhookResponse(404, {"error": "not_found"})
    if scope["method"] != "POST":
        return WebhookResponse(405, {"error": "method_not_allowed"})
    return None


async def run_lifespan(
    lifespan: Callable[[], AbstractAsyncContextManager[None]], receive: Receive, send: Send
) -> None:
    """Enter a context when the server starts, and leave it when the server stops."""
    await receive()
    try:
        async with lifespan():
            await send({"type": "lifespan.startup.complete"})
            await receive()
    except LogtoWebhooksError as error:
        await send({"type": "lifespan.startup.failed", "message": str(error)})
        return
    await send({"type": "lifespan.shutdown.complete"})


def receive_from(request: Request) -> Receive:
    """Read the body through a framework's request, which has what was read of it before, and keep
    it there for later readers."""
    chunks = request.stream()
    read: list[bytes] = []

    async def receive() -> Message:
        try:
            chunk = await anext(chunks, b"")
        except ClientDisconnect:
            return {"type": "http.disconnect"}
        except RuntimeError:  # Starlette: "Stream consumed"
            raise BodyReadBefore() from None
        read.append(chunk)
        if not chunk:
            request._body = b"".join(read)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

    return receive


def to_response(answer: WebhookResponse | None) -> Response:
    """Make a Starlette response. Without an answer, the client is gone."""
    if answer is None:
        return Response(status_code=400)
    content = msgspec.json.encode(answer.content)
    response = Response(content, answer.status)
    response.raw_headers = _make_headers(answer, len(content))
    return response


async def answer_not_ready(request: Request, error: UserNotReady) -> Response:
    """Answer a request of a user whose own row isn't there yet."""
    logger.info("%s", error)
    return to_response(WebhookResponse(503, {"error": "user_not_ready"}, RETRY_AFTER_S))


async def answer_deleted(request: Request, error: UserIsDeletedError) -> Response:
    """Answer a request of a user who was deleted, and whose token is still valid."""
    return to_response(WebhookResponse(401, {"error": "user_is_deleted"}))


async def answer_no_row(request: Request, error: UserHasNoRow) -> Response:
    """Answer a request of a user who gets no own row."""
    return to_response(WebhookResponse(403, {"error": "user_has_no_row"}))


# Answers what `get_user` raises, in FastAPI and Starlette.
user_exception_handlers: Final[
    dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]
] = {
    UserNotReady: answer_not_ready,
    UserHasNoRow: answer_no_row,
    UserIsDeletedError: answer_deleted,
}


async def send_response(send: Send, answer: WebhookResponse) -> None:
    """Send an answer."""
    content = msgspec.json.encode(answer.content)
    headers = _make_headers(answer, len(content))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _make_headers(answer: WebhookResponse, size: int) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(size).encode())]
    if answer.content.get("error") in _UNREAD:
        headers.append((b"connection", b"close"))
    if answer.retry_after_s is not None:
        headers.append((b"retry-after", str(answer.retry_after_s).encode()))
    return headers


def _make_metrics(scrape: Scrape) -> Callable[[Request], Awaitable[Response]]:
    async def metrics(request: Request) -> Response:
        content, content_type = await scrape(request.headers.get("accept", ""))
        return Response(content, media_type=content_type)

    return metrics


def _make_other_paths(
    receiver: Receiver, ready: Ready, lifespan: Lifespan, paths: set[str], extra_routes: list[Route]
) -> ASGIApp:
    """Serve all other requests: health checks, and answers to a wrong path or method."""

    shared_ready = _share(ready)

    async def healthz(request: Request) -> Response:
        return _make_json(200, {"status": "ok"})

    async def readyz(request: Request) -> Response:
        try:
            remarks = await shared_ready()
        except LogtoWebhooksError as error:
            return _make_json(503, {"ready": False, "problem": str(error)})
        # A service that can receive is ready, even if nothing arrives.
        return _make_json(200, {"ready": True} | remarks)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _CODES[error.status_code]
        if request.method == "POST":
            wrong = UnknownPath(path=request.url.path)
            receiver.refuse(error.status_code, code, wrong, f"POST {min(paths)}")
        return _make_json(error.status_code, {"error": code}, dict(error.headers or {}))

    async def never(request: Request) -> Response:
        raise HTTPException(405, headers={"allow": "POST"})  # a POST doesn't come here

    routes = [Route(path, never, methods=["POST"]) for path in paths]
    routes += [Route("/healthz", healthz), Route("/readyz", readyz), *extra_routes]
    handlers = {404: refused, 405: refused}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


def _share(ask: Callable[[], Awaitable[T]]) -> Callable[[], Awaitable[T]]:
    """Share one call among concurrent callers: a flood of requests costs the database one
    statement at a time."""
    asking: asyncio.Future[T] | None = None

    async def shared() -> T:
        nonlocal asking
        if asking is None or asking.done():
            asking = asyncio.ensure_future(ask())
            asking.add_done_callback(retrieve_error)
        return await asyncio.shield(asking)

    return shared


def _make_json(
    status: int, content: dict[str, Any], headers: dict[str, str] | None = None
) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
