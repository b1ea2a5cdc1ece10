"""Handlers and their jobs: `handlers list`, `forget`; `jobs list`, `show`, `retry`, `discard`."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Annotated, Final

import typer
from msgspec import structs
from rich.text import Text

from logto_webhooks.admin import Admin
from logto_webhooks.apply.replay import AT_ONCE
from logto_webhooks.cli import options, output
from logto_webhooks.cli.options import DATABASE, AsJson, Limit, with_settings
from logto_webhooks.cli.session import run_admin
from logto_webhooks.errors import HandlerUnknown, JobUnknown
from logto_webhooks.jobs import JobFilter, JobMove, JobRow, JobState
from logto_webhooks.plural import Count
from logto_webhooks.settings import Settings
from logto_webhooks.validation import GREATEST_ID

_UNCHANGED: Final = {
    JobMove.REPEAT: "Jobs that are running now are left alone.",
    JobMove.DISCARD: "Jobs that are done or already discarded stay as they are.",
}
Handler = Annotated[str | None, typer.Option(help="Only this handler: module:function.")]
Event = Annotated[str | None, typer.Option(help="Only this event, such as User.Created.")]
Subject = Annotated[
    str | None, typer.Option(help="Only about this record: user:ID, organization:ID, …")
]
State = Annotated[
    JobState | None, typer.Option(help="Only in this state: waiting, done, dead or discarded.")
]
Ids = Annotated[list[int] | None, typer.Argument(min=1, max=GREATEST_ID, help="Job IDs.")]

handlers = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List the known handlers, and forget old ones.",
)
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, show, retry and discard the jobs of handlers.",
)


@handlers.command("list")
@with_settings(*DATABASE)
def list_handlers(settings: Settings, as_json: AsJson = False) -> None:
    """List handlers, and count their jobs by state."""
    rows = [
        structs.asdict(handler) | {"events": ", ".join(handler.events) or "not registered"}
        for handler in run_admin(settings, lambda admin: admin.known_handlers())
    ]
    columns = ("handler", "events", "waiting", "done", "dead", "discarded")
    if as_json:
        print(output.to_json([{name: row[name] for name in columns} for row in rows]))
    elif rows:
        output.table("", columns, [[row[name] for name in columns] for row in rows], fold=True)
    else:
        output.note("No handlers are known. Start `serve` or `worker` with --app to register some.")
    if not rows:
        raise typer.Exit(1)


@handlers.command()
@with_settings(*DATABASE)
def forget(
    settings: Settings,
    name: Annotated[str, typer.Argument(help="The handler's name, as `handlers list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Forget a handler that you have removed, and discard its waiting jobs.

    It gets no more jobs. If a process still has its code, the next start registers it again.
    """
    discarded = run_admin(settings, lambda admin: admin.forget_handler(name))
    if discarded is None:
        output.note(f"No handler is called {name!r}.")
        raise typer.Exit(1)
    if as_json:
        print(output.to_json({"handler": name, "discarded": discarded}))
    else:
        output.say(f"Forgot {name}, and discarded {Count(discarded):job|jobs}.")


