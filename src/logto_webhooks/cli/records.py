"""`status`, `users` and `organizations`."""

from __future__ import annotations

from typing import Annotated

import typer

from logto_webhooks.admin import Admin
from logto_webhooks.cli import output
from logto_webhooks.cli.options import DATABASE, LOGTO_API, AsJson, Limit, with_settings
from logto_webhooks.cli.session import run_admin
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.deliveries import Status
from logto_webhooks.settings import Settings

Query = Annotated[str, typer.Argument(help="The text to search for. An empty text finds all.")]


@with_settings(*DATABASE, "spool_dir")
def status(settings: Settings, limit: Limit = 10, as_json: AsJson = False) -> None:
    """Count deliveries, jobs, and records that wait for Logto.

    Records wait if only the Management API can tell their current values.
    """

    async def read(admin: Admin) -> tuple[Status, list[RefetchNeed]]:
        return await admin.status(), await admin.waiting(limit)

    counts, waiting = run_admin(settings, read)
    if as_json:
        needs = [need.key._asdict() | {"why": need.reason} for need in waiting]
        print(output.to_json(output.format_moment(counts) | {"waiting": needs}))
    else:
        output.show_status(counts, waiting)


@with_settings(*DATABASE)
def organizations(
    settings: Settings, query: Query, limit: Limit = 20, as_json: AsJson = False
) -> None:
    """Find organizations by ID or name.

    The ID is Logto's or the local one. If nothing matches exactly, it finds organizations by a part
    of these.
    """
    rows = run_admin(settings, lambda admin: admin.organizations(query, limit + 1))
    _print_rows(rows, "organization", query, limit, as_json)


@with_settings(*DATABASE, *LOGTO_API)
def users(
    settings: Settings,
    query: Query,
    ask_logto: Annotated[
        bool,
        typer.Option(
            "--ask-logto", help="Fetch the user from Logto, and show both versions side by side."
        ),
    ] = False,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """Find users by ID, email, phone or username.

    The ID is Logto's or the local one. If nothing matches exactly, it finds users by a part of
    these, or of the name.
    """
    if not ask_logto:
        rows = run_admin(settings, lambda admin: admin.users(query, limit + 1))
        _print_rows(rows, "user", query, limit, as_json)
        return
    comparison = run_admin(settings, lambda admin: admin.compare_user(query))
    is_unknown = comparison.ours is None and comparison.logto is None
    if as_json:
        print(output.to_json(comparison))
    elif is_unknown:
        output.note(f"No user found for {query!r}, neither here nor at Logto.")
    else:
        output.show_comparison(comparison)
    if is_unknown:
        raise typer.Exit(1)


def _print_rows(rows: list[FoundRow], kind: str, query: str, limit: int, as_json: bool) -> None:
    if as_json:
        print(output.to_json(rows[:limit]))
    elif rows:
        output.show_rows(rows[:limit], kind)
    else:
        output.note(f"No {kind} found for {query!r}.")
    if len(rows) > limit:
        output.note(f"There are more than {limit}; see --limit.")
    if not rows:
        raise typer.Exit(1)
