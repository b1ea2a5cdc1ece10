"""A client for Logto's Management API."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, Any, Final
from urllib.parse import quote, quote_plus

import msgspec
from msgspec import Meta, Struct

from logto_webhooks.clock import Clock
from logto_webhooks.errors import InvalidApiResponse
from logto_webhooks.logto.api_responses import PAGE, ApiResponse
from logto_webhooks.logto.errors import (
    ApiReply,
    no_scope,
    not_a_logto,
    refusal,
    repeats_pages,
    says_there_is_none,
    token_refusal,
)
from logto_webhooks.logto.pagination import ProgressCheck
from logto_webhooks.logto.transport import REQUEST_S, RateLimiter, Transport

_CLOUD: Final = re.compile(r"\Ahttps://[a-z0-9-]+\.logto\.app\Z")


class ManagementClient:
    """A client for the Management API of one Logto, with a rate limit. Listings come page by page.

    All methods raise LogtoUnreachable for errors that may pass, and LogtoApiError for errors that a
    person has to fix.

    `resource` is the API's identifier, `budget` the number of requests per second, `request_s` the
    time limit of a try. Connections are opened on first use, and belong to one event loop.
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
        limiter = RateLimiter(budget, sleep, monotonic)
        self._transport = Transport(self._endpoint, limiter, now, sleep, request_s, monotonic)
        application = M2MCredentials(app_id, app_secret, resource or resource_of(self._endpoint))
        self._tokens = TokenProvider(self._transport, application, monotonic)

    async def user(self, user_id: str) -> ApiResponse:
        """Return a user."""
        return await self._fetch(f"/api/users/{_quote(user_id)}")

    async def organization(self, organization_id: str) -> ApiResponse:
        """Return an organization."""
        return await self._fetch(f"/api/organizations/{_quote(organization_id)}")

    async def organizations_of(self, user_id: str) -> ApiResponse:
        """Return all organizations of a user."""
        return await self._fetch(f"/api/users/{_quote(user_id)}/organizations", list)

    def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        """List all users, the newest first, starting at a page."""
        return self._list_pages("/api/users", page)

    def organizations(self, page: int = 1) -> AsyncIterator[ApiResponse]:
        """List all organizations, starting at a page."""
        return self._list_pages("/api/organizations", page)

    def members(self, organization_id: str, page: int = 1) -> AsyncIterator[ApiResponse]:
        """List an organization's members with their roles in it; none if it is unknown."""
        return self._list_pages(f"/api/organizations/{_quote(organization_id)}/users", page)

    def roles_of(self, user_id: str) -> AsyncIterator[ApiResponse]:
        """List a user's roles; none if the user is unknown."""
        return self._list_pages(f"/api/users/{_quote(user_id)}/roles")

    def roles(self) -> AsyncIterator[ApiResponse]:
        """List all roles, of users and of applications."""
        return self._list_pages("/api/roles")

    def holders(self, role_id: str, page: int = 1) -> AsyncIterator[ApiResponse]:
        """List the users who have a role; none if it is unknown."""
        return self._list_pages(f"/api/roles/{_quote(role_id)}/users", page)

    def webhooks(self) -> AsyncIterator[ApiResponse]:
        """List all webhooks, with their signing keys."""
        return self._list_pages("/api/hooks")

    def log(self, webhook_id: str, start: int, end: int) -> AsyncIterator[ApiResponse]:
        """List a webhook's attempts to deliver between two moments (ms), the newest first."""
        path = f"/api/hooks/{_quote(webhook_id)}/recent-logs"
        return self._list_pages(path, start_time=start, end_time=end)

    async def create_webhook(self, name: str, url: str, events: Sequence[str]) -> ApiResponse:
        """Create a webhook, with a single try: if that fails, the webhook may exist anyway."""
        content = {"name": name, "events": list(events), "config": {"url": url}}
        return self._accept(await self._send("POST", "/api/hooks", content, again=False))

    async def change_webhook(self, webhook_id: str, changes: dict[str, Any]) -> ApiResponse:
        """Replace some fields of a webhook, each as a whole."""
        return self._accept(await self._send("PATCH", f"/api/hooks/{_quote(webhook_id)}", changes))

    async def rotate_key(self, webhook_id: str) -> ApiResponse:
        """Give a webhook a new signing key, with a single try. None if the webhook is unknown."""
        path = f"/api/hooks/{_quote(webhook_id)}/signing-key"
        return self._accept(await self._send("PATCH", path, again=False))

    async def delete_webhook(self, webhook_id: str) -> ApiResponse:
        """Delete a webhook, if it exists."""
        return self._accept(await self._send("DELETE", f"/api/hooks/{_quote(webhook_id)}"))

    async def test_webhook(self, webhook_id: str, url: str, event: str) -> ApiResponse:
        """Make Logto send a test to a URL. Return None if the webhook is unknown, else the error,
        which is empty after a success."""
        content = {"events": [event], "config": {"url": url}}
        path = f"/api/hooks/{_quote(webhook_id)}/test"
        reply = await self._send("POST", path, content, again=False)
        if reply.status == 422 and reply.code:
            return _to_response(reply, reply.content)
        return self._accept(reply)

    async def close(self) -> None:
        """Close the connections."""
        await self._tokens.close()
        await self._transport.close()

    async def _fetch(self, path: str, shape: type = dict) -> ApiResponse:
        reply = await self._ask(path)
        if says_there_is_none(reply):
            return _to_response(reply, None)
        if reply.unreadable:
            problem = "it is too large or nested too deeply, or contains a number out of range"
            raise InvalidApiResponse(kind="address", id=path, problem=problem)
        self._check(reply, shape)
        return _to_response(reply, reply.content)

    async def _list_pages(
        self, path: str, page: int = 1, **params: int
    ) -> AsyncIterator[ApiResponse]:
        """Page by `Total-Number`, starting at a page, because the Link header lacks /api. Raises
        LogtoApiError for a listing that would never end."""
        progress = ProgressCheck(page)
        more = True
        while more:
            reply = await self._ask(path, page=page, page_size=PAGE, **params)
            if says_there_is_none(reply):
                yield _to_response(reply, [], 0)
                return
            content = await self._fetch_one_by_one(path, page, params) if reply.unreadable else None
            if content is None:
                self._check(reply, list)
                content = reply.content
            # Without it, the listing may be incomplete, and missing records would count as deleted.
            if reply.total is None:
                raise not_a_logto(self._endpoint, reply)
            more = bool(content) and page * PAGE < reply.total
            if more and (problem := progress.find_problem(content, reply.total)):
                raise repeats_pages(self._endpoint, path, problem)
            yield _to_response(reply, content, reply.total)
            page += 1

    async def _fetch_one_by_one(self, path: str, page: int, params: dict[str, int]) -> list[Any]:
        """Fetch the items of an unreadable page one by one. None for each unreadable item."""
        items: list[Any] = []
        for number in range((page - 1) * PAGE + 1, page * PAGE + 1):
            reply = await self._ask(path, page=number, page_size=1, **params)
            if not reply.unreadable:
                self._check(reply, list)
            items += [None] if reply.unreadable else reply.content
        return items

    async def _ask(self, path: str, **params: int) -> ApiReply:
        return await self._send_with_token(
            partial(self._transport.send, "GET", path, params=params)
        )

    async def _send(
        self, method: str, path: str, content: object = None, *, again: bool = True
    ) -> ApiReply:
        """Send a change. Without `again`, it isn't retried, because a second one would differ."""
        sending = partial(self._transport.send, method, path, content=content, again=again)
        return await self._send_with_token(sending)

    async def _send_with_token(self, send: Callable[[str], Awaitable[ApiReply]]) -> ApiReply:
        token = await self._tokens.authorization()
        reply = await send(token)
        if reply.status == 401:
            reply = await send(await self._tokens.instead_of(token))
        return reply

    def _accept(self, reply: ApiReply) -> ApiResponse:
        if says_there_is_none(reply):
            return _to_response(reply, None)
        if reply.status == 204:
            return _to_response(reply, {})
        self._check(reply, dict, 201)
        return _to_response(reply, reply.content)

    def _check(
        self, reply: ApiReply, kind: type[dict[str, Any]] | type[list[Any]], *also: int
    ) -> None:
        if reply.status not in (200, *also):
            raise refusal(self._endpoint, reply)
        if not isinstance(reply.content, kind):
            raise not_a_logto(self._endpoint, reply)


