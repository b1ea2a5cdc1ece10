"""Forwards deliveries to an application, signed again with its own key."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import httpx2

from logto_webhooks.errors import SettingInvalid
from logto_webhooks.listen.log_reader import ForwardResponse
from logto_webhooks.samples.request import make_headers
from logto_webhooks.validation import is_url

TIMEOUT_S: Final = 10.0  # Logto's
_LONGEST: Final = 2**16


class Forwarder:
    """Posts to one URL, as long as its block lasts; whatever comes of it is an answer."""

    def __init__(self, url: str, key: str) -> None:
        """Raises SettingInvalid for what is no URL."""
        self._url = _read(url)
        self._key = key
        self._client = httpx2.AsyncClient(timeout=TIMEOUT_S)

    @property
    def path(self) -> str:
        """The path of the URL."""
        return self._url.path

    async def forward(self, body: bytes) -> ForwardResponse:
        """Post a body once. A redirect isn't followed: with Logto it would lose the delivery."""
        began = time.monotonic()
        headers = make_headers(body, self._key)
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._client.stream("POST", self._url, content=body, headers=headers) as answer,
            ):
                content = await _beginning(answer)
        except (httpx2.HTTPError, TimeoutError) as error:
            return ForwardResponse(problem=_problem(error), took_ms=_since(began))
        return ForwardResponse(status=answer.status_code, body=content, took_ms=_since(began))

    async def __aenter__(self) -> Forwarder:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()


def _read(url: str) -> httpx2.URL:
    try:
        read = httpx2.URL(url)
    except httpx2.InvalidURL:
        read = None
    if read is None or not is_url(url):
        problem = f"{url!r} isn't like http://127.0.0.1:8000/path"
        raise SettingInvalid(name="--forward-to", problem=problem)
    return read


async def _beginning(answer: httpx2.Response) -> bytes:
    """What it says; of one that has no end, a piece."""
    content = b""
    async for piece in answer.aiter_bytes():
        content += piece
        if len(content) > _LONGEST:
            break
    return content[:_LONGEST]


def _problem(error: BaseException) -> str:
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return f"no answer within {TIMEOUT_S:g} s"
    if isinstance(error, httpx2.ConnectError):
        return f"not reached: {error}"
    return f"the connection broke ({type(error).__name__})"


def _since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
