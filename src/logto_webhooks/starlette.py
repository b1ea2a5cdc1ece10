"""Starlette: `Starlette(routes=routes(logto), lifespan=logto.lifespan)`."""

from __future__ import annotations

from starlette.routing import Route

from logto_webhooks.app import LogtoWebhooks


def routes(logto: LogtoWebhooks) -> list[Route]:
    """Return the webhook's routes, with and without a trailing slash."""
    path = logto.path.rstrip("/")
    return [Route(each, logto.respond, methods=["POST"]) for each in (path, f"{path}/")]
