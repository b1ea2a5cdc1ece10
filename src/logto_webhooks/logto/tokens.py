"""The token with which Logto is asked: fetched once for all who ask, renewed before it ends."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Annotated, Final
from urllib.parse import quote_plus

import msgspec
from msgspec import Meta, Struct

from logto_webhooks.logto.errors import no_scope, not_a_logto, token_refusal
from logto_webhooks.logto.transport import Transport

RENEWED_BEFORE_S: Final = 60
SCOPE: Final = "all"


class M2MCredentials(Struct, frozen=True):
    """A machine-to-machine application, and the API for which it asks."""

    id: str
    secret: str
    resource: str

    def __repr__(self) -> str:
        """Without the secret."""
        return f"Application(id={self.id!r}, resource={self.resource!r})"

    @property
    def authorization(self) -> str:
        """HTTP basic, each part encoded as RFC 6749 (2.3.1) wants it."""
        pair = f"{quote_plus(self.id)}:{quote_plus(self.secret)}"
        return "Basic " + base64.b64encode(pair.encode()).decode()


class _Grant(Struct, frozen=True):
    access_token: Annotated[str, Meta(pattern=r"\A[!-~]+\Z")]
    expires_in: float
    scope: str = ""


class _Token(Struct, frozen=True):
    authorization: str
    good_until: float


class TokenProvider:
    """Has the token."""

    def __init__(
        self, exchange: Transport, application: M2MCredentials, monotonic: Callable[[], float]
    ) -> None:
        self._exchange = exchange
        self._application = application
        self._monotonic = monotonic
        self._renewal: asyncio.Task[_Token] | None = None

    async def authorization(self) -> str:
        """Return the header. Raises LogtoUnreachable, LogtoApiError.

        Who asks while it is being renewed shares the outcome.
        """
        if self._renewal is None or self._is_over(self._renewal):
            self._renewal = asyncio.create_task(self._renew())
            self._renewal.add_done_callback(_look_at)
        return (await asyncio.shield(self._renewal)).authorization

    async def instead_of(self, refused: str) -> str:
        """Return another header than the one that was refused."""
        renewal = self._renewal
        if renewal and _succeeded(renewal) and renewal.result().authorization == refused:
            self._renewal = None
        return await self.authorization()

    async def close(self) -> None:
        """Let nothing run on."""
        renewal, self._renewal = self._renewal, None
        if renewal:
            renewal.cancel()
            await asyncio.wait([renewal])

    def _is_over(self, renewal: asyncio.Task[_Token]) -> bool:
        if not renewal.done():
            return False
        return not _succeeded(renewal) or renewal.result().good_until <= self._monotonic()

    async def _renew(self) -> _Token:
        asked_at = self._monotonic()
        form = {
            "grant_type": "client_credentials",
            "resource": self._application.resource,
            "scope": SCOPE,
        }
        authorization = self._application.authorization
        reply = await self._exchange.send("POST", "/oidc/token", authorization, form=form)
        endpoint = self._exchange.endpoint
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


def _succeeded(renewal: asyncio.Task[_Token]) -> bool:
    return renewal.done() and not renewal.cancelled() and renewal.exception() is None


def _look_at(renewal: asyncio.Task[_Token]) -> None:
    """Asyncio complains of an error that nobody saw, as when all who waited were cancelled."""
    if not renewal.cancelled():
        renewal.exception()
