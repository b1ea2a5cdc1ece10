"""Probe the webhook's public URL."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from typing import Final, Literal

import httpx2
import msgspec
from msgspec import Struct

from logto_webhooks.doctor.findings import Finding, bare, fine, make_finding, skipped

LIMIT_S: Final = 10.0  # Logto's
_SLOW: Final = 0.3  # of the limit
Problem = Literal[
    "address_refused",
    "address_unknown",
    "address_unreachable",
    "address_timeout",
    "tls_expired",
    "tls_untrusted",
    "tls_name",
]
_REFUSED: Final = (401, "invalid_signature")  # what ours says to what nobody signed
_LOSING: Final = (301, 302, 303)
_BY_STATUS: Final = {404: "address_not_found", 405: "address_method"}


class Probed(Struct, frozen=True, kw_only=True):
    """An answer, or the problem; `error` is what it calls itself, where it is as one of ours.
    `limit_s` is how long it was waited for.
    """

    took_ms: int = 0
    status: int = 0
    error: str = ""
    location: str = ""
    problem: Problem | None = None
    limit_s: float = LIMIT_S


def judge_local(url: str, probed: Probed) -> Finding:
    """Judge where `serve` would listen; at which URL Logto reaches it isn't known."""
    unknown = "At which URL Logto reaches it isn't known: set LOGTO_WEBHOOKS_PUBLIC_URL."
    if (probed.status, probed.error) == _REFUSED:
        return fine(f"{bare(url)} answers. {unknown}")
    what = "Nothing listens" if probed.problem == "address_refused" else "Nothing of ours answers"
    return skipped(f"{what} at {bare(url)}, where serve does by these settings. {unknown}")


def judge_response(url: str, probed: Probed) -> list[Finding]:
    """Judge: a 401 of our own is what is good."""
    shown, status = bare(url), probed.status
    if probed.problem is not None:
        return [make_finding(probed.problem, url=shown, seconds=round(probed.limit_s, 1))]
    if 300 <= status < 400:
        code = "address_lost" if status in _LOSING else "address_moved"
        return [make_finding(code, url=shown, status=status, location=bare(probed.location))]
    if (status, probed.error) == _REFUSED:
        if probed.took_ms > _SLOW * probed.limit_s * 1000:
            return [make_finding("address_slow", url=shown, took_ms=probed.took_ms)]
        return [fine(f"{shown} answers in {probed.took_ms} ms, and refuses what isn't signed.")]
    return [make_finding(_code(status), url=shown, status=status)]


def _code(status: int) -> str:
    if status >= 500:
        return "address_failing"
    if status < 300:
        return "address_open"
    return _BY_STATUS.get(status, "address_guarded")


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
