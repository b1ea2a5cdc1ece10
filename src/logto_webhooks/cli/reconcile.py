"""Comparing everything with Logto: `reconcile`, and `backfill` for the first time."""

from __future__ import annotations

from typing import Annotated

import typer

from logto_webhooks.admin import Admin
from logto_webhooks.cli import options, output, progress, records
from logto_webhooks.reconcile.run import ReconcileResult

Report = Annotated[
    bool, typer.Option("--report", help="Say of each since when it differed, and why likely.")
]

_GO_ON = "Run it again within a day: it goes on where it was."


def reconcile(
    user: Annotated[
        str | None,
        typer.Option(help="Only this user: a Logto id, or what `users` finds exactly one by."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing.")] = False,
    report: Report = False,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    api_budget: options.ApiBudget = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare all records with Logto's own, and mend what differs.

    That is users, organizations, members and roles. One that was killed is gone on with.
    """
    settings = options.settings(
        env_file,
        database_url=database_url,
        schema=schema,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
        api_budget=api_budget,
    )
    with progress.stoppable("Nothing was changed." if dry_run else _GO_ON):
        found = records.run_admin(
            settings, lambda to: _reconcile(to, user, dry_run, silent=as_json)
        )
    if as_json:
        print(output.to_json(found))
    else:
        output.show_reconciled(found, dry_run, report)
    if user is not None and not found.users:
        output.err.print(f"No user found for {user!r}, neither here nor at Logto.", markup=False)
        raise typer.Exit(1)


def backfill(
    run_handlers: Annotated[
        bool, typer.Option("--run-handlers", help="Tell handlers of LocalUserCreated and the like.")
    ] = False,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    api_budget: options.ApiBudget = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Fill an empty database from Logto, as fast as Logto allows.

    Its Cloud allows 20 requests a second. One that was killed is gone on with.
    """
    settings = options.settings(
        env_file,
        database_url=database_url,
        schema=schema,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
        api_budget=api_budget,
    )
    with progress.stoppable(_GO_ON):
        found = records.run_admin(settings, lambda to: _backfill(to, run_handlers, silent=as_json))
    if as_json:
        print(output.to_json(found))
    else:
        output.show_filled(found)


async def _reconcile(to: Admin, user: str | None, dry_run: bool, silent: bool) -> ReconcileResult:
    if user is not None:
        return await to.reconcile(user, dry_run=dry_run)
    with progress.bar("users", silent=silent) as bar:
        return await to.reconcile(dry_run=dry_run, progressed=bar.update)


async def _backfill(to: Admin, run_handlers: bool, silent: bool) -> ReconcileResult:
    with progress.bar("users", silent=silent) as bar:
        return await to.backfill(run_handlers=run_handlers, progressed=bar.update)
