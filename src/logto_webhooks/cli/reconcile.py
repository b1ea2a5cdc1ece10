"""Comparing everything with Logto: `reconcile`, and `backfill` for the first time."""

from __future__ import annotations

from typing import Annotated

import typer

from logto_webhooks.adapters import server
from logto_webhooks.cli import look, options, progress, tables
from logto_webhooks.core.events.local import Source
from logto_webhooks.service.look import Reconciled
from logto_webhooks.settings import Settings
from logto_webhooks.wiring import Database, api_of, database_of, reconciliation_of

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
        found = server.run(_reconcile(settings, user, dry_run, silent=as_json))
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
    source: Source | None = "backfill" if run_handlers else None
    with progress.stoppable(_GO_ON):
        found = server.run(
            _reconcile(settings, None, False, fast=True, source=source, silent=as_json)
        )
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
    silent: bool = False,
) -> Reconciled:
    api = api_of(settings, fast=fast)
    database = database_of(settings.database_url, settings.schema)
    try:
        await database.check()
        reconciliation = reconciliation_of(api, database, source)
        if user is not None:
            return await reconciliation.one_user(await id_of(database, user), dry_run)
        with progress.bar("users", silent=silent) as bar:
            return await reconciliation.run(dry_run, bar.update)
    finally:
        await api.close()
        await database.host.close()


async def id_of(database: Database, query: str) -> str:
    """The Logto id of the one user whom a query finds, or the query. Raises SettingInvalid."""
    return (await database.host.read(lambda store: look.only(store, "user", query))).id
