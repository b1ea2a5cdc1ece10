"""What a check finds, and how bad it is."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final
from urllib.parse import urlsplit

from msgspec import Struct

from logto_webhooks.doctor.faults import HERE, THERE, Fault
from logto_webhooks.plural import Count

FAULTS: Final[dict[str, Fault]] = HERE | THERE
PAGE: Final = "docs/troubleshooting.md"
FINE: Final = "fine"
SKIPPED: Final = "skipped"


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    SKIPPED = "skipped"  # nobody looked
    WARNING = "warning"  # it works, but not for ever, or not for all
    BROKEN = "broken"  # deliveries, or what follows from them, are lost


class Finding(Struct, frozen=True, kw_only=True):
    """What a check found; `do` says how it is mended, `docs` where more is said of it.

    `details` are the numbers and names in the text, for scripts.
    """

    check: str = ""
    code: str
    level: Level
    text: str
    do: str = ""
    docs: str = ""
    details: dict[str, Any] = {}


def make_finding(code: str, **details: Any) -> Finding:
    """A fault of the table, with what is to be told of it."""
    level, text, do = FAULTS[code]
    shown = {name: _shown(value) for name, value in details.items()}
    return Finding(
        code=code,
        level=Level(level),
        text=text.format(**shown),
        do=do.format(**shown),
        docs=f"{PAGE}#{code}",
        details=details,
    )


def fine(text: str) -> Finding:
    """Nothing is wrong."""
    return Finding(code=FINE, level=Level.OK, text=text)


def skipped(text: str) -> Finding:
    """Nobody could look."""
    return Finding(code=SKIPPED, level=Level.SKIPPED, text=text)


def exit_code(findings: Iterable[Finding]) -> int:
    """0, 1 if there are warnings, 2 if something is broken."""
    levels = {each.level for each in findings}
    return 2 if Level.BROKEN in levels else int(Level.WARNING in levels)


def bare(url: str) -> str:
    """An address without what may be secret in it: a password, a query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "an address that is none"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(value)
    return Count(value) if type(value) is int else value


def moment(at: int) -> str:
    """Show milliseconds since the epoch."""
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="seconds")
