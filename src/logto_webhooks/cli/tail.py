"""Looking on: `tail`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated

import typer
from msgspec.structs import replace

from logto_webhooks.cli import arguments, options, output
from logto_webhooks.cli.deliveries import Event, Subject
from logto_webhooks.database import database_for
from logto_webhooks.deliveries import DeliveryFilter, StoredDelivery
from logto_webhooks.settings import Settings
from logto_webhooks.tail import follow, newest_id
from logto_webhooks.validation import GREATEST_ID


def tail(
    since_id: Annotated[
        int | None,
        typer.Option(min=0, max=GREATEST_ID, help="Begin after this id; the newest if unset."),
    ] = None,
    event: Event = None,
    subject: Subject = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Show deliveries as they come, a line each, until Ctrl-C."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    sought = DeliveryFilter(
        after=since_id,
        event=arguments.check_printable("--event", event),
        subject=arguments.parse_subject(subject),
    )
    asyncio.run(_tail(settings, sought, count, as_json))


async def _tail(
    settings: Settings, sought: DeliveryFilter, count: int | None, as_json: bool
) -> None:
    database = database_for(settings)
    try:
        await database.check()
        after = await newest_id(database.host) if sought.after is None else sought.after
        arguments.warn_about(sought.event)
        output.err.print(f"Following from id {after} on; Ctrl-C ends.", markup=False)
        async with aclosing(follow(database.host, replace(sought, after=after))) as coming:
            shown = 0
            async for kept in coming:
                _show(kept, as_json)
                shown += 1
                if shown == count:
                    return
    finally:
        await database.host.close()


def _show(kept: StoredDelivery, as_json: bool) -> None:
    if as_json:
        print(output.delivery_to_json(kept), flush=True)
    else:
        output.print_line(output.format_delivery(kept))
