"""Records: `status`, `users`, `organizations` and `explain`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

from msgspec.structs import replace
from typer import Argument, Exit, Option

from logto_webhooks.admin import Admin
from logto_webhooks.cli import make_group, output
from logto_webhooks.cli.options import DATABASE, LOGTO_API, AsJson, Limit, with_settings
from logto_webhooks.cli.session import run_admin
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.deliveries import Status
from logto_webhooks.errors import SchemaMismatch, SettingInvalid, StoreUnavailable
from logto_webhooks.ingest.spool import spool_of
from logto_webhooks.records.projection import column_names
from logto_webhooks.records.record import Kind
from logto_webhooks.settings import Settings

if TYPE_CHECKING:
    from logto_webhooks.explain import Explained
    from logto_webhooks.explain.provenance import DeliveryRef, Field

Text = Annotated[str, Argument(help="The text to search for. An empty text matches all.")]
Query = Annotated[str, Argument(help="A Logto ID, or a query that matches exactly one record.")]
OneField = Annotated[
    str | None, Option("--field", help="Only this column, or `organizations` or `members`.")
]


@with_settings(*DATABASE, "spool_dir")
def status(settings: Settings, limit: Limit = 10, as_json: AsJson = False) -> None:
    """Count deliveries and jobs, and list records to refetch.

    A record needs a refetch if only Logto's Management API has its current values.
    """

    async def read(admin: Admin) -> tuple[Status, list[RefetchNeed]]:
        return await admin.status(), await admin.waiting(limit)

    try:
        counts, waiting = run_admin(settings, read)
    except (StoreUnavailable, SchemaMismatch):
        if spool := spool_of(settings):
            _show_spooled(spool.count(), as_json)
        raise
    if as_json:
        needs = [need.key._asdict() | {"why": need.reason} for need in waiting]
        print(output.to_json(output.to_builtins(counts) | {"waiting": needs}))
    else:
        output.show_status(counts, waiting)


def _show_spooled(count: int, as_json: bool) -> None:
    """Show all that can be counted without the database."""
    if as_json:
        print(output.to_json({"spooled": count}))
    else:
        output.print_counts({"deliveries in the spool": count})


@with_settings(*DATABASE)
def organizations(
    settings: Settings, query: Text, limit: Limit = 20, as_json: AsJson = False
) -> None:
    """Find organizations by ID or name.

    The ID is Logto's or the local one. If nothing matches exactly, it finds organizations by a part
    of the name.
    """
    records = run_admin(settings, lambda admin: admin.organizations(query, limit + 1))
    _show(settings, records, "organization", query, limit, as_json)


@with_settings(*DATABASE, *LOGTO_API)
def users(
    settings: Settings,
    query: Text,
    ask_logto: Annotated[
        bool,
        Option(
            "--ask-logto", help="Fetch the user from Logto, and show both versions side by side."
        ),
    ] = False,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """Find users by ID, email, phone or username.

    The ID is Logto's or the local one. If nothing matches exactly, it finds users by a part of the
    email, phone, username or name.
    """
    if not ask_logto:
        records = run_admin(settings, lambda admin: admin.users(query, limit + 1))
        _show(settings, records, "user", query, limit, as_json)
        return
    comparison = run_admin(settings, lambda admin: admin.compare_user(query))
    is_known = comparison.ours is not None or comparison.logto is not None
    if is_known or as_json:
        output.show(comparison, as_json, output.show_comparison)
    else:
        output.note(f"No user found for {query!r}, neither here nor in Logto.")
    if not is_known:
        raise Exit(1)


def _show(
    settings: Settings, records: list[FoundRow], kind: Kind, query: str, limit: int, as_json: bool
) -> None:
    if records or as_json:
        output.show(records[:limit], as_json, lambda first: output.show_records(first, kind))
    elif run_admin(settings, lambda admin: _explain_method(admin, kind)(query)):
        output.note(
            f"No {kind} found for {query!r}, but deliveries refer to this ID. To see them, run: "
            f"logto-webhooks explain {kind} {shlex.quote(query)}"
        )
    else:
        output.note(f"No {kind} found for {query!r}.")
    if len(records) > limit:
        output.note(f"There are more than {limit}. To see them, increase --limit.")
    if not records:
        raise Exit(1)


explain = make_group()


@explain.command()
@with_settings("lag_ms", *DATABASE)
def user(settings: Settings, query: Query, field: OneField = None, as_json: AsJson = False) -> None:
    """Show a user's history: each delivery and API response, then each field."""
    _explain(settings, "user", query, field, as_json)


@explain.command()
@with_settings("lag_ms", *DATABASE)
def organization(
    settings: Settings, query: Query, field: OneField = None, as_json: AsJson = False
) -> None:
    """Show an organization's history: each delivery and API response, then each field."""
    _explain(settings, "organization", query, field, as_json)


def _explain(settings: Settings, kind: Kind, query: str, field: str | None, as_json: bool) -> None:
    columns = column_names(kind)
    if field is not None and field.partition(".")[0] not in columns:
        problem = f"{field!r} isn't one of {', '.join(columns)}"
        raise SettingInvalid(name="--field", problem=problem)
    explained = run_admin(settings, lambda admin: _explain_method(admin, kind)(query))
    if explained is None:
        output.fail(f"No {kind} found for {query!r}.")
    explained = explained.only(field) if field else explained
    if as_json:
        print(output.to_json(_to_builtins(explained)))
    else:
        _show_explained(explained)


def _explain_method(
    admin: Admin, kind: Kind
) -> Callable[[str], Coroutine[Any, Any, Explained | None]]:
    return admin.explain_user if kind == "user" else admin.explain_organization


def _to_builtins(explained: Explained) -> dict[str, Any]:
    fields = [
        replace(field, value=output.format_value(field.name, field.value))
        for field in explained.fields
    ]
    lists = {"lines": output.to_builtins(explained.lines), "fields": output.to_builtins(fields)}
    return explained.subject._asdict() | lists


def _show_explained(explained: Explained) -> None:
    output.say_title(f"{explained.subject.kind} {explained.subject.id}")
    for entry in explained.lines:
        output.print_line(output.format_timeline_entry(entry))
    nothing = "" if explained.fields else ": none"
    columns = ("field", "value", "set by", "last confirmed by", "")
    output.print_table(
        f"\nCurrent values{nothing}", columns, map(_to_row, explained.fields), fold=True
    )


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
        remarks.append(f"read from Logto at {output.format_time(field.asked_at)}")
    if field.ended_at is not None:
        ended = output.format_time(field.ended_at)
        remarks.append(f"ended with its user or organization at {ended}")
    return ", ".join(remarks)
