"""How commands print: tables, lines, progress and hints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from logto_webhooks import canonical_json
from logto_webhooks.deliveries import StoredDelivery
from logto_webhooks.explain.timeline import TimelineEntry
from logto_webhooks.interfaces import FoundRow, RefetchNeed, Status
from logto_webhooks.jobs import JobRow
from logto_webhooks.reconcile.recover import RecoverResult
from logto_webhooks.reconcile.run import ReconcileResult
from logto_webhooks.reconcile.user import UserComparison
from logto_webhooks.records.drift import Drift
from logto_webhooks.sync.replay import ReplayResult

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


def print_line(line: Text) -> None:
    """Print it as one line, however long."""
    out.print(line, soft_wrap=True)


def format_delivery(kept: StoredDelivery) -> Text:
    """A delivery: when it came, what became of it, whom it is about, by which call at Logto."""
    outcome = kept.result if kept.state == "done" and kept.result else kept.state.value
    line = _head(kept.id, kept.received_at, outcome, kept.event)
    line.append(f"  {_plain(kept.subject) or '-':<24}  {_plain(kept.call)}".rstrip())
    if kept.origin != "webhook":
        line.append(f"  from the {kept.origin}", "dim")
    if kept.error:
        line.append(f"  {_plain(kept.error)}", "red")
    return line


def format_job(row: JobRow) -> Text:
    """A job: what became of it, whose it is, for what, and what its handler last raised."""
    line = _head(row.id, row.occurred_at, row.state, row.event)
    line.append(f"  {_plain(row.subject):<24}  {_plain(row.handler)}")
    if row.attempts != 1:
        line.append(f"  attempts: {row.attempts}", "dim")
    if row.error:
        told = format_error(row.error)
        line.append(f"  {_plain(told)}", "yellow" if told == ASKED_LATER else "red")
    return line


def format_error(error: str | None) -> str:
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


def format_timeline_entry(told: TimelineEntry) -> Text:
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


def delivery_to_json(kept: StoredDelivery, **more: Any) -> str:
    """A delivery without its body, which `more` may bring."""
    made = format_moment(kept) | {"call": kept.call}
    del made["body"]
    return to_json(made | more)


def _plain(cell: str | None) -> str:
    return strip_controls(cell).replace("\n", "\\n").replace("\t", "\\t")


def _origin(told: TimelineEntry) -> str:
    return "came" if told.origin == "webhook" else f"from the {told.origin}"


def _head(number: int | None, at: int, outcome: str, event: str) -> Text:
    line = Text(f"{'' if number is None else number:>7}  {format_value('_at', at)}  ")
    line.append(f"{outcome:<10}", _COLOURS.get(outcome, ""))
    return line.append(f"  {_plain(event):<31}")


def _append(line: Text, word: str, names: Sequence[str], colour: str = "") -> None:
    if not names:
        return
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    shown = ", ".join(_plain(name) for name in names[:_MOST_NAMES])
    line.append("  ").append(f"{word}: {shown}{more}", colour)


out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_wide = Console(width=10_000, highlight=False)  # what is to be copied isn't broken

_COMPACT = {
    "user": ("logto_user_id", "username", "email", "name", "deleted_at"),
    "organization": ("logto_organization_id", "name", "description", "deleted_at"),
}


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    fold: bool = False,
    wide: bool = False,
) -> None:
    """Print rows under a title, long cells cut (folded; or as wide as they are); the title alone
    if there are none."""
    made = Table(show_header=any(columns), header_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold" if fold else "ellipsis", no_wrap=not fold)
    for row in rows:
        made.add_row(*[Text(strip_controls(cell)) for cell in row])
    if title:
        out.print(title, style="bold", markup=False, soft_wrap=True)
    if made.row_count:
        _print_bare(_wide if wide else out, made)


def _print_bare(console: Console, made: Table) -> None:
    """Without the blanks to which the last column is filled."""
    with console.capture() as captured:
        console.print(made)
    print(re.sub(r" +$", "", captured.get(), flags=re.MULTILINE), end="")


def warn(text: str) -> None:
    """Tell a person of what goes on all the same, beside what is printed."""
    err.print(f"warning: {strip_controls(text)}", markup=False, soft_wrap=True)


def show_status(status: Status, waiting: Sequence[RefetchNeed]) -> None:
    """Print counts, and which records wait."""
    rows: list[tuple[str, Any]] = [
        (f"deliveries {state}", count) for state, count in status.deliveries.items()
    ]
    oldest = status.oldest_pending_s
    rows += [
        ("oldest pending", "none" if oldest is None else f"{oldest:.1f} s"),
        (
            "complete up to",
            format_value("complete_up_to", status.complete_up_to) or "never asked Logto",
        ),
        ("recovered from Logto's log", status.recovered),
        ("all compared with Logto", format_value("reconciled_at", status.reconciled_at) or "never"),
        ("silent since", format_value("silent_since_at", status.silent_since) or "not silent"),
        ("records in doubt", status.doubtful),
        ("records to ask Logto about", status.refetch),
    ]
    if status.memberships_to_end:
        rows.append(("memberships still to end", status.memberships_to_end))
    rows += [("deliveries in the spool", status.spooled)] if status.spooled else []
    rows += [(f"jobs {state}", count) for state, count in status.jobs.items()]
    table("", ("", ""), rows)
    if status.unrunnable:
        table(
            "\nJobs that wait for handlers that nobody registered",
            ("handler", "jobs"),
            status.unrunnable.items(),
            fold=True,
        )
    if waiting:
        cells = [(each.key.kind, each.key.id, each.reason) for each in waiting]
        more = f", of {status.refetch} the longest waiting" if status.refetch > len(cells) else ""
        table(f"\nTo ask Logto about{more}", ("kind", "id", "why"), cells, fold=True)


def show_recovered(found: RecoverResult, dry_run: bool) -> None:
    """Print what Logto's log had that the inbox lacked."""
    rows: list[tuple[str, Any]] = [
        ("since", format_value("since", found.since)),
        ("up to", format_value("until", found.until)),
        ("hooks", len(found.hooks)),
        ("entries", found.entries),
        ("would be recovered" if dry_run else "recovered", found.recovered),
    ]
    rows += [(f"  {why}", count) for why, count in sorted(found.causes.items())]
    rows += [("can't know", why) for why in found.doubts]
    table("", ("", ""), rows, fold=True)


