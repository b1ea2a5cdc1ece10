"""Forward deliveries to an application, signed with its key."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import httpx2
from msgspec import Struct

from logto_webhooks.deliveries import NewDelivery, api_call
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.samples.request import make_headers
from logto_webhooks.validation import is_url

TIMEOUT_S: Final = 10.0  # as Logto's
_MOST_BYTES: Final = 2**16


class ForwardResponse(Struct, frozen=True, kw_only=True):
    """The application's response, or the problem if there is none."""

    status: int | None = None
    body: bytes = b""
    problem: str | None = None
    took_ms: int = 0


class ForwardResult(Struct, frozen=True, kw_only=True):
    """A delivery and the application's response."""

    occurred_at: int
    event: str
    subject: str | None
    call: str
    status: int | None
    problem: str | None
    took_ms: int


def describe_forward(delivery: NewDelivery, response: ForwardResponse) -> ForwardResult:
    """Describe a delivery and its response, for display."""
    return ForwardResult(
        occurred_at=delivery.occurred_at,
        event=delivery.event,
        subject=delivery.subject,
        call=api_call(delivery.body),
        status=response.status,
        problem=response.problem,
        took_ms=response.took_ms,
    )


class Forwarder:
    """Posts to one URL during its block. A failure is also a response."""

    def __init__(self, url: str, key: str) -> None:
        """Raises SettingInvalid if the URL is invalid."""
        self._url = _parse_url(url)
        self._key = key
        self._client = httpx2.AsyncClient(timeout=TIMEOUT_S)

    @property
    def path(self) -> str:
        """The path of the URL."""
        return self._url.path

    async def forward(self, body: bytes) -> ForwardResponse:
        """Post a body once. Redirects aren't followed: if Logto follows one, the body is lost."""
        began = time.monotonic()
        status, content, problem = None, b"", None
        headers = make_headers(body, self._key)
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._client.stream("POST", self._url, content=body, headers=headers) as response,
            ):
                content, status = await _read_beginning(response), response.status_code
        except (httpx2.HTTPError, TimeoutError) as error:
            problem = _describe(error)
        took_ms = round((time.monotonic() - began) * 1000)
        return ForwardResponse(status=status, body=content, problem=problem, took_ms=took_ms)

    async def __aenter__(self) -> Forwarder:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()


def _parse_url(url: str) -> httpx2.URL:
    try:
        if is_url(url):
            return httpx2.URL(url)
    except httpx2.InvalidURL:
        pass
    problem = f"{url!r} must look like http://127.0.0.1:8000/path"
    raise SettingInvalid(name="--forward-to", problem=problem)


async def _read_beginning(response: httpx2.Response) -> bytes:
    """Read the body, but at most `_MOST_BYTES`."""
    content = b""
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > _MOST_BYTES:
            break
    return content[:_MOST_BYTES]


def _describe(error: BaseException) -> str:
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return f"no answer within {TIMEOUT_S:g} s"
    if isinstance(error, httpx2.ConnectError):
        return f"can't connect: {error}"
    return f"the connection was lost ({type(error).__name__})"
