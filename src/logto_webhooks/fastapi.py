"""FastAPI: `app.include_router(router(logto))`. The router includes the lifespan. For `get_user`,
write `FastAPI(exception_handlers=exception_handlers)`."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from logto_webhooks.app import LogtoWebhooks
from logto_webhooks.ingest.asgi import user_exception_handlers

#: Answers what `get_user` raises: UserNotReady with 503 and `Retry-After`, UserHasNoRow with 403,
#: and UserIsDeletedError with 401.
exception_handlers: Final = user_exception_handlers


class AcceptedBody(BaseModel):
    """The answer to an accepted delivery, which is on disk."""

    id: str
    duplicate: bool


class RefusedBody(BaseModel):
    """The answer to a rejected request."""

    error: str


def router(logto: LogtoWebhooks) -> APIRouter:
    """Return a router with the webhook at its path, with and without a trailing slash."""

    async def receive(request: Request) -> Response:
        return await logto.respond(request)

    made = APIRouter(lifespan=logto.lifespan)
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": RefusedBody} for status in (400, 401, 413, 503)
    }
    path = logto.path.rstrip("/")
    made.post(path, response_model=AcceptedBody, responses=refused, name="logto")(receive)
    made.post(f"{path}/", include_in_schema=False)(receive)
    return made