def show_reconciled(found: ReconcileResult, dry_run: bool, report: bool) -> None:
    """Print what differed from what Logto lists; as a `report`, since when, and why likely."""
    rows = _counted(found)
    rows += [("differ" if dry_run else "differed, now as in Logto", found.drifted)]
    rows += [(f"  in {name}", count) for name, count in sorted(found.fields.items())]
    rows += [("can't tell", why) for why in found.doubts]
    table("", ("", ""), rows, fold=True)
    if found.drifts:
        more = f", the first {len(found.drifts)}" if found.drifted > len(found.drifts) else ""
        columns = ("kind", "id", "columns", *(("since", "likely because") if report else ()))
        cells = [_drift(each)[: len(columns)] for each in found.drifts]
        table(f"\nWhat differed{more}", columns, cells, fold=True)


def show_replayed(done: ReplayResult, dry_run: bool) -> None:
    """Print what a replay did, or would do."""
    would = "would be " if dry_run else ""
    rows: list[tuple[str, Any]] = [
        (f"deliveries {would}applied again", done.deliveries),
        (f"jobs {would}run again", done.jobs),
    ]
    table("", ("", ""), rows)
    if done.drifts:
        cells = [(each.kind, each.id, ", ".join(each.fields)) for each in done.drifts]
        table("\nWhat differs by it", ("kind", "id", "columns"), cells, fold=True)


def show_filled(found: ReconcileResult) -> None:
    """Print what the first look brought."""
    rows = [*_counted(found), ("written", found.drifted)]
    rows += [("can't tell", why) for why in found.doubts]
    table("", ("", ""), rows, fold=True)


def show_sides(sides: UserComparison) -> None:
    """Print somebody as known here and as Logto answers, what differs in a column of its own."""
    ours, logtos = sides.ours or {}, sides.logto or {}
    cells = [
        (
            name,
            format_value(name, ours.get(name)),
            format_value(name, logtos.get(name)),
            "differs" if name in sides.differ else "",
        )
        for name in ours | logtos
    ]
    here = "here" if sides.ours else "here: unknown, or deleted"
    there = "at Logto" if sides.logto else "at Logto: deleted, or never there"
    table("", ("", here, there, ""), cells, fold=True)


