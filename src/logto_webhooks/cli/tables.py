"""What commands print: tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from logto_webhooks.core.ports import Found, Status

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under a title; None is shown as nothing."""
    made = Table(show_header=any(columns), header_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*[Text(plain(cell)) for cell in row])
    if title:
        out.print(title, style="bold", markup=False)
    out.print(made)


def show_status(status: Status) -> None:
    """Print counts."""
    rows: list[tuple[str, Any]] = [
        (f"deliveries {state}", count) for state, count in status.deliveries.items()
    ]
    oldest = status.oldest_pending_s
    rows += [
        ("records in doubt", status.doubtful),
        ("records to ask Logto about", status.refetch),
        ("oldest pending", "none" if oldest is None else f"{oldest:.1f} s"),
    ]
    table("", ("", ""), rows)


def show_found(found: list[Found]) -> None:
    """Print one table for each row found."""
    for each in found:
        rows = [(name, moment(name, value)) for name, value in each.row.items()]
        rows.append(("member of" if "email" in each.row else "members", each.memberships))
        rows.append(("in doubt, or missing", each.waiting_for or "nothing"))
        table("", ("", ""), rows)
        out.print()


def moment(column: str, value: Any) -> Any:
    """Show the milliseconds of a `…_at` column as a date and time."""
    if not column.endswith("_at") or value is None:
        return value
    return datetime.fromtimestamp(value / 1000, UTC).isoformat(" ", "milliseconds")


def plain(cell: Any) -> str:
    """Show a cell; what isn't text as JSON."""
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else msgspec.json.encode(cell).decode()
