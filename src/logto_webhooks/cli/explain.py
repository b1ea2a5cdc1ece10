"""A record's history: `explain user` and `explain organization`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from msgspec.structs import replace

from logto_webhooks.cli import output
from logto_webhooks.cli.options import DATABASE, AsJson, with_settings
from logto_webhooks.cli.session import run_admin
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.explain import Explained
from logto_webhooks.explain.provenance import DeliveryRef, Field
from logto_webhooks.records.projection import column_names
from logto_webhooks.records.record import Kind
from logto_webhooks.settings import Settings

Query = Annotated[str, typer.Argument(help="A Logto ID, or a query that matches exactly one.")]
OneField = Annotated[
    str | None,
    typer.Option("--field", help="Only this column, or `organizations` or `members`."),
]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show a record's history, and which delivery set each field.",
)


@app.command()
@with_settings("lag_ms", *DATABASE)
def user(settings: Settings, query: Query, field: OneField = None, as_json: AsJson = False) -> None:
    """Show a user's history: each delivery or API response, then each field."""
    _explain(settings, "user", query, field, as_json)


@app.command()
@with_settings("lag_ms", *DATABASE)
def organization(
    settings: Settings, query: Query, field: OneField = None, as_json: AsJson = False
) -> None:
    """Show an organization's history: each delivery or API response, then each field."""
    _explain(settings, "organization", query, field, as_json)


def _explain(settings: Settings, kind: Kind, query: str, field: str | None, as_json: bool) -> None:
    columns = column_names(kind)
    if field is not None and field.partition(".")[0] not in columns:
        problem = f"{field!r} isn't one of {', '.join(columns)}"
        raise SettingInvalid(name="--field", problem=problem)
    explained = run_admin(
        settings,
        lambda admin: (admin.explain_user if kind == "user" else admin.explain_organization)(query),
    )
    if explained is None:
        output.note(f"No {kind} found for {query!r}.")
        raise typer.Exit(1)
    explained = explained.only(field) if field else explained
    if as_json:
        print(output.to_json(_to_json(explained)))
    else:
        _show(explained)


def _to_json(explained: Explained) -> dict[str, Any]:
    fields = [
        replace(field, value=output.format_value(field.name, field.value))
        for field in explained.fields
    ]
    lists = {"lines": output.format_moment(explained.lines), "fields": output.format_moment(fields)}
    return explained.subject._asdict() | lists


def _show(explained: Explained) -> None:
    title = f"{explained.subject.kind} {explained.subject.id}"
    output.out.print(output.strip_controls(title), style="bold", markup=False, soft_wrap=True)
    for line in explained.lines:
        output.print_line(output.format_timeline_entry(line))
    columns = ("field", "value", "set by", "last confirmed by", "")
    nothing = "" if explained.fields else ": nothing"
    output.table(f"\nWhat it has now{nothing}", columns, map(_to_row, explained.fields), fold=True)


def _to_row(field: Field) -> tuple[Any, ...]:
    last = field.told_by if field.told_by != field.set_by else None
    value = output.format_value(field.name, field.value)
    return field.name, value, _format_delivery(field.set_by), _format_delivery(last), _remark(field)


def _format_delivery(delivery: DeliveryRef | None) -> str | None:
    return f"{delivery.id} {delivery.call or delivery.event}" if delivery else None


def _remark(field: Field) -> str:
    remarks = ["in doubt"] if field.doubtful else []
    if field.claimed:
        remarks.append("from a token's claims")
    if field.asked_at is not None:
        remarks.append(f"read from Logto at {output.format_value('_at', field.asked_at)}")
    if field.ended_at is not None:
        ended = output.format_value("_at", field.ended_at)
        remarks.append(f"ended with its user or organization at {ended}")
    return ", ".join(remarks)
