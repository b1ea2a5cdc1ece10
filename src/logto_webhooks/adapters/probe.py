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

_BODY: Final = b'{"event":"doctor"}'
_HEADERS: Final = {"content-type": "application/json", "user-agent": "logto-webhooks doctor"}
# Of OpenSSL, why a certificate isn't good.
_EXPIRED: Final = 10
_NAMES: Final = (62, 64)  # of a host, of an IP address


async def post(url: str, limit_s: float) -> Probed:
    """Post once, and wait for so long; a redirect isn't followed."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(limit_s), httpx2.AsyncClient(timeout=None) as client:
            answer = await client.post(url, content=_BODY, headers=_HEADERS)
    except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError) as error:
        return Probed(problem=_problem(error), limit_s=limit_s)
    return Probed(
        took_ms=round((time.monotonic() - began) * 1000),
        status=answer.status_code,
        error=_error(answer),
        limit_s=limit_s,
        location=str(answer.url.join(answer.headers.get("location", ""))),
    )


def _error(answer: httpx2.Response) -> str:
    try:
        return msgspec.json.decode(answer.content, type=dict[str, str]).get("error", "")
    except msgspec.DecodeError:
        return ""


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