@app.command("list")
@with_settings(*DATABASE)
def list_(
    settings: Settings,
    handler: Handler = None,
    event: Event = None,
    subject: Subject = None,
    state: State = None,
    delivery: Annotated[
        int | None, typer.Option(help="Only jobs of the delivery with this ID.")
    ] = None,
    group: Annotated[
        bool, typer.Option("--group", help="Count jobs by handler, state and error.")
    ] = False,
    after: Annotated[
        int | None,
        typer.Option(min=1, max=GREATEST_ID, help="Continue after this ID: the next page."),
    ] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    filter = JobFilter(
        handler=handler,
        event=event,
        subject=options.parse_subject(subject),
        state=state,
        delivery_id=delivery,
        after=after,
        limit=limit + 1,
    )
    if group:
        jobs = _read_all(settings, filter)
        _show_groups(jobs, as_json)
    else:
        jobs = run_admin(settings, lambda admin: admin.jobs(filter))
        _show(jobs[:limit], as_json)
        if len(jobs) > limit:
            output.note(f"There are more: continue with --after {jobs[limit - 1].id}.")
    if not jobs:
        if not as_json:
            output.note("There is no such job.")
        _explain_empty(settings, handler, event)
        raise typer.Exit(1)


@app.command()
@with_settings(*DATABASE)
def show(
    settings: Settings,
    id: Annotated[int, typer.Argument(min=1, max=GREATEST_ID, help="The job's ID.")],
    as_json: AsJson = False,
) -> None:
    """Show a job with the traceback of its last failure."""
    jobs = run_admin(settings, lambda admin: admin.jobs(JobFilter(id=id)))
    if not jobs:
        output.note(f"No job has the ID {id}.")
        raise typer.Exit(1)
    [job] = jobs
    if as_json:
        print(output.to_json(job))
        return
    fields = output.format_moment(job).items()
    output.table("", ("", ""), [row for row in fields if row[0] != "error"], fold=True)
    if job.error:
        output.out.print(f"\n{_error_title(job)}", style="bold", markup=False)
        output.out.print(Text(output.strip_controls(job.error.rstrip())), soft_wrap=True)


@app.command()
@with_settings(*DATABASE)
def retry(
    settings: Settings,
    ids: Ids = None,
    handler: Handler = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Run jobs again, at the end of their queues.

    Name them by ID, or name a handler to retry all its jobs in one state, by default the dead
    ones. Jobs that wait for their next attempt run now. Running jobs are left alone.
    """
    _move(settings, ids, handler, state, JobMove.REPEAT, as_json)


@app.command()
@with_settings(*DATABASE)
def discard(
    settings: Settings,
    ids: Ids = None,
    handler: Handler = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Give up jobs, so that the next ones in their queues can run.

    Name them by ID, or name a handler to discard all its jobs in one state, by default the dead
    ones. If a job is running, its handler's transaction is rolled back.
    """
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

    async def move_jobs(admin: Admin) -> int:
        method = admin.retry_jobs if move is JobMove.REPEAT else admin.discard_jobs
        return await method(chosen, handler=handler, state=state)

    try:
        moved = run_admin(settings, move_jobs)
    except JobUnknown as error:
        output.note(str(error))
        raise typer.Exit(1) from None
    total = len(chosen) or moved
    result = "queued for retry" if move is JobMove.REPEAT else "discarded"
    if as_json:
        print(output.to_json({"jobs": total, "moved": moved}))
    elif total:
        output.say(f"{moved} of {Count(total):job|jobs} {result}.")
    else:
        output.note(f"{handler} has no {state or JobState.DEAD} jobs: none {result}.")
    if moved < total:
        output.note(_UNCHANGED[move])
    if not moved:
        raise typer.Exit(1)


def _explain_empty(settings: Settings, handler: str | None, event: str | None) -> None:
    """Warn if the filter names an event or a handler that doesn't exist."""
    options.warn_about_event(event)
    if handler is not None:
        known = run_admin(settings, lambda admin: admin.known_handlers())
        names = [info.handler for info in known]
        if handler not in names:
            output.warn(str(HandlerUnknown(handler, names)))


def _error_title(job: JobRow) -> str:
    if job.state == JobState.DISCARDED and "Traceback " not in (job.error or ""):
        return "Why it was discarded"
    asked_later = output.format_error(job.error) == output.ASKED_LATER
    return "It asked to be retried" if asked_later else "The last failure"


def _read_all(settings: Settings, filter: JobFilter) -> list[JobRow]:
    jobs: list[JobRow] = []
    after = filter.after
    while True:
        page = run_admin(settings, partial(_read_page, filter, after))
        jobs += page
        if len(page) < AT_ONCE:
            return jobs
        after = page[-1].id


async def _read_page(filter: JobFilter, after: int | None, admin: Admin) -> list[JobRow]:
    return await admin.jobs(structs.replace(filter, after=after, limit=AT_ONCE))


def _show(jobs: list[JobRow], as_json: bool) -> None:
    if as_json:
        print(output.to_json(jobs))
        return
    for job in jobs:
        output.print_line(output.format_job(job))


def _show_groups(jobs: list[JobRow], as_json: bool) -> None:
    counts = Counter((job.handler, job.state, output.format_error(job.error)) for job in jobs)
    groups = [(*group, count) for group, count in counts.most_common()]
    columns = ("handler", "state", "error", "jobs")
    if as_json:
        print(output.to_json([dict(zip(columns, group, strict=True)) for group in groups]))
    elif groups:
        output.table("", columns, groups, fold=True)
