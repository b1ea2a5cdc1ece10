"""The inbox: `deliveries list`, `show` and `replay`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

import msgspec
import typer
from rich.text import Text

from logto_webhooks.cli import given, lines, look, options, progress, tables
from logto_webhooks.core.inbox import DeliveryFilter, Kept
from logto_webhooks.core.lifecycle import State
from logto_webhooks.errors import DeliveryUnknown
from logto_webhooks.service.given import GREATEST_ID
from logto_webhooks.service.replay import Replayed
from logto_webhooks.settings import Settings
from logto_webhooks.wiring.operations import Operations

AT_ONCE = 200
Event = Annotated[str | None, typer.Option(help="Only of this event, such as User.Created.")]
Subject = Annotated[str | None, typer.Option(help="Only about this: user:ID, organization:ID, …")]

app = typer.Typer(
    no_args_is_help=True, help="List the deliveries in the inbox, show one, or apply some again."
)


@app.command("list")
def list_(
    event: Event = None,
    state: Annotated[
        State | None, typer.Option(help="Only in this state: pending, done, ignored or dead.")
    ] = None,
    subject: Subject = None,
    since: Annotated[
        str | None,
        typer.Option(help="Received since: a time (2026-11-24T08:00Z), or 90m, 36h, 7d ago."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="Received before that: as --since.")] = None,
    text: Annotated[
        str | None, typer.Option(help="With this text in the body, in the same case.")
    ] = None,
    after: Annotated[
        int | None,
        typer.Option(min=1, max=GREATEST_ID, help="Go on after this id: the next page."),
    ] = None,
    limit: look.Limit = 20,
    oldest_first: Annotated[bool, typer.Option("--oldest-first", help="Oldest first.")] = False,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """List deliveries, the newest first: what became of each, whom it is about."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    now = datetime.now(UTC)
    sought = DeliveryFilter(
        event=given.text("--event", event),
        state=state,
        subject=given.subject(subject),
        since=given.moment("--since", since, now),
        until=given.moment("--until", until, now),
        text=given.text("--text", text),
        after=after,
        oldest_first=oldest_first,
        limit=limit + 1,
    )
    found = look.done(settings, lambda to: to.deliveries(sought))
    _show(found[:limit], as_json)
    if len(found) > limit:
        more = f"There are more: go on with --after {found[limit - 1].id}."
        tables.err.print(more, markup=False)
    if not found:
        given.warn_of(event)
        raise typer.Exit(1)


@app.command()
def show(
    id: Annotated[int, typer.Argument(min=1, max=GREATEST_ID, help="Its id in the inbox.")],
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Show a delivery with its body, as Logto sent it."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    kept = look.done(settings, lambda to: to.delivery(id))
    if kept is None:
        tables.err.print(f"No delivery has the id {id}.", markup=False)
        raise typer.Exit(1)
    if as_json:
        print(lines.as_json(kept, body=msgspec.Raw(kept.body)))
        return
    rows = [(name, value) for name, value in tables.dated(kept).items() if name != "body"]
    tables.table("", ("", ""), [*rows, ("call", kept.call)], fold=True)
    body = msgspec.json.format(kept.body, indent=2).decode()
    tables.out.print(Text(f"\n{tables.plain(body)}"), soft_wrap=True)


@app.command()
def replay(
    ids: Annotated[list[int], typer.Argument(min=1, max=GREATEST_ID, help="Their ids.")],
    handler: Annotated[str | None, typer.Option(help="Only jobs of this handler.")] = None,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Run jobs again that are done, too.")
    ] = False,
    sync_only: Annotated[
        bool, typer.Option("--sync-only", help="Only apply; leave the jobs as they are.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would do and change.")
    ] = False,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    lag_ms: options.LagMs = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Apply deliveries again, and run again their jobs that are dead or discarded.

    Handlers that are new since then are told, too. With --handler, nobody else is, and what was
    applied before isn't again.
    """
    settings = options.settings(env_file, database_url=database_url, schema=schema, lag_ms=lag_ms)
    ids = list(dict.fromkeys(ids))

    async def work(some: list[int], to: Operations) -> Replayed:
        return await to.replay(
            some, handler=handler, rerun=rerun, sync_only=sync_only, dry_run=dry_run
        )

    with progress.stoppable("Nothing was done."):
        unknown = look.done(settings, partial(_unknown, ids))
    if unknown:
        tables.err.print(str(DeliveryUnknown(unknown)), markup=False, soft_wrap=True)
        raise typer.Exit(1)
    done = _in_pieces(settings, ids, work, dry_run=dry_run, silent=as_json)
    if as_json:
        print(tables.as_json(done))
    else:
        tables.show_replayed(done, dry_run)


async def _unknown(ids: list[int], to: Operations) -> list[int]:
    return [each for each in ids if await to.delivery(each) is None]


def _in_pieces(
    settings: Settings,
    ids: list[int],
    work: Callable[[list[int], Operations], Coroutine[Any, Any, Replayed]],
    *,
    dry_run: bool,
    silent: bool,
) -> Replayed:
    """A transaction each: a long one would hold back who accepts."""
    done = Replayed(deliveries=0, jobs=0, drifts=[])
    with progress.bar("deliveries", silent=silent) as bar:
        for start in range(0, len(ids), AT_ONCE):
            go_on = f"{start} of {len(ids)} were done; go on with the id {ids[start]}."
            some = ids[start : start + AT_ONCE]
            with progress.stoppable("Nothing was changed." if dry_run else go_on):
                done = done.plus(look.done(settings, partial(work, some)))
            bar.update("deliveries", start + len(some), (start + len(some)) / len(ids))
    return done


def _show(found: list[Kept], as_json: bool) -> None:
    if as_json:
        print("[" + ",".join(lines.as_json(each) for each in found) + "]")
        return
    for each in found:
        lines.show(lines.of_delivery(each))
    if not found:
        tables.err.print("No such delivery is in the inbox.", markup=False)
