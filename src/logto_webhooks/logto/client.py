"""The questions to Logto's Management API, and what is changed by it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from logto_webhooks.clock import Clock
from logto_webhooks.errors import InvalidApiResponse
from logto_webhooks.logto.api_responses import PAGE, ApiResponse
from logto_webhooks.logto.errors import ApiReply, not_a_logto, refusal, says_there_is_none
from logto_webhooks.logto.tokens import M2MCredentials, TokenProvider
from logto_webhooks.logto.transport import REQUEST_S, RateLimiter, Transport

_CLOUD: Final = re.compile(r"\Ahttps://[a-z0-9-]+\.logto\.app\Z")


class ManagementClient:
    """The Management API of one Logto, within a budget; listings come page by page.

    All methods raise LogtoUnreachable for what may be better later, LogtoApiError for what a person
    has to mend.

    `resource` is the API's identifier, `budget` a number of requests a second, `request_s` the
    time for one try. The connections open on first use, and belong to one event loop.
    """

    def __init__(
        self,
        endpoint: str,
        app_id: str,
        app_secret: str,
        *,
        now: Clock,
        resource: str | None = None,
        budget: float = 15.0,
        request_s: float = REQUEST_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint.rstrip("/")
        line = RateLimiter(budget, sleep, monotonic)
        self._exchange = Transport(self._endpoint, line, now, sleep, request_s)
        application = M2MCredentials(app_id, app_secret, resource or resource_of(self._endpoint))
        self._tokens = TokenProvider(self._exchange, application, monotonic)

    async def user(self, user_id: str) -> ApiResponse:
        """One user."""
        return await self._one(f"/api/users/{_part(user_id)}")

    async def organization(self, organization_id: str) -> ApiResponse:
        """One organization."""
        return await self._one(f"/api/organizations/{_part(organization_id)}")

    async def organizations_of(self, user_id: str) -> ApiResponse:
        """All organizations of one user."""
        return await self._one(f"/api/users/{_part(user_id)}/organizations", list)

    def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        """All users, the newest first, from a page on."""
        return self._pages("/api/users", page)

    def organizations(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        """All organizations, from a page on."""
        return self._pages("/api/organizations", page)

    def members(self, organization_id: str, page: int = 1) -> AsyncIterator[ApiResponse]:
        """An organization's members with their roles in it; none for an unknown organization."""
        return self._pages(f"/api/organizations/{_part(organization_id)}/users", page)

    def roles_of(self, user_id: str) -> AsyncIterator[ApiResponse]:
        """A user's roles; none for an unknown user."""
        return self._pages(f"/api/users/{_part(user_id)}/roles")

    def roles(self) -> AsyncIterator[ApiResponse]:
        """All roles, of users and of applications."""
        return self._pages("/api/roles")

    def holders(self, role_id: str, page: int = 1) -> AsyncIterator[ApiResponse]:
        """All users who have a role; none for an unknown role."""
        return self._pages(f"/api/roles/{_part(role_id)}/users", page)

    def hooks(self) -> AsyncIterator[ApiResponse]:
        """All webhooks, with their signing keys."""
        return self._pages("/api/hooks")

    def log(self, hook_id: str, start: int, end: int) -> AsyncIterator[ApiResponse]:
        """What a hook tried to deliver between two moments (ms), the newest first."""
        path = f"/api/hooks/{_part(hook_id)}/recent-logs"
        return self._pages(path, start_time=start, end_time=end)

    async def create_hook(self, name: str, url: str, events: Sequence[str]) -> ApiResponse:
        """Make a webhook. It is asked once: if that fails, it may be there all the same."""
        content = {"name": name, "events": list(events), "config": {"url": url}}
        return self._done(await self._send("POST", "/api/hooks", content, again=False))

    async def change_hook(self, hook_id: str, changes: dict[str, Any]) -> ApiResponse:
        """Replace some fields of a webhook, each whole."""
        return self._done(await self._send("PATCH", f"/api/hooks/{_part(hook_id)}", changes))

    async def rotate_key(self, hook_id: str) -> ApiResponse:
        """Give a webhook a new signing key; it is asked once. None if the webhook is unknown."""
        path = f"/api/hooks/{_part(hook_id)}/signing-key"
        return self._done(await self._send("PATCH", path, again=False))

    async def delete_hook(self, hook_id: str) -> ApiResponse:
        """Delete a webhook, if it is there."""
        return self._done(await self._send("DELETE", f"/api/hooks/{_part(hook_id)}"))

    async def test_hook(self, hook_id: str, url: str, event: str) -> ApiResponse:
        """Have a test sent to a URL. None if the webhook is unknown; else what went wrong, empty
        if nothing did."""
        content = {"events": [event], "config": {"url": url}}
        reply = await self._send("POST", f"/api/hooks/{_part(hook_id)}/test", content, again=False)
        if reply.status == 422 and reply.code:
            return _answered(reply, reply.content)
        return self._done(reply)

    async def close(self) -> None:
        """Give back the connections."""
        await self._tokens.close()
        await self._exchange.close()

    async def _one(self, path: str, shape: type = dict) -> ApiResponse:
        reply = await self._ask(path)
        if says_there_is_none(reply):
            return _answered(reply, None)
        if reply.unreadable:
            problem = "it is too large, nested too deep, or a number in it is out of range"
            raise InvalidApiResponse(kind="address", id=path, problem=problem)
        self._check(reply, shape)
        return _answered(reply, reply.content)

    async def _pages(self, path: str, page: int = 1, **params: int) -> AsyncIterator[ApiResponse]:
        """Page by `Total-Number`, from a page on: the Link header lacks /api."""
        more = True
        while more:
            reply = await self._ask(path, page=page, page_size=PAGE, **params)
            if says_there_is_none(reply):
                yield _answered(reply, [], 0)
                return
            content = await self._one_by_one(path, page, params) if reply.unreadable else None
            if content is None:
                self._check(reply, list)
                content = reply.content
            # Without it nobody knows whether the listing is whole, and who misses in it is gone.
            if reply.total is None:
                raise not_a_logto(self._endpoint, reply)
            yield _answered(reply, content, reply.total)
            more = bool(content) and page * PAGE < reply.total
            page += 1

    async def _one_by_one(self, path: str, page: int, params: dict[str, int]) -> list[Any]:
        """A page whose items can't be read together: None for each that can't be read alone."""
        items: list[Any] = []
        for number in range((page - 1) * PAGE + 1, page * PAGE + 1):
            reply = await self._ask(path, page=number, page_size=1, **params)
            if not reply.unreadable:
                self._check(reply, list)
            items += [None] if reply.unreadable else reply.content
        return items

    async def _ask(self, path: str, **params: int) -> ApiReply:
        return await self._with_token(partial(self._exchange.send, "GET", path, params=params))

    async def _send(
        self, method: str, path: str, content: object = None, *, again: bool = True
    ) -> ApiReply:
        """Change something; what isn't the same a second time is not sent `again`."""
        sending = partial(self._exchange.send, method, path, content=content, again=again)
        return await self._with_token(sending)

    async def _with_token(self, send: Callable[[str], Awaitable[ApiReply]]) -> ApiReply:
        token = await self._tokens.authorization()
        reply = await send(token)
        if reply.status == 401:
            reply = await send(await self._tokens.instead_of(token))
        return reply

    def _done(self, reply: ApiReply) -> ApiResponse:
        if says_there_is_none(reply):
            return _answered(reply, None)
        if reply.status == 204:
            return _answered(reply, {})
        self._check(reply, dict, 201)
        return _answered(reply, reply.content)

    def _check(
        self, reply: ApiReply, kind: type[dict[str, Any]] | type[list[Any]], *also: int
    ) -> None:
        if reply.status not in (200, *also):
            raise refusal(self._endpoint, reply)
        if not isinstance(reply.content, kind):
            raise not_a_logto(self._endpoint, reply)


def resource_of(endpoint: str) -> str:
    """Return the identifier of an endpoint's Management API; of a custom domain nobody knows it."""
    return f"{endpoint}/api" if _CLOUD.match(endpoint) else "https://default.logto.app/api"


def _part(text: str) -> str:
    """Quote a part of a path, its dots too: `..` would be the folder above."""
    return quote(text, safe="").replace(".", "%2E")


def _answered(reply: ApiReply, content: Any, total: int | None = None) -> ApiResponse:
    return ApiResponse(
        content=content, asked_at=reply.asked_at, took=reply.took, date=reply.date, total=total
    )
