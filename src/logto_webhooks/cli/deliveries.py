"""The inbox: `tail`, and `deliveries list`, `show` and `replay`."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from contextlib import aclosing
from inspect import Parameter, Signature
from typing import Annotated, Any, Final, NoReturn, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from typer import Argument, Exit, Option

from logto_webhooks.admin import Admin
from logto_webhooks.apply.replay import ReplayResult, cut
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
from logto_webhooks.errors import DeliveryUnknown, LogtoWebhooksError
from logto_webhooks.plural import Count
from logto_webhooks.settings import Settings
from logto_webhooks.validation import GREATEST_ID, check_text

Since = Annotated[
    str | None,
    Option(help="Received since this time (2026-11-24T08:00Z), or this long ago (90m, 36h, 7d)."),
]
Until = Annotated[str | None, Option(help="Received before this time, in the form of --since.")]
State = Annotated[
    DeliveryState | None, Option(help="Only in this state: pending, done, ignored or dead.")
]
Text = Annotated[str | None, Option(help="Only with this text in the body (case-sensitive).")]
# The options that select deliveries, by the fields of a DeliveryFilter.
_SELECT: Final[dict[str, Any]] = {
    "event": Event,
    "state": State,
    "subject": Subject,
    "since": Since,
    "until": Until,
    "text": Text,
}


class DeliveriesMissing(LogtoWebhooksError):
    """Pass delivery IDs, or options that select deliveries, such as --state dead."""


class DeliveriesUnclear(LogtoWebhooksError):
    """Pass either delivery IDs, or options that select deliveries."""


app = make_group()


def _with_filter(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `filter` by the options that select deliveries."""
    parameters = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name != "filter":
            parameters.append(parameter)
            continue
        kind = Parameter.POSITIONAL_OR_KEYWORD
        parameters += [
            Parameter(name, kind, default=None, annotation=option)
            for name, option in _SELECT.items()
        ]

    @functools.wraps(command)
    def run(settings: Settings, **values: Any) -> None:
        filter = _make_filter(**{name: values.pop(name) for name in _SELECT})
        command(settings, filter=filter, **values)

    cast(Any, run).__signature__ = Signature(parameters)
    return run


def _make_filter(
    since: str | None, until: str | None, text: str | None, **fields: Any
) -> DeliveryFilter:
    return DeliveryFilter(
        since=parse_moment("--since", since),
        until=parse_moment("--until", until),
        text=None if text is None else check_text("--text", text),
        **fields,
    )


@app.command("list")
@with_settings(*DATABASE)
@_with_filter
def list_(
    settings: Settings,
    filter: DeliveryFilter,
    after: After = None,
    limit: Limit = 20,
    oldest_first: Annotated[bool, Option("--oldest-first", help="List the oldest first.")] = False,
    as_json: AsJson = False,
) -> None:
    """List deliveries and their outcomes, the newest first."""
    wanted = replace(filter, after=after, oldest_first=oldest_first, limit=limit + 1)
    deliveries = run_admin(settings, lambda admin: admin.deliveries(wanted))
    if as_json:
        rows = [output.delivery_to_builtins(delivery) for delivery in deliveries[:limit]]
        print(output.to_json(rows))
    else:
        for delivery in deliveries[:limit]:
            output.print_line(output.format_delivery(delivery))
    output.note_more(deliveries, limit)
    if not deliveries:
        _exit_with_none(filter, as_json)


