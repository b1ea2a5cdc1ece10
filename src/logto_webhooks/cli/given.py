"""What people give to options, as values."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import datetime, timedelta
from difflib import get_close_matches
from typing import TypeVar

from logto_webhooks.core.events.base import to_millis
from logto_webhooks.errors import SettingInvalid

Name = TypeVar("Name", bound=str)

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def moment(name: str, given: str | None, now: datetime) -> int | None:
    """Milliseconds since the epoch; None of None. Raises SettingInvalid."""
    if given is None:
        return None
    ago = re.fullmatch(r"(\d{1,6})([mhd])", given)
    try:
        if ago:
            return to_millis(now - timedelta(**{_UNITS[ago[2]]: int(ago[1])}))
        return to_millis(datetime.fromisoformat(given))
    except (ValueError, OverflowError):
        problem = f"{given!r} is neither a time such as 2026-11-24T08:00Z nor 90m, 36h or 7d"
        raise SettingInvalid(name=name, problem=problem) from None


def seconds(name: str, given: str) -> int:
    """How long something takes. Raises SettingInvalid."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", given)
    if not found:
        raise SettingInvalid(name=name, problem=f"{given!r} isn't like 30s, 10m, 2h or 1d")
    return round(timedelta(**{_UNITS[found[2]]: int(found[1])}).total_seconds())


def text(name: str, given: str | None) -> str | None:
    """What can be looked for. Raises SettingInvalid."""
    try:
        (given or "").encode()
    except UnicodeError:
        raise SettingInvalid(name=name, problem="it isn't UTF-8 text") from None
    return given


def subject(given: str | None) -> str | None:
    """A kind and an id. Raises SettingInvalid."""
    if given is not None and not re.fullmatch(r"[a-z-]+:.+", given, re.DOTALL):
        raise SettingInvalid(name="--subject", problem=f"{given!r} isn't like user:ID")
    return text("--subject", given)


def one_of(name: str, given: str, known: Collection[Name]) -> Name:
    """One of some names. Raises SettingInvalid, which names the nearest."""
    for each in known:
        if each == given:
            return each
    near = get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f"the nearest is {near[0]}" if near else f"known are {', '.join(known)}"
    raise SettingInvalid(name=name, problem=f"there is no {given!r}, {hint}")
