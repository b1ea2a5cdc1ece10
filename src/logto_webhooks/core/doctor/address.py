"""What is wrong with the webhook's URL, by how it answers to what nobody signed."""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

from logto_webhooks.core.doctor.findings import Finding, bare, fine, found

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


def of_answer(url: str, probed: Probed) -> list[Finding]:
    """Judge: a 401 of our own is what is good."""
    shown, status = bare(url), probed.status
    if probed.problem is not None:
        return [found(probed.problem, url=shown, seconds=round(probed.limit_s, 1))]
    if 300 <= status < 400:
        code = "address_lost" if status in _LOSING else "address_moved"
        return [found(code, url=shown, status=status, location=bare(probed.location))]
    if status == 401 and probed.error == "invalid_signature":
        if probed.took_ms > _SLOW * probed.limit_s * 1000:
            return [found("address_slow", url=shown, took_ms=probed.took_ms)]
        return [fine(f"{shown} answers in {probed.took_ms} ms, and refuses what isn't signed.")]
    return [found(_code(status), url=shown, status=status)]


def _code(status: int) -> str:
    if status >= 500:
        return "address_failing"
    if status < 300:
        return "address_open"
    return _BY_STATUS.get(status, "address_guarded")
