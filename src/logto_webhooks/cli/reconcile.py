"""Comparing everything with Logto: `reconcile`, and `backfill` for the first time."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from logto_webhooks.adapters import server
from logto_webhooks.cli import look, options, tables
from logto_webhooks.core.events.local import Source
from logto_webhooks.service.look import Reconciled
from logto_webhooks.settings import Settings
from logto_webhooks.wiring import Database, api_of, database_of, reconciliation_of

Report = Annotated[
    bool, typer.Option("--report", help="Say of each since when it differed, and why likely.")
]


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
    """Compare all users, organizations, members and roles with Logto's own, and mend what
    differs. One that was killed is gone on with."""
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
    found = server.run(_reconcile(settings, user, dry_run))
    if as_json:
        print(tables.as_json(found))
    else:
        tables.show_reconciled(found, dry_run, report)
    if user is not None and not found.users:
        tables.err.print(f"No user found for {user!r}, neither here nor at Logto.", markup=False)
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
    """Fill an empty database from Logto, as fast as Logto allows: 20 requests a second on its
    Cloud. One that was killed is gone on with."""
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
    source: Source | None = "backfill" if run_handlers else None
    found = server.run(_reconcile(settings, None, dry_run=False, fast=True, source=source))
    if as_json:
        print(tables.as_json(found))
    else:
        tables.show_filled(found)


async def _reconcile(
    settings: Settings,
    user: str | None,
    dry_run: bool,
    fast: bool = False,
    source: Source | None = "reconcile",
) -> Reconciled:
    api = api_of(settings, fast=fast)
    database = database_of(settings.database_url, settings.schema)
    try:
        await database.check()
        reconciliation = reconciliation_of(api, database, source)
        if user is not None:
            return await reconciliation.one_user(await id_of(database, user), dry_run)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        silent = not tables.err.is_terminal
        with Progress(*columns, console=tables.err, transient=True, disable=silent) as bar:
            task = bar.add_task("asking Logto")
            return await reconciliation.run(
                dry_run, lambda found: bar.update(task, description=_so_far(found))
            )
    finally:
        await api.close()
        await database.host.close()


async def id_of(database: Database, query: str) -> str:
    """The Logto id of the one user whom a query finds, or the query. Raises SettingInvalid."""
    return (await database.host.read(lambda store: look.only(store, "user", query))).id


def _so_far(found: Reconciled) -> str:
    return f"{found.users} users, {found.organizations} organizations, {found.drifted} differed"
