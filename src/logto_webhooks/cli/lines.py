"""One line of what came: a delivery as it stands, or what it did."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from rich.text import Text

from logto_webhooks.cli import tables
from logto_webhooks.core.inbox import Kept
from logto_webhooks.core.jobs import JobRow
from logto_webhooks.core.life import Line

_COLOURS: Final = {
    "applied": "green",
    "settled": "green",
    "asks": "yellow",
    "pending": "yellow",
    "stale": "magenta",
    "tombstoned": "magenta",
    "dead": "bold red",
}
_MOST_NAMES: Final = 12
ASKED_LATER: Final = "asked to be retried"
_RETRY_LATER: Final = re.compile(r"logto_webhooks\.errors\.(\w+\.)*RetryLater\b")
# Of a group of exceptions the group itself: those in it stand further to the right.
_GROUP: Final = re.compile(
    r"^  \+ Exception Group Traceback .*?^  \| (\S[^\n]*)", re.DOTALL | re.MULTILINE
)


def show(line: Text) -> None:
    """Print it as one line, however long."""
    tables.out.print(line, soft_wrap=True)


def of_delivery(kept: Kept) -> Text:
    """A delivery: when it came, what became of it, whom it is about, by which call at Logto."""
    outcome = kept.result if kept.state == "done" and kept.result else kept.state.value
    line = _head(kept.id, kept.received_at, outcome, kept.event)
    line.append(f"  {_plain(kept.subject) or '-':<24}  {_plain(kept.call)}".rstrip())
    if kept.origin != "webhook":
        line.append(f"  from the {kept.origin}", "dim")
    if kept.error:
        line.append(f"  {_plain(kept.error)}", "red")
    return line


def of_job(row: JobRow) -> Text:
    """A job: what became of it, whose it is, for what, and what its handler last raised."""
    line = _head(row.id, row.occurred_at, row.state, row.event)
    line.append(f"  {_plain(row.subject):<24}  {_plain(row.handler)}")
    if row.attempts != 1:
        line.append(f"  attempts: {row.attempts}", "dim")
    if row.error:
        told = raised(row.error)
        line.append(f"  {_plain(told)}", "yellow" if told == ASKED_LATER else "red")
    return line


def raised(error: str | None) -> str:
    """What a traceback says was raised, without what a library adds on lines of its own."""
    told = _raised(error)
    return ASKED_LATER if _RETRY_LATER.match(told) else told


def _raised(error: str | None) -> str:
    group = _GROUP.search(error or "")
    if group:
        return group[1]
    _, frame, last = (error or "").rpartition('  File "')
    told = [line for line in last.splitlines()[1 if frame else 0 :] if line.strip()]
    if not frame:
        return told[-1] if told else ""
    return next((line for line in told if not line.startswith(" ")), "")


def of_life(told: Line) -> Text:
    """What a delivery, or an answer of Logto's, did."""
    line = _head(told.id, told.occurred_at, told.outcome, told.event)
    if told.received_at is not None:
        after = (told.received_at - told.occurred_at) / 1000
        line.append(f"  {_origin(told)} {after:+.3f} s", "dim")
    if told.call:
        line.append(f"  {_plain(told.call)}")
    _append(line, "set", told.set)
    _append(line, "late", told.stale, "magenta")
    _append(line, "settled", told.settled, "green")
    _append(line, "in doubt", told.doubtful, "yellow")
    return line


def as_json(kept: Kept, **more: Any) -> str:
    """A delivery without its body, which `more` may bring."""
    made = tables.dated(kept) | {"call": kept.call}
    del made["body"]
    return tables.as_json(made | more)


def _plain(cell: str | None) -> str:
    return tables.plain(cell).replace("\n", "\\n").replace("\t", "\\t")


def _origin(told: Line) -> str:
    return "came" if told.origin == "webhook" else f"from the {told.origin}"


def _head(number: int | None, at: int, outcome: str, event: str) -> Text:
    line = Text(f"{'' if number is None else number:>7}  {tables.shown('_at', at)}  ")
    line.append(f"{outcome:<10}", _COLOURS.get(outcome, ""))
    return line.append(f"  {_plain(event):<31}")


def _append(line: Text, word: str, names: Sequence[str], colour: str = "") -> None:
    if not names:
        return
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    shown = ", ".join(_plain(name) for name in names[:_MOST_NAMES])
    line.append("  ").append(f"{word}: {shown}{more}", colour)
