"""What people give to options, as values."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from logto_webhooks.cli import output
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.events.base import to_millis
from logto_webhooks.events.local import LOCAL
from logto_webhooks.events.registry import BY_NAME
from logto_webhooks.logto.webhooks import is_url
from logto_webhooks.validation import check_text, nearest

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_moment(name: str, given: str | None, now: datetime) -> int | None:
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


def parse_duration(name: str, given: str) -> int:
    """How long something takes. Raises SettingInvalid."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", given)
    if not found:
        raise SettingInvalid(name=name, problem=f"{given!r} isn't like 30s, 10m, 2h or 1d")
    return round(timedelta(**{_UNITS[found[2]]: int(found[1])}).total_seconds())


def check_printable(name: str, given: str | None) -> str | None:
    """What can be looked for. Raises SettingInvalid."""
    return None if given is None else check_text(name, given)


def parse_subject(given: str | None) -> str | None:
    """A kind and an id. Raises SettingInvalid."""
    if given is not None and not re.fullmatch(r"[a-z-]+:.+", given, re.DOTALL):
        raise SettingInvalid(name="--subject", problem=f"{given!r} isn't like user:ID")
    return check_printable("--subject", given)


def check_url(name: str, given: str) -> str:
    """Where something can be posted to. Raises SettingInvalid."""
    if not is_url(given):
        problem = f"{given!r} isn't like http://127.0.0.1:8787/path"
        raise SettingInvalid(name=name, problem=problem)
    return given


def warn_about(event: str | None) -> None:
    """Say so of a name that no event has, as far as this release knows."""
    known = [*BY_NAME, *LOCAL]
    if event is not None and event not in known:
        output.warn(f"no event {event!r} is known to this release; {nearest(event, known)}.")
