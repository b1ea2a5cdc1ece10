"""What commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from logto_webhooks.core import canonical
from logto_webhooks.core.drift import Drift
from logto_webhooks.core.ports import Found, Status, Waiting
from logto_webhooks.service.look import Reconciled
from logto_webhooks.service.person import Sides
from logto_webhooks.service.recover import Recovered
from logto_webhooks.service.replay import Replayed

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
        made.add_row(*[Text(plain(cell)) for cell in row])
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
    err.print(f"warning: {plain(text)}", markup=False, soft_wrap=True)


def show_status(status: Status, waiting: Sequence[Waiting]) -> None:
    """Print counts, and which records wait."""
    rows: list[tuple[str, Any]] = [
        (f"deliveries {state}", count) for state, count in status.deliveries.items()
    ]
    oldest = status.oldest_pending_s
    rows += [
        ("oldest pending", "none" if oldest is None else f"{oldest:.1f} s"),
        ("complete up to", shown("complete_up_to", status.complete_up_to) or "never asked Logto"),
        ("recovered from Logto's log", status.recovered),
        ("all compared with Logto", shown("reconciled_at", status.reconciled_at) or "never"),
        ("silent since", shown("silent_since_at", status.silent_since) or "not silent"),
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


def show_recovered(found: Recovered, dry_run: bool) -> None:
    """Print what Logto's log had that the inbox lacked."""
    rows: list[tuple[str, Any]] = [
        ("since", shown("since", found.since)),
        ("up to", shown("until", found.until)),
        ("hooks", len(found.hooks)),
        ("entries", found.entries),
        ("would be recovered" if dry_run else "recovered", found.recovered),
    ]
    rows += [(f"  {why}", count) for why, count in sorted(found.causes.items())]
    rows += [("can't know", why) for why in found.doubts]
    table("", ("", ""), rows, fold=True)


def show_reconciled(found: Reconciled, dry_run: bool, report: bool) -> None:
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


def show_replayed(done: Replayed, dry_run: bool) -> None:
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


def show_filled(found: Reconciled) -> None:
    """Print what the first look brought."""
    rows = [*_counted(found), ("written", found.drifted)]
    rows += [("can't tell", why) for why in found.doubts]
    table("", ("", ""), rows, fold=True)


def show_sides(sides: Sides) -> None:
    """Print somebody as known here and as Logto answers, what differs in a column of its own."""
    ours, logtos = sides.ours or {}, sides.logto or {}
    cells = [
        (
            name,
            shown(name, ours.get(name)),
            shown(name, logtos.get(name)),
            "differs" if name in sides.differ else "",
        )
        for name in ours | logtos
    ]
    here = "here" if sides.ours else "here: unknown, or deleted"
    there = "at Logto" if sides.logto else "at Logto: deleted, or never there"
    table("", ("", here, there, ""), cells, fold=True)


def _counted(found: Reconciled) -> list[tuple[str, Any]]:
    resumed = [("goes on from", shown("began", found.began))] if found.resumed else []
    return [
        *resumed,
        ("users", found.users),
        ("organizations", found.organizations),
        ("members", found.members),
        ("roles", found.roles),
    ]


def _drift(each: Drift) -> tuple[Any, ...]:
    since = shown("since", each.since)
    fields = ", ".join(each.fields) + (f": {each.role}" if each.role else "")
    return each.kind, each.id, fields, since, each.reason


def show_found(found: Sequence[Found], kind: str) -> None:
    """Print all that is known of one, or a line for each of several."""
    if len(found) > 1:
        columns = _COMPACT[kind]
        cells = [
            [shown(name, each.row[name]) for name in columns] + [each.waiting_for] for each in found
        ]
        table("", (*columns, "waits for"), cells)
        return
    [one] = found
    other = "organizations" if kind == "user" else "members"
    rows = [(name, shown(name, value)) for name, value in one.row.items()]
    rows += [(other, one.memberships), (f"{other} in doubt", one.memberships_in_doubt)]
    rows += [("roles", one.roles)] if kind == "user" else []
    rows += [("waits for", one.waiting_for or "nothing")]
    table("", ("", ""), rows, fold=True)


def as_json(value: Any) -> str:
    """Encode what was found; its times as ISO 8601. Nothing in it steers a terminal."""
    if isinstance(value, list):
        return "[" + ",".join(as_json(each) for each in value) + "]"
    if isinstance(value, Found):
        value = msgspec.structs.replace(value, row=_dated(value.row))
    elif isinstance(value, Sides):
        value = msgspec.structs.replace(value, ours=_dated(value.ours), logto=_dated(value.logto))
    text = msgspec.json.encode(dated(value)).decode()
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _dated(row: dict[str, Any] | None) -> Any:
    return row and {name: shown(name, content) for name, content in row.items()}


def dated(value: Any) -> Any:
    """Make JSON of a struct, and of those in it: their times as ISO 8601."""
    if isinstance(value, list):
        return [dated(each) for each in value]
    if not isinstance(value, msgspec.Struct):
        return value
    names = value.__struct_fields__
    return {name: shown(name, dated(getattr(value, name))) for name in names}


def shown(column: str, value: Any) -> Any:
    """Show the milliseconds of a `…_at` column as a date and time in UTC."""
    if not (column.endswith("_at") or column in _MOMENTS) or not isinstance(value, int):
        return value
    moment = datetime.fromtimestamp(value / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def plain(cell: Any) -> str:
    """Show a cell: None as nothing, what isn't text as JSON; nothing that steers a terminal."""
    if cell is None:
        return ""
    text = cell if isinstance(cell, str) else canonical.encode(cell).decode()
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# When something was, and not called `…_at`.
_MOMENTS = ("since", "until", "began", "complete_up_to")
_ABOVE = r"\x7f-\x9f\u202a-\u202e\u2066-\u2069"
_STEERING = re.compile(rf"[\x00-\x08\x0b-\x1f{_ABOVE}]")
_IN_JSON = re.compile(f"[{_ABOVE}]")  # which escapes the others itself
