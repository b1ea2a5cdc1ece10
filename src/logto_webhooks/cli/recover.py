"""Bringing back what was lost: `recover`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from logto_webhooks.admin import Admin
from logto_webhooks.cli import options, output, progress, records
from logto_webhooks.cli.arguments import parse_moment
from logto_webhooks.reconcile.recover import RecoverResult

_GO_ON = "What came back is kept; run it again for the rest."


def recover(
    since: Annotated[
        str | None,
        typer.Option(help="From when on: a time (2026-11-24T08:00Z), or 90m, 36h, 7d ago."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    signing_key: options.SigningKey = None,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    api_budget: options.ApiBudget = None,
    public_url: options.PublicUrl = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Bring back from Logto's own log what was sent and isn't in the inbox."""
    settings = options.settings(
        env_file,
        signing_key=signing_key,
        database_url=database_url,
        schema=schema,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
        api_budget=api_budget,
        public_url=public_url,
    )
    start = parse_moment("--since", since, datetime.now(UTC))
    with progress.stoppable("Nothing was changed." if dry_run else _GO_ON):
        found = records.run_admin(settings, lambda to: _recover(to, start, dry_run, silent=as_json))
    if as_json:
        print(output.to_json(found))
    else:
        output.show_recovered(found, dry_run)
    if not found.hooks:
        raise typer.Exit(1)


async def _recover(to: Admin, since: int | None, dry_run: bool, silent: bool) -> RecoverResult:
    what = "entries of Logto's log"
    with progress.bar(what, silent=silent) as bar:
        return await to.recover(
            since,
            dry_run=dry_run,
            progressed=lambda found: bar.update(what, found.entries, found.done),
        )
