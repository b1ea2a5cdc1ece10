"""The inbox: `tail`, and `deliveries list`, `show` and `replay`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Final

import msgspec
from msgspec.structs import replace
from typer import Argument, Exit, Option

from logto_webhooks.admin import Admin
from logto_webhooks.apply.replay import ReplayResult
from logto_webhooks.arrivals import follow, newest_id
from logto_webhooks.cli import make_group, output
from logto_webhooks.cli.options import (
    DATABASE,
    After,
    AsJson,
    DryRun,
    Event,
    ExitAfter,
    Limit,
    Subject,
    parse_moment,
    warn_about_event,
    with_settings,
)
from logto_webhooks.cli.session import run_admin
from logto_webhooks.database import database_for
from logto_webhooks.deliveries import DeliveryFilter, DeliveryState, StoredDelivery
from logto_webhooks.errors import DeliveryUnknown
from logto_webhooks.settings import Settings
from logto_webhooks.validation import GREATEST_ID, check_text

REPLAYED_AT_ONCE: Final = 200
REPLAYED_BYTES: Final = 256 * 2**10  # of bodies, because a long one can make thousands of jobs

app = make_group()


@app.command("list")
@with_settings(*DATABASE)
def list_(
    settings: Settings,
    event: Event = None,
    state: Annotated[
        DeliveryState | None, Option(help="Only in this state: pending, done, ignored or dead.")
    ] = None,
    subject: Subject = None,
    since: Annotated[
        str | None,
        Option(
            help="Received since this time (2026-11-24T08:00Z), or this long ago (90m, 36h, 7d)."
        ),
    ] = None,
    until: Annotated[
        str | None, Option(help="Received before this time, in the form of --since.")
    ] = None,
    text: Annotated[
        str | None, Option(help="Only with this text in the body (case-sensitive).")
    ] = None,
    after: After = None,
    limit: Limit = 20,
    oldest_first: Annotated[bool, Option("--oldest-first", help="List the oldest first.")] = False,
    as_json: AsJson = False,
) -> None:
    """List deliveries and their outcomes, the newest first."""
    filter = DeliveryFilter(
        event=event,
        state=state,
        subject=subject,
        since=parse_moment("--since", since),
        until=parse_moment("--until", until),
        text=None if text is None else check_text("--text", text),
        after=after,
        oldest_first=oldest_first,
        limit=limit + 1,
    )
    deliveries = run_admin(settings, lambda admin: admin.deliveries(filter))
    if as_json:
        rows = [output.delivery_to_builtins(delivery) for delivery in deliveries[:limit]]
        print(output.to_json(rows))
    else:
        for delivery in deliveries[:limit]:
            output.print_line(output.format_delivery(delivery))
    output.note_more(deliveries, limit)
    if not deliveries:
        if not as_json:
            output.note("No deliveries found.")
        warn_about_event(event)
        raise Exit(1)


@app.command()
@with_settings(*DATABASE)
def show(
    settings: Settings,
    id: Annotated[int, Argument(min=1, max=GREATEST_ID, help="The delivery's ID.")],
    as_json: AsJson = False,
) -> None:
    """Show a delivery with its body, as Logto sent it."""
    delivery = run_admin(settings, lambda admin: admin.delivery(id))
    if delivery is None:
        output.fail(f"There is no delivery with the ID {id}.")
    fields = output.delivery_to_builtins(delivery)
    if as_json:
        print(output.to_json(fields | {"body": msgspec.Raw(delivery.body)}))
        return
    output.print_pairs(fields.items())
    body = msgspec.json.format(delivery.body, indent=2).decode()
    output.say(f"\n{body}")


@app.command()
@with_settings(*DATABASE, "lag_ms")
def replay(
    settings: Settings,
    ids: Annotated[list[int], Argument(min=1, max=GREATEST_ID, help="Delivery IDs.")],
    handler: Annotated[str | None, Option(help="Only run jobs of this handler.")] = None,
    rerun: Annotated[bool, Option("--rerun", help="Also repeat jobs that are done.")] = False,
    sync_only: Annotated[
        bool, Option("--sync-only", help="Apply the deliveries without running jobs.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Apply deliveries again, and rerun their failed jobs.

    Jobs that are dead or discarded run again. Handlers that you have added since then run, too.
    With --handler, only that handler runs, and deliveries that were already applied are not applied
    again. A dead delivery was never applied, so all its handlers run.
    """
    ids = sorted(set(ids))  # the oldest first, because jobs go to the end of their queue

    async def replay_page(page: list[int], admin: Admin) -> ReplayResult:
        return await admin.replay(
            page, handler=handler, rerun=rerun, sync_only=sync_only, dry_run=dry_run
        )

    with output.stoppable(output.UNCHANGED):
        sizes = run_admin(settings, partial(_read_sizes, ids))
    if unknown := [id for id in ids if id not in sizes]:
        output.fail(str(DeliveryUnknown(unknown)))
    result = ReplayResult(deliveries=0, jobs=0, drifts=[])
    with output.show_progress("deliveries", silent=as_json) as bar:
        # Use a transaction per page: a long one would delay the receiver.
        done = 0
        for page in cut(ids, sizes):
            resume = f"Replayed {done} of {len(ids)}. Continue with the ID {page[0]}."
            with output.stoppable(output.UNCHANGED if dry_run else resume):
                result = result.plus(run_admin(settings, partial(replay_page, page)))
            done += len(page)
            bar.update("deliveries", done, done / len(ids))
    output.show(result, as_json, lambda result: output.show_replayed(result, dry_run))


async def _read_sizes(ids: list[int], admin: Admin) -> dict[int, int]:
    """Return the sizes of the bodies of those deliveries that exist."""
    return {id: len(found.body) for id in ids if (found := await admin.delivery(id))}


def cut(ids: list[int], sizes: dict[int, int]) -> Iterator[list[int]]:
    """Cut IDs into those that are replayed in one transaction, by number and by size."""
    page: list[int] = []
    for id in ids:
        if page and (
            len(page) == REPLAYED_AT_ONCE
            or sum(sizes[other] for other in page) + sizes[id] > REPLAYED_BYTES
        ):
            yield page
            page = []
        page.append(id)
    if page:
        yield page


@with_settings(*DATABASE)
def tail(
    settings: Settings,
    since_id: Annotated[
        int | None,
        Option(min=0, max=GREATEST_ID, help="Start after this ID. Default: the newest ID."),
    ] = None,
    event: Event = None,
    subject: Subject = None,
    count: ExitAfter = None,
    as_json: AsJson = False,
) -> None:
    """Print each delivery as it arrives, until you press Ctrl-C."""
    filter = DeliveryFilter(after=since_id, event=event, subject=subject)
    asyncio.run(_tail(settings, filter, count, as_json))


async def _tail(
    settings: Settings, filter: DeliveryFilter, count: int | None, as_json: bool
) -> None:
    database = database_for(settings)
    try:
        await database.check()
        after = await newest_id(database.host) if filter.after is None else filter.after
        warn_about_event(filter.event)
        output.note(f"Waiting for deliveries after ID {after}. Press Ctrl-C to stop.")
        shown = 0
        async with aclosing(follow(database.host, replace(filter, after=after))) as deliveries:
            async for delivery in deliveries:
                _print(delivery, as_json)
                shown += 1
                if shown == count:
                    return
    finally:
        await database.host.close()


def _print(delivery: StoredDelivery, as_json: bool) -> None:
    if as_json:
        print(output.to_json(output.delivery_to_builtins(delivery)), flush=True)
    else:
        output.print_line(output.format_delivery(delivery))