def resource_of(endpoint: str) -> str:
    """Return the identifier of an endpoint's Management API. A custom domain doesn't reveal it."""
    return f"{endpoint}/api" if _CLOUD.match(endpoint) else "https://default.logto.app/api"


def _quote(text: str) -> str:
    """Quote a part of a path, including dots, because `..` would mean the parent."""
    return quote(text, safe="").replace(".", "%2E")


def _to_response(reply: ApiReply, content: Any, total: int | None = None) -> ApiResponse:
    return ApiResponse(
        content=content,
        asked_at=reply.asked_at,
        took=reply.took,
        date=reply.date,
        asked_after=reply.asked_after,
        total=total,
    )


RENEWED_BEFORE_S: Final = 60
SCOPE: Final = "all"


class M2MCredentials(Struct, frozen=True):
    """The credentials of a machine-to-machine application, and the API that it requests."""

    id: str
    secret: str
    resource: str

    def __repr__(self) -> str:
        """Without the secret."""
        return f"Application(id={self.id!r}, resource={self.resource!r})"

    @property
    def authorization(self) -> str:
        """The header for HTTP Basic, with each part encoded as in RFC 6749 (2.3.1)."""
        pair = f"{quote_plus(self.id)}:{quote_plus(self.secret)}"
        return "Basic " + base64.b64encode(pair.encode()).decode()


