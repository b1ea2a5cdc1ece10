"""Jobs of handlers: `jobs list`, `show`, `retry` and `discard`."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Annotated

import typer
from msgspec.structs import replace
from rich.text import Text

from logto_webhooks.admin import Admin
from logto_webhooks.cli import arguments, options, output, records
from logto_webhooks.errors import HandlerUnknown, JobUnknown
from logto_webhooks.jobs import JobFilter, JobRow
from logto_webhooks.plural import Count
from logto_webhooks.settings import Settings
from logto_webhooks.states import JobMove, JobState
from logto_webhooks.sync.replay import AT_ONCE
from logto_webhooks.validation import GREATEST_ID

_NONE = "There is no such job."
_STAYS = {
    JobMove.REPEAT: "What runs just now stays as it is.",
    JobMove.DISCARD: "What is done, or was discarded before, stays as it is.",
}
Handler = Annotated[str | None, typer.Option(help="Only of this handler: module:function.")]
Event = Annotated[str | None, typer.Option(help="Only for this event, such as User.Created.")]
Subject = Annotated[str | None, typer.Option(help="Only about this: user:ID, organization:ID, …")]
State = Annotated[
    JobState | None, typer.Option(help="Only in this state: waiting, done, dead or discarded.")
]
Delivery = Annotated[int | None, typer.Option(help="Only of the delivery of this id.")]
Ids = Annotated[list[int] | None, typer.Argument(min=1, max=GREATEST_ID, help="Their ids.")]

app = typer.Typer(no_args_is_help=True, help="List, show, repeat or discard jobs of handlers.")


@app.command("list")
def list_(
    handler: Handler = None,
    event: Event = None,
    subject: Subject = None,
    state: State = None,
    delivery: Delivery = None,
    group: Annotated[
        bool, typer.Option("--group", help="Count them by handler, state and error.")
    ] = False,
    after: Annotated[
        int | None, typer.Option(min=1, max=GREATEST_ID, help="Go on after this id: the next page.")
    ] = None,
    limit: records.Limit = 20,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """List jobs, the newest first: of which handler, and what became of each."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    wanted = JobFilter(
        handler=handler,
        event=event,
        subject=arguments.parse_subject(subject),
        state=state,
        delivery_id=delivery,
        after=after,
        limit=limit + 1,
    )
    if group:
        found = _all(settings, wanted)
        _show_groups(found, as_json)
    else:
        found = records.run_admin(settings, lambda to: to.jobs(wanted))
        _show(found[:limit], as_json)
        if len(found) > limit:
            more = f"There are more: go on with --after {found[limit - 1].id}."
            output.err.print(more, markup=False)
    if not found:
        _say_why_none(settings, handler, event)
        raise typer.Exit(1)


@app.command()
def show(
    id: Annotated[int, typer.Argument(min=1, max=GREATEST_ID, help="The job's id.")],
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Show a job with the traceback of its last failure, as it was printed."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    found = records.run_admin(settings, lambda to: to.jobs(JobFilter(id=id)))
    if not found:
        output.err.print(f"No job has the id {id}.", markup=False)
        raise typer.Exit(1)
    if as_json:
        print(output.to_json(found[0]))
        return
    rows = [
        (name, value) for name, value in output.format_moment(found[0]).items() if name != "error"
    ]
    output.table("", ("", ""), rows, fold=True)
    if found[0].error:
        output.out.print(f"\n{_titled(found[0])}", style="bold", markup=False)
        output.out.print(Text(output.strip_controls(found[0].error.rstrip())), soft_wrap=True)


@app.command()
def retry(
    ids: Ids = None,
    handler: Handler = None,
    state: State = None,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Run jobs again, at the end of their lines.

    Some by id, or all of a handler: the dead ones, if no state is named. What waits for its next
    attempt has it now; what runs just now is left alone.
    """
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    _move(settings, ids, handler, state, JobMove.REPEAT, as_json)


@app.command()
def discard(
    ids: Ids = None,
    handler: Handler = None,
    state: State = None,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Give jobs up, so that the next of their lines may run.

    Some by id, or all of a handler: the dead ones, if no state is named. Of what runs just now
    nothing is written: what its handler does in its transaction is rolled back.
    """
    settings = options.settings(env_file, database_url=database_url, schema=schema)
    _move(settings, ids, handler, state, JobMove.DISCARD, as_json)


def _move(
    settings: Settings,
    ids: list[int] | None,
    handler: str | None,
    state: JobState | None,
    move: JobMove,
    as_json: bool,
) -> None:
    chosen = list(dict.fromkeys(ids or []))

    async def work(to: Admin) -> int:
        moving = to.retry_jobs if move is JobMove.REPEAT else to.discard_jobs
        return await moving(chosen, handler=handler, state=state)

    try:
        moved = records.run_admin(settings, work)
    except JobUnknown as error:
        output.err.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    total = len(chosen) or moved
    said = "to be run again" if move is JobMove.REPEAT else "discarded"
    if as_json:
        print(output.to_json({"jobs": total, "moved": moved}))
    elif total:
        output.out.print(f"{moved} of {Count(total):job is|jobs are} {said}.", markup=False)
    else:
        nothing = f"No job of {handler} is {state or JobState.DEAD}: none is {said}."
        output.err.print(nothing, markup=False, soft_wrap=True)
    if moved < total:
        output.err.print(_STAYS[move], markup=False)
    if not moved:
        raise typer.Exit(1)


def _say_why_none(settings: Settings, handler: str | None, event: str | None) -> None:
    """It may be the name of something that there isn't."""
    arguments.warn_about(event)
    if handler is not None:
        known = records.run_admin(settings, lambda to: to.known_handlers())
        names = [each.handler for each in known]
        if handler not in names:
            output.warn(str(HandlerUnknown(handler, names)))


def _titled(row: JobRow) -> str:
    """What its error is."""
    if row.state == JobState.DISCARDED and "Traceback " not in (row.error or ""):
        return "Why it was discarded"
    asked = output.format_error(row.error) == output.ASKED_LATER
    return "It asked to be retried" if asked else "The last failure"


def _all(settings: Settings, wanted: JobFilter) -> list[JobRow]:
    found: list[JobRow] = []
    after = wanted.after
    while True:
        page = records.run_admin(settings, partial(_page, wanted, after))
        found += page
        if len(page) < AT_ONCE:
            return found
        after = page[-1].id


async def _page(wanted: JobFilter, after: int | None, to: Admin) -> list[JobRow]:
    return await to.jobs(replace(wanted, after=after, limit=AT_ONCE))


def _show(found: list[JobRow], as_json: bool) -> None:
    if as_json:
        print(output.to_json(found))
    elif found:
        for each in found:
            output.print_line(output.format_job(each))
    else:
        output.err.print(_NONE, markup=False)


def _show_groups(found: list[JobRow], as_json: bool) -> None:
    counted = Counter((each.handler, each.state, output.format_error(each.error)) for each in found)
    groups = [(*group, count) for group, count in counted.most_common()]
    columns = ("handler", "state", "error", "jobs")
    if as_json:
        print(output.to_json([dict(zip(columns, each, strict=True)) for each in groups]))
    elif groups:
        output.table("", columns, groups, fold=True)
    else:
        output.err.print(_NONE, markup=False)
