"""The inbox: `tail`, and `deliveries list`, `show` and `replay`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Final

import msgspec
import typer
from msgspec.structs import replace
from rich.text import Text

from logto_webhooks.admin import Admin
from logto_webhooks.apply.replay import ReplayResult
from logto_webhooks.cli import options, output, progress
from logto_webhooks.cli.options import DATABASE, AsJson, Limit, with_settings
from logto_webhooks.cli.session import run_admin
from logto_webhooks.database import database_for
from logto_webhooks.deliveries import DeliveryFilter, DeliveryState
from logto_webhooks.errors import DeliveryUnknown
from logto_webhooks.flow import follow, newest_id
from logto_webhooks.settings import Settings
from logto_webhooks.validation import GREATEST_ID

REPLAYED_AT_ONCE: Final = 200
Event = Annotated[str | None, typer.Option(help="Only this event, such as User.Created.")]
Subject = Annotated[
    str | None, typer.Option(help="Only about this record: user:ID, organization:ID, …")
]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, show and replay the deliveries in the inbox.",
)


@app.command("list")
@with_settings(*DATABASE)
def list_(
    settings: Settings,
    event: Event = None,
    state: Annotated[
        DeliveryState | None,
        typer.Option(help="Only in this state: pending, done, ignored or dead."),
    ] = None,
    subject: Subject = None,
    since: Annotated[
        str | None,
        typer.Option(help="Received since then: a time (2026-11-24T08:00Z), or 90m, 36h, 7d ago."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Received before then, written like --since.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Only with this text in the body (case-sensitive).")
    ] = None,
    after: Annotated[
        int | None,
        typer.Option(min=1, max=GREATEST_ID, help="Continue after this ID: the next page."),
    ] = None,
    limit: Limit = 20,
    oldest_first: Annotated[
        bool, typer.Option("--oldest-first", help="List the oldest first.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List deliveries and their outcomes, the newest first."""
    now = datetime.now(UTC)
    filter = DeliveryFilter(
        event=options.check_printable("--event", event),
        state=state,
        subject=options.parse_subject(subject),
        since=options.parse_moment("--since", since, now),
        until=options.parse_moment("--until", until, now),
        text=options.check_printable("--text", text),
        after=after,
        oldest_first=oldest_first,
        limit=limit + 1,
    )
    deliveries = run_admin(settings, lambda admin: admin.deliveries(filter))
    if as_json:
        lines = ",".join(output.delivery_to_json(delivery) for delivery in deliveries[:limit])
        print(f"[{lines}]")
    else:
        for delivery in deliveries[:limit]:
            output.print_line(output.format_delivery(delivery))
    if len(deliveries) > limit:
        output.note(f"There are more: continue with --after {deliveries[limit - 1].id}.")
    if not deliveries:
        if not as_json:
            output.note("No such delivery is in the inbox.")
        options.warn_about_event(event)
        raise typer.Exit(1)


@app.command()
@with_settings(*DATABASE)
def show(
    settings: Settings,
    id: Annotated[int, typer.Argument(min=1, max=GREATEST_ID, help="The delivery's ID.")],
    as_json: AsJson = False,
) -> None:
    """Show a delivery with its body, as Logto sent it."""
    delivery = run_admin(settings, lambda admin: admin.delivery(id))
    if delivery is None:
        output.note(f"No delivery has the ID {id}.")
        raise typer.Exit(1)
    if as_json:
        print(output.delivery_to_json(delivery, body=msgspec.Raw(delivery.body)))
        return
    fields = output.format_moment(delivery).items()
    rows = [(name, value) for name, value in fields if name != "body"]
    output.table("", ("", ""), [*rows, ("call", delivery.call)], fold=True)
    body = msgspec.json.format(delivery.body, indent=2).decode()
    output.out.print(Text(f"\n{output.strip_controls(body)}"), soft_wrap=True)


@app.command()
@with_settings(*DATABASE, "lag_ms")
def replay(
    settings: Settings,
    ids: Annotated[list[int], typer.Argument(min=1, max=GREATEST_ID, help="Delivery IDs.")],
    handler: Annotated[str | None, typer.Option(help="Only run jobs of this handler.")] = None,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Also run jobs again that are done.")
    ] = False,
    sync_only: Annotated[
        bool, typer.Option("--sync-only", help="Only apply the deliveries; run no jobs.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change, but change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Apply deliveries again, and rerun their failed jobs.

    Jobs that are dead or discarded run again. Handlers that you have added since then run, too.
    With --handler, only that handler runs, and deliveries that were already applied are not applied
    again.
    """
    ids = list(dict.fromkeys(ids))

    async def replay_some(some: list[int], admin: Admin) -> ReplayResult:
        return await admin.replay(
            some, handler=handler, rerun=rerun, sync_only=sync_only, dry_run=dry_run
        )

    with progress.stoppable("Nothing was changed."):
        unknown = run_admin(settings, partial(_find_unknown, ids))
    if unknown:
        output.note(str(DeliveryUnknown(unknown)))
        raise typer.Exit(1)
    result = _replay_in_pieces(settings, ids, replay_some, dry_run=dry_run, silent=as_json)
    if as_json:
        print(output.to_json(result))
    else:
        output.show_replayed(result, dry_run)


async def _find_unknown(ids: list[int], admin: Admin) -> list[int]:
    return [id for id in ids if await admin.delivery(id) is None]


def _replay_in_pieces(
    settings: Settings,
    ids: list[int],
    replay_some: Callable[[list[int], Admin], Coroutine[Any, Any, ReplayResult]],
    *,
    dry_run: bool,
    silent: bool,
) -> ReplayResult:
    """Use a transaction for each piece: a long one would delay the receiver."""
    result = ReplayResult(deliveries=0, jobs=0, drifts=[])
    with progress.bar("deliveries", silent=silent) as bar:
        for start in range(0, len(ids), REPLAYED_AT_ONCE):
            resume = f"{start} of {len(ids)} were replayed; continue with the ID {ids[start]}."
            some = ids[start : start + REPLAYED_AT_ONCE]
            with progress.stoppable("Nothing was changed." if dry_run else resume):
                result = result.plus(run_admin(settings, partial(replay_some, some)))
            bar.update("deliveries", start + len(some), (start + len(some)) / len(ids))
    return result


@with_settings(*DATABASE)
def tail(
    settings: Settings,
    since_id: Annotated[
        int | None,
        typer.Option(
            min=0, max=GREATEST_ID, help="Begin after this ID. Default: the newest delivery's."
        ),
    ] = None,
    event: Event = None,
    subject: Subject = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Exit after this many deliveries.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print each delivery as it arrives, until you press Ctrl-C."""
    filter = DeliveryFilter(
        after=since_id,
        event=options.check_printable("--event", event),
        subject=options.parse_subject(subject),
    )
    asyncio.run(_tail(settings, filter, count, as_json))


async def _tail(
    settings: Settings, filter: DeliveryFilter, count: int | None, as_json: bool
) -> None:
    database = database_for(settings)
    try:
        await database.check()
        after = await newest_id(database.host) if filter.after is None else filter.after
        options.warn_about_event(filter.event)
        output.note(f"Waiting for deliveries after ID {after}. Press Ctrl-C to stop.")
        shown = 0
        async with aclosing(follow(database.host, replace(filter, after=after))) as deliveries:
            async for delivery in deliveries:
                if as_json:
                    print(output.delivery_to_json(delivery), flush=True)
                else:
                    output.print_line(output.format_delivery(delivery))
                shown += 1
                if shown == count:
                    return
    finally:
        await database.host.close()