class _Grant(Struct, frozen=True):
    access_token: Annotated[str, Meta(pattern=r"\A[!-~]+\Z")]
    expires_in: float
    scope: str = ""

    def __repr__(self) -> str:
        """Without the token."""
        return f"_Grant(expires_in={self.expires_in!r}, scope={self.scope!r})"


class _Token(Struct, frozen=True):
    authorization: str
    good_until: float

    def __repr__(self) -> str:
        """Without the token."""
        return f"_Token(good_until={self.good_until!r})"


class TokenProvider:
    """Requests the access token, and renews it."""

    def __init__(
        self, transport: Transport, application: M2MCredentials, monotonic: Callable[[], float]
    ) -> None:
        self._transport = transport
        self._application = application
        self._monotonic = monotonic
        self._renewal: asyncio.Task[_Token] | None = None

    async def authorization(self) -> str:
        """Return the Authorization header. Raises LogtoUnreachable, LogtoApiError.

        Calls during a renewal share its outcome.
        """
        if self._renewal is None or self._is_over(self._renewal):
            self._renewal = asyncio.create_task(self._renew())
            self._renewal.add_done_callback(_mark_seen)
        return (await asyncio.shield(self._renewal)).authorization

    async def instead_of(self, refused: str) -> str:
        """Return a header other than the one that was refused."""
        renewal = self._renewal
        if renewal and _has_succeeded(renewal) and renewal.result().authorization == refused:
            self._renewal = None
        return await self.authorization()

    async def close(self) -> None:
        """Cancel a running renewal."""
        renewal, self._renewal = self._renewal, None
        if renewal:
            renewal.cancel()
            await asyncio.wait([renewal])

    def _is_over(self, renewal: asyncio.Task[_Token]) -> bool:
        if not renewal.done():
            return False
        return not _has_succeeded(renewal) or renewal.result().good_until <= self._monotonic()

    async def _renew(self) -> _Token:
        asked_at = self._monotonic()
        form = {
            "grant_type": "client_credentials",
            "resource": self._application.resource,
            "scope": SCOPE,
        }
        authorization = self._application.authorization
        reply = await self._transport.send("POST", "/oidc/token", authorization, form=form)
        endpoint = self._transport.endpoint
        if reply.status != 200:
            raise token_refusal(endpoint, reply, self._application.id)
        try:
            grant = msgspec.convert(reply.content, _Grant)
        except msgspec.ValidationError:
            raise not_a_logto(endpoint, reply) from None
        if SCOPE not in grant.scope.split():
            raise no_scope(endpoint)
        good_until = asked_at + grant.expires_in - RENEWED_BEFORE_S
        return _Token(f"Bearer {grant.access_token}", good_until)


def _has_succeeded(renewal: asyncio.Task[_Token]) -> bool:
    return renewal.done() and not renewal.cancelled() and renewal.exception() is None


def _mark_seen(renewal: asyncio.Task[_Token]) -> None:
    """Retrieve the error: if all callers were cancelled, asyncio would log that nobody did."""
    if not renewal.cancelled():
        renewal.exception()
