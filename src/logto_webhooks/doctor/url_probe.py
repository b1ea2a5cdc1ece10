"""Post to the webhook's URL, and find out what answers."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from typing import Final

import httpx2
import msgspec

from logto_webhooks.doctor.context import ProbeResult, Problem

_LONGEST: Final = 4_096
_BODY: Final = b'{"event":"doctor"}'
_HEADERS: Final = {"content-type": "application/json", "user-agent": "logto-webhooks doctor"}
# OpenSSL's codes for invalid certificates.
_EXPIRED: Final = 10
_WRONG_NAME: Final = (62, 64)  # of a host, of an IP address


async def post(url: str, limit_s: float) -> ProbeResult:
    """Post once, within a time limit, without following redirects."""
    async with httpx2.AsyncClient(timeout=None) as client:
        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(limit_s),
                client.stream("POST", url, content=_BODY, headers=_HEADERS) as response,
            ):
                name = await _read_error(response)
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError) as error:
            return ProbeResult(problem=_find_problem(error), limit_s=limit_s)
        took_ms = round((time.monotonic() - began) * 1000)
    return ProbeResult(
        took_ms=took_ms,
        status=response.status_code,
        error=name,
        location=_read_location(response),
        limit_s=limit_s,
    )


async def _read_error(response: httpx2.Response) -> str:
    """Read the error's name from a response of our service; of others, read only a little."""
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > _LONGEST:
            return ""
    try:
        return msgspec.json.decode(body, type=dict[str, str]).get("error", "")
    except msgspec.DecodeError:
        return ""


def _read_location(response: httpx2.Response) -> str:
    location = str(response.headers.get("location", ""))
    try:
        return str(response.url.join(location))
    except httpx2.InvalidURL:
        return location


def _find_problem(error: BaseException) -> Problem:
    """Find the innermost cause."""
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return "address_timeout"
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case ssl.SSLCertVerificationError():
                return _name_certificate_problem(cause.verify_code)
            case ConnectionRefusedError():
                return "address_refused"
            case socket.gaierror():
                return "address_unknown"
        cause = cause.__cause__ or cause.__context__
    return "address_unreachable"


def _name_certificate_problem(code: int) -> Problem:
    if code == _EXPIRED:
        return "tls_expired"
    return "tls_name" if code in _WRONG_NAME else "tls_untrusted"