def _counted(found: ReconcileResult) -> list[tuple[str, Any]]:
    resumed = [("goes on from", format_value("began", found.began))] if found.resumed else []
    return [
        *resumed,
        ("users", found.users),
        ("organizations", found.organizations),
        ("members", found.members),
        ("roles", found.roles),
    ]


def _drift(each: Drift) -> tuple[Any, ...]:
    since = format_value("since", each.since)
    fields = ", ".join(each.fields) + (f": {each.role}" if each.role else "")
    return each.kind, each.id, fields, since, each.reason


def show_found(found: Sequence[FoundRow], kind: str) -> None:
    """Print all that is known of one, or a line for each of several."""
    if len(found) > 1:
        columns = _COMPACT[kind]
        cells = [
            [format_value(name, each.row[name]) for name in columns] + [each.waiting_for]
            for each in found
        ]
        table("", (*columns, "waits for"), cells)
        return
    [one] = found
    other = "organizations" if kind == "user" else "members"
    rows = [(name, format_value(name, value)) for name, value in one.row.items()]
    rows += [(other, one.memberships), (f"{other} in doubt", one.memberships_in_doubt)]
    rows += [("roles", one.roles)] if kind == "user" else []
    rows += [("waits for", one.waiting_for or "nothing")]
    table("", ("", ""), rows, fold=True)


def to_json(value: Any) -> str:
    """Encode what was found; its times as ISO 8601. Nothing in it steers a terminal."""
    if isinstance(value, list):
        return "[" + ",".join(to_json(each) for each in value) + "]"
    if isinstance(value, FoundRow):
        value = msgspec.structs.replace(value, row=_dated(value.row))
    elif isinstance(value, UserComparison):
        value = msgspec.structs.replace(value, ours=_dated(value.ours), logto=_dated(value.logto))
    text = msgspec.json.encode(format_moment(value)).decode()
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _dated(row: dict[str, Any] | None) -> Any:
    return row and {name: format_value(name, content) for name, content in row.items()}


def format_moment(value: Any) -> Any:
    """Make JSON of a struct, and of those in it: their times as ISO 8601."""
    if isinstance(value, list):
        return [format_moment(each) for each in value]
    if not isinstance(value, msgspec.Struct):
        return value
    names = value.__struct_fields__
    return {name: format_value(name, format_moment(getattr(value, name))) for name in names}


def format_value(column: str, value: Any) -> Any:
    """Show the milliseconds of a `…_at` column as a date and time in UTC."""
    if not (column.endswith("_at") or column in _MOMENTS) or not isinstance(value, int):
        return value
    moment = datetime.fromtimestamp(value / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def strip_controls(cell: Any) -> str:
    """Show a cell: None as nothing, what isn't text as JSON; nothing that steers a terminal."""
    if cell is None:
        return ""
    text = cell if isinstance(cell, str) else canonical_json.encode(cell).decode()
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# When something was, and not called `…_at`.
_MOMENTS = ("since", "until", "began", "complete_up_to")
_ABOVE = r"\x7f-\x9f\u202a-\u202e\u2066-\u2069"
_STEERING = re.compile(rf"[\x00-\x08\x0b-\x1f{_ABOVE}]")
_IN_JSON = re.compile(f"[{_ABOVE}]")  # which escapes the others itself


_HINTS: Final = {
    401: "the service doesn't know the key with which this was signed. Set "
    "LOGTO_WEBHOOK_SIGNING_KEY to the one it runs with; after a rotation, to the new one.",
    404: "there is no webhook at that path. Set LOGTO_WEBHOOKS_PATH to the one that there is, or "
    "give the whole URL with {option}.",
}


class Hints:
    """Tells each once, beside what is printed; `option` names a URL."""

    def __init__(self, option: str) -> None:
        self._option = option
        self._told: set[int] = set()

    def tell(self, status: int | None) -> None:
        """Say what to do about an answer, if that is known."""
        if status in _HINTS and status not in self._told:
            self._told.add(status)
            hint = _HINTS[status].format(option=self._option)
            err.print(f"{status}: {hint}", markup=False, soft_wrap=True)