def _exit_with_none(filter: DeliveryFilter, as_json: bool) -> NoReturn:
    """Say that no deliveries match, and warn about an unknown event."""
    if not as_json:
        output.note("No deliveries found.")
    warn_about_event(filter.event)
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
@with_settings(*DATABASE, "lag_ms", "map_file")
@_with_filter
def replay(
    settings: Settings,
    ids: Annotated[list[int] | None, Argument(min=1, max=GREATEST_ID, help="Delivery IDs.")] = None,
    *,
    filter: DeliveryFilter,
    after: Annotated[
        int | None,
        Option(min=1, max=GREATEST_ID, help="Only after this ID, to continue after Ctrl-C."),
    ] = None,
    handler: Annotated[str | None, Option(help="Only run jobs of this handler.")] = None,
    rerun: Annotated[bool, Option("--rerun", help="Also repeat jobs that are done.")] = False,
    sync_only: Annotated[
        bool, Option("--sync-only", help="Apply the deliveries without running jobs.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Apply deliveries again, and rerun their failed jobs.

    Select deliveries by ID, or with options, as in `deliveries list`. Jobs that are dead or
    discarded run again. Handlers that you have added since then run, too. With --handler, only that
    handler runs, and deliveries that were already applied are not applied again. A dead delivery
    was never applied, so all its handlers run.
    """
    selected = replace(filter, after=after)
    is_selected = selected != DeliveryFilter()
    if ids and is_selected:
        raise DeliveriesUnclear()
    how = _Replay(handler=handler, rerun=rerun, sync_only=sync_only, dry_run=dry_run)
    with output.show_progress("deliveries", silent=as_json) as bar:
        if ids:
            result = _replay_ids(settings, sorted(set(ids)), how, bar)
        elif is_selected:
            result = _replay_selected(settings, selected, how, bar, as_json)
        else:
            raise DeliveriesMissing()
    output.show(result, as_json, lambda result: output.show_replayed(result, dry_run))


class _Replay(Struct, frozen=True, kw_only=True):
    """How to replay: the arguments of `Admin.replay`."""

    handler: str | None
    rerun: bool
    sync_only: bool
    dry_run: bool


def _replay_ids(settings: Settings, ids: list[int], how: _Replay, bar: output.Bar) -> ReplayResult:
    """Replay the oldest first, because jobs go to the end of their queue."""
    advice = output.UNCHANGED

    async def replay_pages(admin: Admin) -> ReplayResult:
        nonlocal advice
        sizes = await _read_sizes(ids, admin)
        if unknown := [id for id in ids if id not in sizes]:
            output.fail(str(DeliveryUnknown(unknown)))
        result, done = ReplayResult(), 0
        # Use a transaction per page: a long one would delay the receiver.
        for page in cut(ids, sizes):
            if not how.dry_run:
                advice = f"Replayed {done} of {len(ids)}. Continue with the ID {page[0]}."
            result = result.plus(await admin.replay(page, **msgspec.structs.asdict(how)))
            done += len(page)
            bar.update("deliveries", done, done / len(ids))
        return result

    try:
        return run_admin(settings, replay_pages, maps=True)
    except KeyboardInterrupt:
        output.stop(advice)


def _replay_selected(
    settings: Settings, wanted: DeliveryFilter, how: _Replay, bar: output.Bar, as_json: bool
) -> ReplayResult:
    advice, total = output.UNCHANGED, 0

    def progressed(last: int, done: int, matching: int) -> None:
        nonlocal advice, total
        total = matching
        bar.update("deliveries", done, done / max(1, total))
        if done and not how.dry_run:
            advice = f"Replayed {done} of {total}. Continue with --after {last}."

    async def replay_all(admin: Admin) -> ReplayResult:
        return await admin.replay_all(wanted, **msgspec.structs.asdict(how), progressed=progressed)

    try:
        result = run_admin(settings, replay_all, maps=True)
    except KeyboardInterrupt:
        output.stop(advice)
    if not total:
        _exit_with_none(wanted, as_json)
    if not as_json:
        output.note(f"{Count(total):delivery matches|deliveries match}.")
    return result


async def _read_sizes(ids: list[int], admin: Admin) -> dict[int, int]:
    """Return the sizes of the bodies of those deliveries that exist."""
    return {id: len(found.body) for id in ids if (found := await admin.delivery(id))}


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
