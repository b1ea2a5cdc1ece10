"""What follows a failed try: a wait, or the end. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final

from msgspec import Struct

TRIES: Final = 4
FIRST_WAIT_S: Final = 0.5
LONGEST_WAIT_S: Final = 30.0


class Wait(Struct, frozen=True):
    """Try again after so many seconds."""

    seconds: float


class GiveUp(Struct, frozen=True):
    """Try no more."""


def after_failure(tries: int, asked_for: float | None, jitter: float) -> Wait | GiveUp:
    """Decide after so many failed tries.

    `asked_for` are the seconds that the answer wants us to wait. Else the waits double from half
    a second on; `jitter` (0 to 1) adds up to as much, so that what failed together isn't tried
    together.
    """
    if tries >= TRIES:
        return GiveUp()
    if asked_for is not None:
        return Wait(min(asked_for, LONGEST_WAIT_S))
    return Wait(FIRST_WAIT_S * 2.0 ** (tries - 1) * (1 + jitter))


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After: seconds, or a moment on the clock that the Date header tells."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    until, now = moment(text), moment(headers.get("date", ""))
    return None if until is None or now is None else max(0.0, (until - now) / 1000)


def moment(text: str) -> int | None:
    """Milliseconds since the epoch of a header's date; None if it is none."""
    try:
        return round(parsedate_to_datetime(text).timestamp() * 1000)
    except (ValueError, OverflowError):
        return None
