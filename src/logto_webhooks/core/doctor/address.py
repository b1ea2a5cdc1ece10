"""What is wrong with the webhook's URL, by how it answers to what nobody signed."""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

from logto_webhooks.core.doctor.findings import Finding, bare, fine, found, skipped

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


def of_home(url: str, probed: Probed) -> Finding:
    """Judge where `serve` would listen; at which URL Logto reaches it isn't known."""
    unknown = "At which URL Logto reaches it isn't known: set LOGTO_WEBHOOKS_PUBLIC_URL."
    if (probed.status, probed.error) == _REFUSED:
        return fine(f"{bare(url)} answers. {unknown}")
    what = "Nothing listens" if probed.problem == "address_refused" else "Nothing of ours answers"
    return skipped(f"{what} at {bare(url)}, where serve does by these settings. {unknown}")


def of_answer(url: str, probed: Probed) -> list[Finding]:
    """Judge: a 401 of our own is what is good."""
    shown, status = bare(url), probed.status
    if probed.problem is not None:
        return [found(probed.problem, url=shown, seconds=round(probed.limit_s, 1))]
    if 300 <= status < 400:
        code = "address_lost" if status in _LOSING else "address_moved"
        return [found(code, url=shown, status=status, location=bare(probed.location))]
    if (status, probed.error) == _REFUSED:
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
