"""Starlette: `Starlette(routes=routes(logto), lifespan=logto.lifespan)`. For `get_user`, add
`exception_handlers=exception_handlers`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from logto_webhooks.app import LogtoWebhooks
from logto_webhooks.errors import UserHasNoRow, UserIsDeletedError, UserNotReady
from logto_webhooks.ingest.asgi import answer_deleted, answer_no_row, answer_not_ready

#: Answers what `get_user` raises: UserNotReady with 503 and `Retry-After`, UserHasNoRow with 403,
#: and UserIsDeletedError with 401.
exception_handlers: Final[
    dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]
] = {
    UserNotReady: answer_not_ready,
    UserHasNoRow: answer_no_row,
    UserIsDeletedError: answer_deleted,
}


def routes(logto: LogtoWebhooks) -> list[Route]:
    """Return the webhook's routes, with and without a trailing slash."""
    path = logto.path.rstrip("/")
    return [Route(each, logto.respond, methods=["POST"]) for each in (path, f"{path}/")]
