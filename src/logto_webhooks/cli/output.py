"""How commands print: tables, lines, notes and hints."""

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
from logto_webhooks.apply.replay import ReplayResult
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.deliveries import Status, StoredDelivery
from logto_webhooks.explain.timeline import TimelineEntry
from logto_webhooks.jobs import JobRow
from logto_webhooks.reconcile.fetch import UserComparison
from logto_webhooks.reconcile.reconcile import ReconcileResult
from logto_webhooks.reconcile.recover import RecoverResult
from logto_webhooks.records.drift import Drift

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
# The group itself, not the exceptions in it, which are indented further.
_GROUP: Final = re.compile(
    r"^  \+ Exception Group Traceback .*?^  \| (\S[^\n]*)", re.DOTALL | re.MULTILINE
)


def print_line(line: Text) -> None:
    """Print it as one line, however long."""
    out.print(line, soft_wrap=True)


def say(text: str) -> None:
    """Print a result."""
    out.print(strip_controls(text), markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Print to stderr what isn't a result."""
    err.print(strip_controls(text), markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    note(f"warning: {text}")


def format_delivery(delivery: StoredDelivery) -> Text:
    """Format a delivery: when it was received, its outcome, its record, and the call at Logto."""
    is_done = delivery.state == "done"
    outcome = delivery.result if is_done and delivery.result else delivery.state.value
    line = _start_line(delivery.id, delivery.received_at, outcome, delivery.event)
    line.append(f"  {_plain(delivery.subject) or '-':<24}  {_plain(delivery.call)}".rstrip())
    if delivery.origin != "webhook":
        line.append(f"  from the {delivery.origin}", "dim")
    if delivery.error:
        line.append(f"  {_plain(delivery.error)}", "red")
    return line


def format_job(job: JobRow) -> Text:
    """Format a job: its state, record and handler, and what the handler last raised."""
    line = _start_line(job.id, job.occurred_at, job.state, job.event)
    line.append(f"  {_plain(job.subject):<24}  {_plain(job.handler)}")
    if job.attempts != 1:
        line.append(f"  attempts: {job.attempts}", "dim")
    if job.error:
        error = format_error(job.error)
        line.append(f"  {_plain(error)}", "yellow" if error == ASKED_LATER else "red")
    return line


def format_error(error: str | None) -> str:
    """Return the line of a traceback that says what was raised, without a library's own notes."""
    line = _raised_line(error)
    return ASKED_LATER if _RETRY_LATER.match(line) else line


def _raised_line(error: str | None) -> str:
    group = _GROUP.search(error or "")
    if group:
        return group[1]
    _, frame, last = (error or "").rpartition('  File "')
    lines = [line for line in last.splitlines()[1 if frame else 0 :] if line.strip()]
    if not frame:
        return lines[-1] if lines else ""
    return next((line for line in lines if not line.startswith(" ")), "")


def format_timeline_entry(entry: TimelineEntry) -> Text:
    """Format what a delivery, or an API response, did."""
    line = _start_line(entry.id, entry.occurred_at, entry.outcome, entry.event)
    if entry.received_at is not None:
        delay_s = (entry.received_at - entry.occurred_at) / 1000
        origin = "received" if entry.origin == "webhook" else f"from the {entry.origin}"
        line.append(f"  {origin} {delay_s:+.3f} s", "dim")
    if entry.call:
        line.append(f"  {_plain(entry.call)}")
    _append_names(line, "set", entry.set)
    _append_names(line, "late", entry.stale, "magenta")
    _append_names(line, "settled", entry.settled, "green")
    _append_names(line, "in doubt", entry.doubtful, "yellow")
    return line


def delivery_to_json(delivery: StoredDelivery, **more: Any) -> str:
    """Encode a delivery without its body; `more` may add that."""
    fields = format_moment(delivery) | {"call": delivery.call}
    del fields["body"]
    return to_json(fields | more)


def _plain(cell: str | None) -> str:
    return strip_controls(cell).replace("\n", "\\n").replace("\t", "\\t")


def _start_line(number: int | None, at: int, outcome: str, event: str) -> Text:
    line = Text(f"{'' if number is None else number:>7}  {format_value('_at', at)}  ")
    line.append(f"{outcome:<10}", _COLOURS.get(outcome, ""))
    return line.append(f"  {_plain(event):<31}")


def _append_names(line: Text, word: str, names: Sequence[str], colour: str = "") -> None:
    if not names:
        return
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    shown = ", ".join(_plain(name) for name in names[:_MOST_NAMES])
    line.append("  ").append(f"{word}: {shown}{more}", colour)


out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_wide = Console(width=10_000, highlight=False)  # so that nothing you may copy is wrapped

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
    """Print rows under a title; only the title if there are none.

    Long cells are cut, unless they `fold`, or the table is as `wide` as they are.
    """
    grid = Table(show_header=any(columns), header_style="bold", box=None, pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold" if fold else "ellipsis", no_wrap=not fold)
    for row in rows:
        grid.add_row(*[Text(strip_controls(cell)) for cell in row])
    if title:
        out.print(title, style="bold", markup=False, soft_wrap=True)
    if grid.row_count:
        _print_bare(_wide if wide else out, grid)


def _print_bare(console: Console, grid: Table) -> None:
    """Print without the padding of the last column."""
    with console.capture() as captured:
        console.print(grid)
    print(re.sub(r" +$", "", captured.get(), flags=re.MULTILINE), end="")


def show_status(status: Status, waiting: Sequence[RefetchNeed]) -> None:
    """Print counts, and the records that wait."""
    rows: list[tuple[str, Any]] = [
        (f"deliveries {state}", count) for state, count in status.deliveries.items()
    ]
    oldest = status.oldest_pending_s
    complete_up_to = format_value("complete_up_to", status.complete_up_to)
    rows += [
        ("oldest pending", "none" if oldest is None else f"{oldest:.1f} s"),
        ("complete up to", complete_up_to or "Logto's log was never read"),
        ("recovered from Logto's log", status.recovered),
        (
            "last compared with Logto",
            format_value("reconciled_at", status.reconciled_at) or "never",
        ),
        ("silent since", format_value("silent_since_at", status.silent_since) or "not silent"),
        ("records in doubt", status.doubtful),
        ("records to refetch", status.refetch),
    ]
    if status.memberships_to_end:
        rows.append(("memberships still to end", status.memberships_to_end))
    rows += [("deliveries in the spool", status.spooled)] if status.spooled else []
    rows += [(f"jobs {state}", count) for state, count in status.jobs.items()]
    table("", ("", ""), rows)
    if status.unrunnable:
        table(
            "\nJobs of handlers that no process has registered",
            ("handler", "jobs"),
            status.unrunnable.items(),
            fold=True,
        )
    if waiting:
        cells = [(need.key.kind, need.key.id, need.reason) for need in waiting]
        more = f", the oldest of {status.refetch}" if status.refetch > len(cells) else ""
        table(f"\nTo refetch from Logto{more}", ("kind", "id", "reason"), cells, fold=True)


def show_recovered(result: RecoverResult, dry_run: bool) -> None:
    """Print what was missing in the inbox, by Logto's log."""
    rows: list[tuple[str, Any]] = [
        ("since", format_value("since", result.since)),
        ("up to", format_value("until", result.until)),
        ("webhooks", len(result.hooks)),
        ("log entries", result.entries),
        ("would be recovered" if dry_run else "recovered", result.recovered),
    ]
    rows += [(f"  {cause}", count) for cause, count in sorted(result.causes.items())]
    rows += [("unknown", doubt) for doubt in result.doubts]
    table("", ("", ""), rows, fold=True)


def show_reconciled(result: ReconcileResult, dry_run: bool, report: bool) -> None:
    """Print differences from Logto; as a `report`, since when they exist, and the likely reason."""
    rows = _count_rows(result)
    rows += [("different" if dry_run else "corrected", result.drifted)]
    rows += [(f"  in {name}", count) for name, count in sorted(result.fields.items())]
    rows += [("unknown", doubt) for doubt in result.doubts]
    table("", ("", ""), rows, fold=True)
    if result.drifts:
        more = f", the first {len(result.drifts)}" if result.drifted > len(result.drifts) else ""
        columns = ("kind", "id", "columns", *(("since", "likely reason") if report else ()))
        cells = [_drift_cells(drift)[: len(columns)] for drift in result.drifts]
        table(f"\nDifferences{more}", columns, cells, fold=True)


def show_replayed(result: ReplayResult, dry_run: bool) -> None:
    """Print what a replay did, or would do."""
    would_be = "would be " if dry_run else ""
    rows: list[tuple[str, Any]] = [
        (f"deliveries {would_be}applied again", result.deliveries),
        (f"jobs {would_be}run again", result.jobs),
    ]
    table("", ("", ""), rows)
    if result.drifts:
        cells = [(drift.kind, drift.id, ", ".join(drift.fields)) for drift in result.drifts]
        table("\nChanges", ("kind", "id", "columns"), cells, fold=True)


def show_backfilled(result: ReconcileResult) -> None:
    """Print what a backfill wrote."""
    rows = [*_count_rows(result), ("written", result.drifted)]
    rows += [("unknown", doubt) for doubt in result.doubts]
    table("", ("", ""), rows, fold=True)


def show_comparison(comparison: UserComparison) -> None:
    """Print a user as stored here and as Logto returns it, and mark the differences."""
    ours, logtos = comparison.ours or {}, comparison.logto or {}
    cells = [
        (
            name,
            format_value(name, ours.get(name)),
            format_value(name, logtos.get(name)),
            "differs" if name in comparison.differ else "",
        )
        for name in ours | logtos
    ]
    here = "here" if comparison.ours else "here: unknown, or deleted"
    at_logto = "at Logto" if comparison.logto else "at Logto: deleted, or never existed"
    table("", ("", here, at_logto, ""), cells, fold=True)


def _count_rows(result: ReconcileResult) -> list[tuple[str, Any]]:
    resumed = [("resumed from", format_value("began", result.began))] if result.resumed else []
    return [
        *resumed,
        ("users", result.users),
        ("organizations", result.organizations),
        ("members", result.members),
        ("roles", result.roles),
    ]


def _drift_cells(drift: Drift) -> tuple[Any, ...]:
    since = format_value("since", drift.since)
    fields = ", ".join(drift.fields) + (f": {drift.role}" if drift.role else "")
    return drift.kind, drift.id, fields, since, drift.reason


def show_rows(rows: Sequence[FoundRow], kind: str) -> None:
    """Print all about one record, or a line for each of several."""
    if len(rows) > 1:
        columns = _COMPACT[kind]
        lines = [
            [format_value(name, found.row[name]) for name in columns] + [found.waiting_for]
            for found in rows
        ]
        table("", (*columns, "waits for"), lines)
        return
    [found] = rows
    others = "organizations" if kind == "user" else "members"
    cells = [(name, format_value(name, value)) for name, value in found.row.items()]
    cells += [(others, found.memberships), (f"{others} in doubt", found.memberships_in_doubt)]
    cells += [("roles", found.roles)] if kind == "user" else []
    cells += [("waits for", found.waiting_for or "nothing")]
    table("", ("", ""), cells, fold=True)


def to_json(value: Any) -> str:
    """Encode a result: times as ISO 8601, and without characters that control a terminal."""
    if isinstance(value, list):
        return "[" + ",".join(to_json(item) for item in value) + "]"
    if isinstance(value, FoundRow):
        value = msgspec.structs.replace(value, row=_format_row(value.row))
    elif isinstance(value, UserComparison):
        ours, logtos = _format_row(value.ours), _format_row(value.logto)
        value = msgspec.structs.replace(value, ours=ours, logto=logtos)
    text = msgspec.json.encode(format_moment(value)).decode()
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _format_row(row: dict[str, Any] | None) -> Any:
    return row and {name: format_value(name, content) for name, content in row.items()}


def format_moment(value: Any) -> Any:
    """Make a dict of a struct, and of those in it, with times as ISO 8601."""
    if isinstance(value, list):
        return [format_moment(item) for item in value]
    if not isinstance(value, msgspec.Struct):
        return value
    names = value.__struct_fields__
    return {name: format_value(name, format_moment(getattr(value, name))) for name in names}


def format_value(column: str, value: Any) -> Any:
    """Format the milliseconds of a `…_at` column as a date and time in UTC."""
    if not (column.endswith("_at") or column in _MOMENTS) or not isinstance(value, int):
        return value
    moment = datetime.fromtimestamp(value / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def strip_controls(cell: Any) -> str:
    """Format a cell: None is empty, other objects are JSON, control characters are escaped."""
    if cell is None:
        return ""
    text = cell if isinstance(cell, str) else canonical_json.encode(cell).decode()
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


_MOMENTS = ("since", "until", "began", "complete_up_to")  # times that aren't called `…_at`
_ABOVE = r"\x7f-\x9f\u202a-\u202e\u2066-\u2069"
_CONTROLS = re.compile(rf"[\x00-\x08\x0b-\x1f{_ABOVE}]")
_IN_JSON = re.compile(f"[{_ABOVE}]")  # JSON escapes the others


_HINTS: Final = {
    401: "the service doesn't accept this signing key. Set LOGTO_WEBHOOK_SIGNING_KEY to the key "
    "that the service uses. After a rotation, that is the new one.",
    404: "no webhook answers at this path. Set LOGTO_WEBHOOKS_PATH to the service's path, or give "
    "the whole URL with {option}.",
}


class Hints:
    """Prints what to do about a status, each once; `option` is the one that takes a URL."""

    def __init__(self, option: str) -> None:
        self._option = option
        self._shown: set[int] = set()

    def show(self, status: int | None) -> None:
        """Print the hint for a status, if there is one."""
        if status in _HINTS and status not in self._shown:
            self._shown.add(status)
            note(f"{status}: {_HINTS[status].format(option=self._option)}")
