"""Starlette: `Starlette(routes=routes(logto), lifespan=logto.lifespan)`. For `get_user`, add
`exception_handlers=exception_handlers`."""

from __future__ import annotations

from typing import Final

from starlette.routing import Route

from logto_webhooks.app import LogtoWebhooks
from logto_webhooks.ingest.asgi import user_exception_handlers

#: Answers what `get_user` raises: UserNotReady with 503 and `Retry-After`, UserHasNoRow with 403,
#: and UserIsDeletedError with 401.
exception_handlers: Final = user_exception_handlers


def routes(logto: LogtoWebhooks) -> list[Route]:
    """Return the webhook's routes, with and without a trailing slash."""
    path = logto.path.rstrip("/")
    return [Route(each, logto.respond, methods=["POST"]) for each in (path, f"{path}/")]
