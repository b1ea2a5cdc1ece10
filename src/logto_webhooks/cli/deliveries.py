"""The inbox: `deliveries list`, `show` and `replay`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

import msgspec
import typer
from rich.text import Text

from logto_webhooks.admin import Admin
from logto_webhooks.cli import arguments, options, output, progress, records
from logto_webhooks.deliveries import DeliveryFilter, StoredDelivery
from logto_webhooks.errors import DeliveryUnknown
from logto_webhooks.settings import Settings
from logto_webhooks.states import DeliveryState
from logto_webhooks.sync.replay import ReplayResult
from logto_webhooks.validation import GREATEST_ID

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
        DeliveryState | None,
        typer.Option(help="Only in this state: pending, done, ignored or dead."),
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
    limit: records.Limit = 20,
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
        event=arguments.check_printable("--event", event),
        state=state,
        subject=arguments.parse_subject(subject),
        since=arguments.parse_moment("--since", since, now),
        until=arguments.parse_moment("--until", until, now),
        text=arguments.check_printable("--text", text),
        after=after,
        oldest_first=oldest_first,
        limit=limit + 1,
    )
    found = records.run_admin(settings, lambda to: to.deliveries(sought))
    _show(found[:limit], as_json)
    if len(found) > limit:
        more = f"There are more: go on with --after {found[limit - 1].id}."
        output.err.print(more, markup=False)
    if not found:
        arguments.warn_about(event)
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
    kept = records.run_admin(settings, lambda to: to.delivery(id))
    if kept is None:
        output.err.print(f"No delivery has the id {id}.", markup=False)
        raise typer.Exit(1)
    if as_json:
        print(output.delivery_to_json(kept, body=msgspec.Raw(kept.body)))
        return
    rows = [(name, value) for name, value in output.format_moment(kept).items() if name != "body"]
    output.table("", ("", ""), [*rows, ("call", kept.call)], fold=True)
    body = msgspec.json.format(kept.body, indent=2).decode()
    output.out.print(Text(f"\n{output.strip_controls(body)}"), soft_wrap=True)


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

    async def work(some: list[int], to: Admin) -> ReplayResult:
        return await to.replay(
            some, handler=handler, rerun=rerun, sync_only=sync_only, dry_run=dry_run
        )

    with progress.stoppable("Nothing was done."):
        unknown = records.run_admin(settings, partial(_unknown, ids))
    if unknown:
        output.err.print(str(DeliveryUnknown(unknown)), markup=False, soft_wrap=True)
        raise typer.Exit(1)
    done = _in_pieces(settings, ids, work, dry_run=dry_run, silent=as_json)
    if as_json:
        print(output.to_json(done))
    else:
        output.show_replayed(done, dry_run)


async def _unknown(ids: list[int], to: Admin) -> list[int]:
    return [each for each in ids if await to.delivery(each) is None]


def _in_pieces(
    settings: Settings,
    ids: list[int],
    work: Callable[[list[int], Admin], Coroutine[Any, Any, ReplayResult]],
    *,
    dry_run: bool,
    silent: bool,
) -> ReplayResult:
    """A transaction each: a long one would hold back who accepts."""
    done = ReplayResult(deliveries=0, jobs=0, drifts=[])
    with progress.bar("deliveries", silent=silent) as bar:
        for start in range(0, len(ids), AT_ONCE):
            go_on = f"{start} of {len(ids)} were done; go on with the id {ids[start]}."
            some = ids[start : start + AT_ONCE]
            with progress.stoppable("Nothing was changed." if dry_run else go_on):
                done = done.plus(records.run_admin(settings, partial(work, some)))
            bar.update("deliveries", start + len(some), (start + len(some)) / len(ids))
    return done


def _show(found: list[StoredDelivery], as_json: bool) -> None:
    if as_json:
        print("[" + ",".join(output.delivery_to_json(each) for each in found) + "]")
        return
    for each in found:
        output.print_line(output.format_delivery(each))
    if not found:
        output.err.print("No such delivery is in the inbox.", markup=False)
