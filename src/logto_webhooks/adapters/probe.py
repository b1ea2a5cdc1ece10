"""Posts what nobody signed to a webhook's URL, to see who answers, and how fast."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from typing import Final

import httpx2
import msgspec

from logto_webhooks.core.doctor.address import Probed, Problem

_LONGEST: Final = 4_096
_BODY: Final = b'{"event":"doctor"}'
_HEADERS: Final = {"content-type": "application/json", "user-agent": "logto-webhooks doctor"}
# Of OpenSSL, why a certificate isn't good.
_EXPIRED: Final = 10
_NAMES: Final = (62, 64)  # of a host, of an IP address


async def post(url: str, limit_s: float) -> Probed:
    """Post once, and wait for so long; a redirect isn't followed."""
    async with httpx2.AsyncClient(timeout=None) as client:
        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(limit_s),
                client.stream("POST", url, content=_BODY, headers=_HEADERS) as answer,
            ):
                error = await _error(answer)
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError) as problem:
            return Probed(problem=_problem(problem), limit_s=limit_s)
        took_ms = round((time.monotonic() - began) * 1000)
    return Probed(
        took_ms=took_ms,
        status=answer.status_code,
        error=error,
        location=_location(answer),
        limit_s=limit_s,
    )


async def _error(answer: httpx2.Response) -> str:
    """What an answer of ours calls itself; of another, which may have no end, little is read."""
    body = b""
    async for piece in answer.aiter_bytes():
        body += piece
        if len(body) > _LONGEST:
            return ""
    try:
        return msgspec.json.decode(body, type=dict[str, str]).get("error", "")
    except msgspec.DecodeError:
        return ""


def _location(answer: httpx2.Response) -> str:
    location = str(answer.headers.get("location", ""))
    try:
        return str(answer.url.join(location))
    except httpx2.InvalidURL:
        return location


def _problem(error: BaseException) -> Problem:
    """What lies at the bottom of it."""
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return "address_timeout"
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case ssl.SSLCertVerificationError():
                return _of_certificate(cause.verify_code)
            case ConnectionRefusedError():
                return "address_refused"
            case socket.gaierror():
                return "address_unknown"
        cause = cause.__cause__ or cause.__context__
    return "address_unreachable"


def _of_certificate(code: int) -> Problem:
    if code == _EXPIRED:
        return "tls_expired"
    return "tls_name" if code in _NAMES else "tls_untrusted"
