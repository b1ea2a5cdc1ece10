"""How commands print: results as text or JSON, lists, notes, hints and progress."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import msgspec
from typer import Exit

from logto_webhooks import canonical_json
from logto_webhooks.errors import ASKED_LATER

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from logto_webhooks.apply.replay import ReplayResult
    from logto_webhooks.database.records import FoundRow, RefetchNeed
    from logto_webhooks.deliveries import MappingStatus, Status, StoredDelivery
    from logto_webhooks.explain.timeline import TimelineEntry
    from logto_webhooks.handlers.existing import ExistingRows
    from logto_webhooks.jobs import JobRow
    from logto_webhooks.reconcile.fetch import UserComparison
    from logto_webhooks.reconcile.reconcile import ReconcileResult
    from logto_webhooks.reconcile.recover import RecoverResult
    from logto_webhooks.records.drift import Drift

T = TypeVar("T")
STOPPED: Final = 130
UNCHANGED: Final = "Nothing was changed."
_WIDE: Final = 1_000_000  # nothing is cut or wrapped at this width

# The columns of each list.
COLUMNS: Final = {
    "user": ("logto_user_id", "username", "email", "name", "deleted_at", "waits for"),
    "organization": ("logto_organization_id", "name", "description", "deleted_at", "waits for"),
    "webhook": ("id", "name", "enabled", "ours", "url", "events"),
    "handler": ("handler", "events", "waiting", "done", "dead", "discarded"),
    "mapping": ("mapping", "applied", "ok", "excluded", "waiting", "conflict", "owed", "held"),
    "mapping status": ("mapping", "applied", "excluded", "waiting", "conflict", "owed", "held"),
    "applied": (
        "mapping",
        "records",
        "excluded",
        "linked",
        "created",
        "changed",
        "deleted",
        "held",
        "ambiguous",
        "waiting",
        "refused",
    ),
    "mapping difference": ("mapping", "problem", "logto_id", "what"),
    "job group": ("handler", "state", "error", "jobs"),
    "unrunnable": ("handler", "jobs"),
    "logto_users": ("logto_user_id", "username", "email", "name", "is_suspended"),
    "logto_organizations": ("logto_organization_id", "name", "description", "custom_data"),
    "logto_organization_members": ("logto_organization_id", "logto_user_id"),
    "refetch": ("kind", "id", "reason"),
    "difference": ("kind", "id", "columns"),
    "reported difference": ("kind", "id", "columns", "since", "likely reason"),
}
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


def make_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Make a console, which prints in colours and knows the width of the terminal."""
    # Imported here, like `rich` below, because `status` starts faster without it.
    from rich.console import Console

    return Console(stderr=stderr, width=width, highlight=False)


def say(text: str) -> None:
    """Print a result."""
    print(strip_controls(text), flush=True)


def say_title(text: str) -> None:
    """Print a title in bold."""
    from rich.text import Text

    print_line(Text(strip_controls(text), "bold"))


def print_line(line: Text) -> None:
    """Print a text as one line of any length."""
    make_console().print(line, soft_wrap=True)


