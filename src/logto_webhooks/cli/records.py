"""`users`, `organizations` and `status`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer

from logto_webhooks.admin import Admin
from logto_webhooks.cli import event_loop, options, output
from logto_webhooks.interfaces import FoundRow, RefetchNeed, Status
from logto_webhooks.settings import Settings

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

    async def look(operations: Admin) -> tuple[Status, list[RefetchNeed]]:
        return await operations.status(), await operations.waiting(limit)

    found, waiting = run_admin(settings, look)
    if as_json:
        listed = [each.key._asdict() | {"why": each.reason} for each in waiting]
        print(output.to_json(output.format_moment(found) | {"waiting": listed}))
    else:
        output.show_status(found, waiting)


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
    found = run_admin(settings, lambda to: to.organizations(query, limit + 1))
    print_found(found, "organization", query, limit, as_json)


def run_admin(settings: Settings, work: Callable[[Admin], Coroutine[Any, Any, T]]) -> T:
    """Do something to the database of the settings, and return what comes of it."""

    async def run() -> T:
        operations = Admin(lambda: settings)
        try:
            return await work(operations)
        finally:
            await operations.close()

    return event_loop.run_async(run())


def print_found(found: list[FoundRow], kind: str, query: str, limit: int, as_json: bool) -> None:
    """Print what was found; exit code 1 if that is nothing."""
    if as_json:
        print(output.to_json(found[:limit]))
    elif found:
        output.show_found(found[:limit], kind)
    else:
        output.err.print(f"No {kind} found for {query!r}.", markup=False)
    if len(found) > limit:
        output.err.print(f"There are more than {limit}; see --limit.", markup=False)
    if not found:
        raise typer.Exit(1)


def users(
    query: Query,
    ask_logto: Annotated[
        bool,
        typer.Option("--ask-logto", help="Of one user: ask Logto now, and show both sides."),
    ] = False,
    limit: Limit = 20,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Find users by id, email, phone or username, or by a part of one.

    The id is Logto's, or the local one. A part is looked for, in the name, too, only if nobody
    has all of it.
    """
    settings = options.settings(
        env_file,
        database_url=database_url,
        schema=schema,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
    )
    if not ask_logto:
        found = run_admin(settings, lambda to: to.users(query, limit + 1))
        print_found(found, "user", query, limit, as_json)
        return
    sides = run_admin(settings, lambda to: to.compare_user(query))
    unknown = sides.ours is None and sides.logto is None
    if as_json:
        print(output.to_json(sides))
    elif unknown:
        output.err.print(f"No user found for {query!r}, neither here nor at Logto.", markup=False)
    else:
        output.show_sides(sides)
    if unknown:
        raise typer.Exit(1)
