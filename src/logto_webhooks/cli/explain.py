"""A record's life: `explain user` and `explain organization`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from msgspec.structs import replace

from logto_webhooks.cli import options, output, records
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.explain import Explained
from logto_webhooks.explain.provenance import DeliveryRef, Field
from logto_webhooks.records.projection import column_names
from logto_webhooks.records.record import Key, Kind
from logto_webhooks.settings import Settings

Query = Annotated[str, typer.Argument(help="A Logto id, or what else finds exactly one.")]
OneField = Annotated[
    str | None,
    typer.Option("--field", help="Only this column; organizations or members, too."),
]

app = typer.Typer(
    no_args_is_help=True,
    help="Tell a record's life, and which delivery set each field, by which call.",
)


@app.command()
def user(
    query: Query,
    field: OneField = None,
    lag_ms: options.LagMs = None,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Tell a user's life: each delivery or answer of Logto's, then each field."""
    settings = options.settings(env_file, database_url=database_url, schema=schema, lag_ms=lag_ms)
    _explain(settings, "user", query, field, as_json)


@app.command()
def organization(
    query: Query,
    field: OneField = None,
    lag_ms: options.LagMs = None,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Tell an organization's life: each delivery or answer, then each field."""
    settings = options.settings(env_file, database_url=database_url, schema=schema, lag_ms=lag_ms)
    _explain(settings, "organization", query, field, as_json)


def _explain(settings: Settings, kind: Kind, query: str, field: str | None, as_json: bool) -> None:
    known = column_names(kind)
    if field is not None and field.partition(".")[0] not in known:
        problem = f"{field!r} is none of {', '.join(known)}"
        raise SettingInvalid(name="--field", problem=problem)

    found = records.run_admin(
        settings, lambda to: (to.explain_user if kind == "user" else to.explain_organization)(query)
    )
    if found is None:
        output.err.print(f"No {kind} found for {query!r}.", markup=False)
        raise typer.Exit(1)
    told = found.only(field) if field else found
    if as_json:
        print(output.to_json(_json(told)))
    else:
        _show(told)


def _json(told: Explained) -> dict[str, Any]:
    fields = [
        replace(each, value=output.format_value(each.name, each.value)) for each in told.fields
    ]
    lists = {"lines": output.format_moment(told.lines), "fields": output.format_moment(fields)}
    return told.subject._asdict() | lists


def _show(told: Explained) -> None:
    output.out.print(_name(told.subject), style="bold", markup=False, soft_wrap=True)
    for line in told.lines:
        output.print_line(output.format_timeline_entry(line))
    columns = ("field", "value", "set by", "last told by", "")
    has = "" if told.fields else ": nothing"
    output.table(f"\nWhat it has now{has}", columns, map(_row, told.fields), fold=True)


def _name(key: Key) -> str:
    return output.strip_controls(f"{key.kind} {key.id}")


def _row(field: Field) -> tuple[Any, ...]:
    last = field.told_by if field.told_by != field.set_by else None
    value = output.format_value(field.name, field.value)
    return field.name, value, _by(field.set_by), _by(last), _remark(field)


def _by(by: DeliveryRef | None) -> str | None:
    return f"{by.id} {by.call or by.event}" if by else None


def _remark(field: Field) -> str:
    remarks = ["in doubt"] if field.doubtful else []
    if field.claimed:
        remarks.append("from a token's claims")
    if field.asked_at is not None:
        remarks.append(f"asked Logto at {output.format_value('_at', field.asked_at)}")
    if field.ended_at is not None:
        remarks.append(f"ended with either end at {output.format_value('_at', field.ended_at)}")
    return ", ".join(remarks)