def note(text: str) -> None:
    """Print a message that isn't a result to stderr."""
    print(strip_controls(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    note(f"warning: {text}")


def fail(text: str) -> NoReturn:
    """Print why there is no result and exit with code 1."""
    note(text)
    raise Exit(1)


def note_more(rows: Sequence[StoredDelivery] | Sequence[JobRow], limit: int) -> None:
    """Print how to continue a list, if there are more rows than its limit."""
    if len(rows) > limit:
        note(f"There are more: continue with --after {rows[limit - 1].id}.")


def show(result: T, as_json: bool, print_text: Callable[[T], object]) -> None:
    """Print a result as JSON, or with `print_text`."""
    if as_json:
        print(to_json(result))
    else:
        print_text(result)


def print_list(
    kind: str,
    rows: Iterable[Mapping[str, Any]],
    title: str = "",
    *,
    fold: bool = False,
    wide: bool = False,
) -> None:
    """Print a line for each row, with the columns of a kind of list."""
    columns = COLUMNS[kind]
    cells = [[format_value(name, row[name]) for name in columns] for row in rows]
    print_table(title, columns, cells, fold=fold, wide=wide)


def print_pairs(pairs: Iterable[tuple[str, Any]]) -> None:
    """Print a line for each name and value, or several lines if it is long."""
    print_table("", ("", ""), pairs, fold=True)


def print_counts(counts: Mapping[str, Any]) -> None:
    """Print a line for each name and value."""
    width = max(map(len, counts))
    for name, value in counts.items():
        say(f"{name:<{width}}  {value}")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    fold: bool = False,
    wide: bool = False,
) -> None:
    """Print rows under a title, or only the title if there are none.

    In a terminal, long cells are cut, unless they `fold` or the table may be `wide`.
    """
    from rich.table import Table
    from rich.text import Text

    grid = Table(show_header=any(columns), header_style="bold", box=None, pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold" if fold else "ellipsis", no_wrap=not fold)
    for row in rows:
        grid.add_row(*[Text(strip_controls(cell)) for cell in row])
    if title:
        say_title(title)
    if not grid.row_count:
        return
    console = make_console()
    is_limited = console.is_terminal or "COLUMNS" in os.environ  # otherwise, a pipe or a file
    if wide or not is_limited:
        console = make_console(width=_WIDE)
    with console.capture() as captured:
        console.print(grid)
    for line in captured.get().removesuffix("\n").split("\n"):
        print(line.rstrip(" "))  # without the padding of the last column


def format_delivery(delivery: StoredDelivery) -> Text:
    """Format a delivery: the time of receipt, the outcome, the record, and the call to Logto."""
    is_done = delivery.state == "done"
    outcome = delivery.result if is_done and delivery.result else delivery.state.value
    line = _start_line(delivery.id, delivery.received_at, outcome, delivery.event)
    line.append(f"  {_escape(delivery.subject) or '-':<24}  {_escape(delivery.call)}".rstrip())
    if delivery.origin != "webhook":
        line.append(f"  from the {delivery.origin}", "dim")
    if delivery.error:
        line.append(f"  {_escape(delivery.error)}", "red")
    return line


def format_job(job: JobRow) -> Text:
    """Format a job: its state, record and handler, and the handler's last error."""
    line = _start_line(job.id, job.occurred_at, job.state, job.event)
    line.append(f"  {_escape(job.subject):<24}  {_escape(job.handler)}")
    if job.attempts != 1:
        line.append(f"  attempts: {job.attempts}", "dim")
    if job.error:
        colour = "yellow" if asks_for_retry(job.error) else "red"
        line.append(f"  {_escape(format_error(job.error))}", colour)
    return line


def format_timeline_entry(entry: TimelineEntry) -> Text:
    """Format what a delivery or an API response did."""
    line = _start_line(entry.id, entry.occurred_at, entry.outcome, entry.event)
    if entry.received_at is not None:
        delay_s = (entry.received_at - entry.occurred_at) / 1000
        origin = "received" if entry.origin == "webhook" else f"from the {entry.origin}"
        line.append(f"  {origin} {delay_s:+.3f} s", "dim")
    if entry.call:
        line.append(f"  {_escape(entry.call)}")
    for title, names, colour in (
        ("set", entry.set, ""),
        ("late", entry.stale, "magenta"),
        ("settled", entry.settled, "green"),
        ("in doubt", entry.doubtful, "yellow"),
    ):
        if names:
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            shown = ", ".join(_escape(name) for name in names[:_MOST_NAMES])
            line.append("  ").append(f"{title}: {shown}{more}", colour)
    return line


def _start_line(number: int | None, at: int, outcome: str, event: str) -> Text:
    from rich.text import Text

    line = Text(f"{'' if number is None else number:>7}  {format_time(at)}  ")
    line.append(f"{outcome:<10}", _COLOURS.get(outcome, ""))
    return line.append(f"  {_escape(event):<31}")


def _escape(cell: str | None) -> str:
    return strip_controls(cell).replace("\n", "\\n").replace("\t", "\\t")


# Its time is left out, so that jobs with the same reason are counted together.
_RETRY_LATER: Final = re.compile(
    rf"logto_webhooks\.errors\.RetryLater: {ASKED_LATER}(?: in \S+ s)?(: .*)?$"
)
# Matches the group itself, not the exceptions in it, which are indented further.
_GROUP: Final = re.compile(
    r"^  \+ Exception Group Traceback .*?^  \| (\S[^\n]*)", re.DOTALL | re.MULTILINE
)


def format_error(error: str | None) -> str:
    """Return the line of a traceback with the exception, without notes that libraries add."""
    line = _find_raised(error or "")
    asked = _RETRY_LATER.match(line)
    return f"{ASKED_LATER}{asked[1] or ''}" if asked else line


def asks_for_retry(error: str) -> bool:
    """Return whether a handler asked for a retry, according to the traceback."""
    return _RETRY_LATER.match(_find_raised(error)) is not None


def _find_raised(error: str) -> str:
    if group := _GROUP.search(error):
        return group[1]
    _, frame, last = error.rpartition('  File "')
    lines = [line for line in last.splitlines()[1 if frame else 0 :] if line.strip()]
    if not frame:
        return lines[-1] if lines else ""
    return next((line for line in lines if not line.startswith(" ")), "")


def show_status(status: Status, waiting: Sequence[RefetchNeed]) -> None:
    """Print counts, and the records that wait for a refetch."""
    oldest = status.oldest_pending_s
    counts = {f"deliveries {state}": count for state, count in status.deliveries.items()} | {
        "oldest pending": "none" if oldest is None else f"{oldest:.1f} s",
        "complete up to": format_time(status.complete_up_to) or "Logto's log was never read",
        "recovered from Logto's log": status.recovered,
        "last compared with Logto": format_time(status.reconciled_at) or "never",
        "silent since": format_time(status.silent_since) or "not silent",
        "records in doubt": status.doubtful,
        "records to refetch": status.refetch,
        "memberships still to end": status.memberships_to_end or None,
        "deliveries in the spool": status.spooled or None,
    }
    counts |= {f"jobs {state}": count for state, count in status.jobs.items()}
    print_counts({name: count for name, count in counts.items() if count is not None})
    if status.mappings:
        rows = [describe_mapping(mapping) for mapping in status.mappings]
        print_list(
            "mapping status",
            rows,
            "\nYour mapped tables, and records that are excluded or have no correct row",
        )
    if status.unrunnable:
        rows = [{"handler": name, "jobs": count} for name, count in status.unrunnable.items()]
        print_list("unrunnable", rows, "\nJobs of unregistered handlers", fold=True)
    if waiting:
        rows = [need.key._asdict() | {"reason": need.reason} for need in waiting]
        more = f", the oldest of {status.refetch}" if status.refetch > len(rows) else ""
        print_list("refetch", rows, f"\nTo refetch from Logto{more}", fold=True)


def describe_mapping(mapping: MappingStatus) -> dict[str, Any]:
    """Return a mapping's counts, and whether it was applied to all records."""
    return msgspec.structs.asdict(mapping) | {"applied": "yes" if mapping.is_applied else "in part"}


def show_recovered(result: RecoverResult, dry_run: bool) -> None:
    """Print which deliveries in Logto's log were missing from the inbox."""
    print_pairs(
        [
            ("since", format_time(result.since)),
            ("up to", format_time(result.until)),
            ("webhooks", len(result.webhooks)),
            ("log entries", result.entries),
            ("would be recovered" if dry_run else "recovered", result.recovered),
            *((f"  {cause}", count) for cause, count in sorted(result.causes.items())),
            *(("unknown", doubt) for doubt in result.doubts),
        ]
    )


def show_reconciled(result: ReconcileResult, dry_run: bool, report: bool) -> None:
    """Print differences from Logto; in a `report`, also since when, and the likely reason."""
    fields = [(f"  in {name}", count) for name, count in sorted(result.fields.items())]
    _show_counts(result, ("different" if dry_run else "corrected", result.drifted), *fields)
    if result.drifts:
        more = f", the first {len(result.drifts)}" if result.drifted > len(result.drifts) else ""
        kind = "reported difference" if report else "difference"
        print_list(kind, map(_make_drift_row, result.drifts), f"\nDifferences{more}", fold=True)


def show_backfilled(result: ReconcileResult) -> None:
    """Print what a backfill wrote, and how much of that are deletions."""
    deleted = [("deleted", count)] if (count := result.fields.get("deleted")) else []
    _show_counts(result, ("written", result.drifted), *deleted)


def _show_counts(result: ReconcileResult, *more: tuple[str, Any]) -> None:
    resumed = [("resumed from", format_time(result.began))] if result.resumed else []
    kinds = ("users", "organizations", "members", "roles")
    counts = [(kind, getattr(result, kind)) for kind in kinds]
    refused = [("not compared", result.not_compared)] if result.not_compared else []
    unknown = [("unknown", doubt) for doubt in result.doubts]
    print_pairs([*resumed, *counts, *more, *refused, *unknown])


def show_existing(results: Sequence[ExistingRows], dry_run: bool) -> None:
    """Print for how many rows a handler runs, or would run, and how many were skipped."""
    names = ("event", "rows", "would run" if dry_run else "jobs", "skipped")
    rows = [[str(value) for value in msgspec.structs.astuple(result)] for result in results]
    print_table("", names, rows)


def show_replayed(result: ReplayResult, dry_run: bool) -> None:
    """Print what a replay did, or would do."""
    would_be = "would be " if dry_run else ""
    applied, jobs = f"deliveries {would_be}applied again", f"jobs {would_be}run again"
    print_counts({applied: result.deliveries, jobs: result.jobs})
    if result.drifts:
        print_list("difference", map(_make_drift_row, result.drifts), "\nChanges", fold=True)


def _make_drift_row(drift: Drift) -> dict[str, Any]:
    role = f": {drift.role}" if drift.role else ""
    return {
        "kind": drift.kind,
        "id": drift.id,
        "columns": ", ".join(drift.fields) + role,
        "since": drift.since,
        "likely reason": drift.reason,
    }


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
    in_logto = "in Logto" if comparison.logto else "in Logto: deleted, or never existed"
    print_table("", ("", here, in_logto, ""), cells, fold=True)


def show_records(records: Sequence[FoundRow], kind: str) -> None:
    """Print one record with all its fields, or a line for each of several."""
    if len(records) > 1:
        print_list(kind, [record.row | {"waits for": record.waiting_for} for record in records])
        return
    [record] = records
    others = "organizations" if kind == "user" else "members"
    pairs = [(name, format_value(name, value)) for name, value in record.row.items()]
    pairs += [(others, record.memberships), (f"{others} in doubt", record.memberships_in_doubt)]
    pairs += [("roles", record.roles)] if kind == "user" else []
    pairs += [("waits for", record.waiting_for or "nothing")]
    pairs += [("own row", own_row) for own_row in record.own_rows]
    print_pairs(pairs)


def to_json(value: Any) -> str:
    """Encode a result, with times as ISO 8601, and terminal control characters escaped."""
    text = msgspec.json.encode(to_builtins(value)).decode()
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def to_builtins(value: Any) -> Any:
    """Convert a struct, and structs in it, to a dict with times as ISO 8601."""
    if isinstance(value, list):
        return [to_builtins(item) for item in value]
    if not isinstance(value, msgspec.Struct):
        return value
    fields = {name: to_builtins(getattr(value, name)) for name in value.__struct_fields__}
    for name in _ROWS & fields.keys():
        row = fields[name] or {}
        fields[name] = {column: format_value(column, cell) for column, cell in row.items()} or None
    return {name: format_value(name, content) for name, content in fields.items()}


def delivery_to_builtins(delivery: StoredDelivery) -> dict[str, Any]:
    """Convert a delivery to a dict, without its body."""
    fields: dict[str, Any] = to_builtins(delivery)
    del fields["body"]
    return fields | {"call": delivery.call}


def format_value(column: str, value: Any) -> Any:
    """Format milliseconds of a `…_at` column as a date and time in UTC; return others as is."""
    is_time = (column.endswith("_at") or column in _TIMES) and isinstance(value, int)
    return format_time(value) if is_time else value


def format_time(at: int | None) -> str:
    """Format Unix milliseconds as a date and time in UTC; None becomes empty."""
    if at is None:
        return ""
    moment = datetime.fromtimestamp(at / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def strip_controls(cell: Any) -> str:
    """Format a cell: None is empty, other objects are JSON. Control characters are escaped."""
    if cell is None:
        return ""
    text = cell if isinstance(cell, str) else canonical_json.encode(cell).decode()
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


_TIMES: Final = ("since", "until", "began", "complete_up_to")  # times not named `…_at`
_ROWS: Final = {"row", "ours", "logto"}  # fields with a row of a table
_ABOVE: Final = r"\x7f-\x9f\u202a-\u202e\u2066-\u2069"
_CONTROLS: Final = re.compile(rf"[\x00-\x08\x0b-\x1f{_ABOVE}]")
_IN_JSON: Final = re.compile(f"[{_ABOVE}]")  # JSON escapes the others
_HINTS: Final = {
    401: "the service doesn't accept this signing key. Set LOGTO_WEBHOOK_SIGNING_KEY to the key "
    "that the service uses. After a rotation, use the new key.",
    404: "no webhook answers at this path. Set LOGTO_WEBHOOKS_PATH to the service's path, or pass "
    "the whole URL with {option}.",
}


def show_hint(status: int | None, option: str) -> None:
    """Print the hint for a status, if there is one. `option` is the option for the URL."""
    if status in _HINTS:
        note(f"{status}: {_HINTS[status].format(option=option)}")


class Bar:
    """Shows progress in stages, each from 0 to 100%."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=1.0, rate="")
        self._stage = ""
        self._began = (time.monotonic(), 0)

    def update(self, stage: str, count: int, done: float) -> None:
        """Show that `count` items of a stage are done. `done` is the share, from 0 to 1."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began = stage, (now, count)
            self._progress.reset(self._task, rate="")
        began, first = self._began
        self._progress.update(
            self._task,
            completed=done,
            description=f"{stage}: {count:,}",
            rate=f"{(count - first) / (now - began):,.0f}/s" if count > first else "",
        )


@contextmanager
def show_progress(first: str, *, silent: bool = False) -> Iterator[Bar]:
    """Show a bar on stderr during the block, unless it isn't a terminal, or `silent`."""
    # Imported here, because most commands show no bar.
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    console = make_console(stderr=True)
    hidden = silent or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = Bar(progress)
        bar.update(first, 0, 0.0)
        yield bar


@contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """On Ctrl-C in the block, print advice and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        stop(advice)


def stop(advice: str) -> NoReturn:
    """Print that the command was stopped, and advice; exit with code 130."""
    note(f"Stopped. {advice}")
    raise Exit(STOPPED)
