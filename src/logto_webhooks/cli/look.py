"""Looking: `status`, `users` and `organizations`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
import typer

from logto_webhooks.cli import options, tables
from logto_webhooks.core.ports import Found, Store
from logto_webhooks.wiring import Database, database_of

T = TypeVar("T")
Query = Annotated[str, typer.Argument(help="What to look for; an empty text finds all.")]
Limit = Annotated[int, typer.Option(min=1, help="How many to show at most.")]


def status(
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Count deliveries by state, and the records that only Logto can settle."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    found = read(database_of(settings.database_url, settings.schema), lambda store: store.status())
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        tables.show_status(found)


def users(
    query: Query,
    limit: Limit = 20,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Find users by Logto id, local id, email, phone or username, else by a part of them."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    found = read(
        database_of(settings.database_url, settings.schema), lambda store: store.users(query, limit)
    )
    _show(found, "user", query, as_json)


def organizations(
    query: Query,
    limit: Limit = 20,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Find organizations by Logto id, local id or name, else by a part of the name."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    database = database_of(settings.database_url, settings.schema)
    found = read(database, lambda store: store.organizations(query, limit))
    _show(found, "organization", query, as_json)


def read(database: Database, work: Callable[[Store], T]) -> T:
    """Run `work` on a database that is there and of this release's schema."""

    async def reading() -> T:
        try:
            await database.check()
            return await database.host.read(work)
        finally:
            await database.host.close()

    return asyncio.run(reading())


def _show(found: list[Found], kind: str, query: str, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(found).decode())
    elif found:
        tables.show_found(found)
    else:
        tables.err.print(f"No {kind} found for {query!r}.", markup=False)
    if not found:
        raise typer.Exit(1)
