"""Looking: `status` and `organizations`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from logto_webhooks.cli import options, tables
from logto_webhooks.core.ports import Found, Host, Status, Store, Waiting
from logto_webhooks.core.record import Key, Kind
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.service.rehearse import perform
from logto_webhooks.settings import Settings
from logto_webhooks.wiring import database_of

T = TypeVar("T")
Query = Annotated[str, typer.Argument(help="What to look for; an empty text finds all.")]
Limit = Annotated[int, typer.Option(min=1, help="How many to show at most.")]


def status(
    limit: Limit = 10,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Count deliveries by state, and list the records that only Logto can settle."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)

    def look(store: Store) -> tuple[Status, list[Waiting]]:
        return store.status(), store.waiting(limit)

    found, waiting = read(settings, look)
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
    found = read(settings, lambda store: store.find("organization", query, limit + 1))
    show(found, "organization", query, limit, as_json)


def read(settings: Settings, work: Callable[[Store], T]) -> T:
    """Run `work` on a database that is there and of this release's schema."""
    return asyncio.run(_on_database(settings, lambda host: host.read(work)))


def write(settings: Settings, work: Callable[[Store], T]) -> T:
    """The same in a transaction that is committed."""
    return asyncio.run(_on_database(settings, lambda host: host.run(work)))


def rehearse(settings: Settings, work: Callable[[Store], T]) -> T:
    """The same in a transaction that is rolled back."""
    return asyncio.run(_on_database(settings, lambda host: perform(host, work, dry=True)))


async def _on_database(settings: Settings, run: Callable[[Host], Awaitable[T]]) -> T:
    database = database_of(settings.database_url, settings.schema)
    try:
        await database.check()
        return await run(database.host)
    finally:
        await database.host.close()


def only(store: Store, kind: Kind, query: str) -> Key:
    """The one user or organization that a query finds; else the query is taken for its id.

    Raises SettingInvalid if it finds several.
    """
    found = store.find(kind, query, 2)
    if len(found) > 1:
        raise SettingInvalid(name=f"the {kind}", problem=f"{query!r} finds more than one")
    return Key(kind, str(found[0].row[f"logto_{kind}_id"]) if found else query)


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
