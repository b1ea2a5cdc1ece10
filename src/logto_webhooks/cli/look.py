"""Looking: `status` and `organizations`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer

from logto_webhooks.adapters import running
from logto_webhooks.cli import options, tables
from logto_webhooks.core.ports import Found, Status, Waiting
from logto_webhooks.settings import Settings
from logto_webhooks.wiring.operations import Operations

T = TypeVar("T")
Query = Annotated[str, typer.Argument(help="What to look for; an empty text finds all.")]
Limit = Annotated[int, typer.Option(min=1, help="How many to show at most.")]


def status(
    limit: Limit = 10,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    spool_dir: options.SpoolDir = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Count deliveries and jobs by state, and list the records that only Logto can settle."""
    settings = options.settings(
        env_file, database_url=database_url, schema=schema, spool_dir=spool_dir
    )

    async def look(operations: Operations) -> tuple[Status, list[Waiting]]:
        return await operations.status(), await operations.waiting(limit)

    found, waiting = done(settings, look)
    if as_json:
        listed = [each.key._asdict() | {"why": each.reason} for each in waiting]
        print(tables.as_json(tables.dated(found) | {"waiting": listed}))
    else:
        tables.show_status(found, waiting)


def organizations(
    query: Query,
    limit: Limit = 20,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Find organizations by id (Logto's, or the local one) or name, or by a part of it."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    found = done(settings, lambda to: to.organizations(query, limit + 1))
    show(found, "organization", query, limit, as_json)


def done(settings: Settings, work: Callable[[Operations], Coroutine[Any, Any, T]]) -> T:
    """Do something to the database of the settings, and return what comes of it."""

    async def run() -> T:
        operations = Operations(lambda: settings)
        try:
            return await work(operations)
        finally:
            await operations.close()

    return running.run(run())


def show(found: list[Found], kind: str, query: str, limit: int, as_json: bool) -> None:
    """Print what was found; exit code 1 if that is nothing."""
    if as_json:
        print(tables.as_json(found[:limit]))
    elif found:
        tables.show_found(found[:limit], kind)
    else:
        tables.err.print(f"No {kind} found for {query!r}.", markup=False)
    if len(found) > limit:
        tables.err.print(f"There are more than {limit}; see --limit.", markup=False)
    if not found:
        raise typer.Exit(1)
