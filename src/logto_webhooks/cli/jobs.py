"""Handlers and their jobs: `handlers list`, `run`, `forget`; `jobs list`, `show`, `retry` …"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Final

from msgspec import structs
from typer import Argument, Exit, Option

from logto_webhooks.admin import Admin
from logto_webhooks.apply.replay import AT_ONCE
from logto_webhooks.cli import make_group, options, output
from logto_webhooks.cli.options import (
    DATABASE,
    After,
    AsJson,
    DryRun,
    Event,
    Limit,
    Subject,
    with_settings,
)
from logto_webhooks.cli.session import run_admin
from logto_webhooks.errors import HandlerUnknown, JobUnknown, LogtoWebhooksError
from logto_webhooks.handlers.existing import RATE, ExistingRows
from logto_webhooks.jobs import JobFilter, JobMove, JobRow, JobState
from logto_webhooks.plural import Count
from logto_webhooks.settings import Settings
from logto_webhooks.validation import GREATEST_ID

_UNCHANGED: Final = {
    JobMove.REPEAT: "Running jobs aren't changed.",
    JobMove.DISCARD: "Jobs that are done or already discarded aren't changed.",
}
_RUN_AGAIN: Final = "The jobs made so far are stored. Run it again for the rest."
Handler = Annotated[str | None, Option(help="Only this handler: module:function.")]
State = Annotated[
    JobState | None, Option(help="Only in this state: waiting, done, dead or discarded.")
]
Ids = Annotated[list[int] | None, Argument(min=1, max=GREATEST_ID, help="Job IDs.")]


class JobsMissing(LogtoWebhooksError):
    """Pass job IDs, or --handler NAME for all its dead jobs."""


handlers = make_group()
app = make_group()


@handlers.command("list")
@with_settings(*DATABASE)
def list_handlers(settings: Settings, as_json: AsJson = False) -> None:
    """List handlers, and count their jobs by state."""
    rows = [
        structs.asdict(handler) | {"events": ", ".join(handler.events) or "not registered"}
        for handler in run_admin(settings, lambda admin: admin.known_handlers())
    ]
    if rows or as_json:
        output.show(rows, as_json, lambda rows: output.print_list("handler", rows, fold=True))
    else:
        output.note(
            "No handlers are registered. To register yours, start `serve` or `worker` with --app."
        )
    if not rows:
        raise Exit(1)


@handlers.command()
@with_settings(*DATABASE)
def forget(
    settings: Settings,
    name: Annotated[str, Argument(help="The handler's name, as `handlers list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Forget a handler that you have removed, and discard its waiting jobs.

    It gets no more jobs. A process that still has its code registers it again within a minute.
    """
    discarded = run_admin(settings, lambda admin: admin.forget_handler(name))
    if discarded is None:
        output.fail(f"There is no handler named {name!r}.")
    text = f"Forgot {name}, and discarded {Count(discarded):job|jobs}."
    output.show({"handler": name, "discarded": discarded}, as_json, lambda _: output.say(text))


@handlers.command()
@with_settings(*DATABASE)
def run(
    settings: Settings,
    name: Annotated[str, Argument(help="The handler's name, as `handlers list` shows it.")],
    user: Annotated[
        str | None,
        Option(help="Only this user: a Logto ID, or a query matching exactly one user."),
    ] = None,
    organization: Annotated[
        str | None,
        Option(
            help="Only this organization and its members: a Logto ID, or a query matching exactly "
            "one organization."
        ),
    ] = None,
    email: Annotated[
        str | None, Option(help="Only users with this text in their email (case-insensitive).")
    ] = None,
    since: Annotated[
        str | None,
        Option(
            help="Created in Logto since this time (2026-11-24T08:00Z), or this long ago (90m, "
            "36h, 7d)."
        ),
    ] = None,
    until: Annotated[
        str | None, Option(help="Created in Logto before this time, in the form of --since.")
    ] = None,
    rate: Annotated[float, Option(help="Create at most this many jobs per second.")] = RATE,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run a handler for the users, organizations or members that already exist.

    The handler must be for LocalUserCreated, LocalOrganizationCreated or LocalMemberAdded. It runs
    once for each row, unless it has run for the row before. `serve --app` or your application runs
    the jobs. An interrupted run resumes.
    """

    async def run_handler(admin: Admin) -> list[ExistingRows]:
        with output.show_progress("rows", silent=as_json) as bar:
            return await admin.run_handler(
                name,
                user=user,
                organization=organization,
                email=email,
                since=options.parse_moment("--since", since),
                until=options.parse_moment("--until", until),
                rate=rate,
                dry_run=dry_run,
                progressed=bar.update,
            )

    with output.stoppable(output.UNCHANGED if dry_run else _RUN_AGAIN):
        results = run_admin(settings, run_handler)
    output.show(results, as_json, lambda results: output.show_existing(results, dry_run))
    if not any(result.rows for result in results):
        if not as_json:
            output.note("No rows match.")
        raise Exit(1)


@app.command("list")
@with_settings(*DATABASE)
def list_(
    settings: Settings,
    handler: Handler = None,
    event: Event = None,
    subject: Subject = None,
    state: State = None,
    delivery: Annotated[int | None, Option(help="Only jobs of the delivery with this ID.")] = None,
    group: Annotated[bool, Option("--group", help="Count jobs by handler, state and error.")] = (
        False
    ),
    after: After = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    filter = JobFilter(
        handler=handler,
        event=event,
        subject=subject,
        state=state,
        delivery_id=delivery,
        after=after,
        limit=limit + 1,
    )
    if group:
        groups = run_admin(settings, lambda admin: count_groups(admin, filter))
        output.show(
            groups,
            as_json,
            lambda groups: output.print_list("job group", groups, fold=True),
        )
        is_empty = not groups
    else:
        jobs = run_admin(settings, lambda admin: admin.jobs(filter))
        output.show(jobs[:limit], as_json, _print)
        output.note_more(jobs, limit)
        is_empty = not jobs
    if is_empty:
        if not as_json:
            output.note("No jobs found.")
        _explain_empty(settings, handler, event)
        raise Exit(1)


def _print(jobs: list[JobRow]) -> None:
    for job in jobs:
        output.print_line(output.format_job(job))


async def count_groups(admin: Admin, filter: JobFilter) -> list[dict[str, object]]:
    """Count jobs by handler, state and error, page by page: their tracebacks can be very large."""
    counts: Counter[tuple[str, str, str]] = Counter()
    filter = structs.replace(filter, limit=AT_ONCE)
    while page := await admin.jobs(filter):
        counts.update((job.handler, job.state, output.format_error(job.error)) for job in page)
        filter = structs.replace(filter, after=page[-1].id)
    return [
        {"handler": handler, "state": state, "error": error, "jobs": count}
        for (handler, state, error), count in counts.most_common()
    ]


def _explain_empty(settings: Settings, handler: str | None, event: str | None) -> None:
    """Warn if the filter names an event or a handler that doesn't exist."""
    options.warn_about_event(event)
    if handler is not None:
        infos = run_admin(settings, lambda admin: admin.known_handlers())
        names = [info.handler for info in infos]
        if handler not in names:
            output.warn(str(HandlerUnknown(handler, names)))


@app.command()
@with_settings(*DATABASE)
def show(
    settings: Settings,
    id: Annotated[int, Argument(min=1, max=GREATEST_ID, help="The job's ID.")],
    as_json: AsJson = False,
) -> None:
    """Show a job with the traceback of its last failure, or with what it waits for."""
    jobs = run_admin(settings, lambda admin: admin.jobs(JobFilter(id=id)))
    if not jobs:
        output.fail(f"There is no job with the ID {id}.")
    output.show(jobs[0], as_json, _print_all)


def _print_all(job: JobRow) -> None:
    output.print_pairs(pair for pair in output.to_builtins(job).items() if pair[0] != "error")
    if job.error:
        output.say_title(f"\n{_choose_title(job, job.error)}")
        output.say(job.error.rstrip())


def _choose_title(job: JobRow, error: str) -> str:
    if "Traceback " not in error and job.state == JobState.DISCARDED:
        return "Why it was discarded"
    if "Traceback " not in error and job.state == JobState.WAITING:
        return "What it waits for"
    return "Why it asked for a retry" if output.asks_for_retry(error) else "The last failure"


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

    Select jobs by ID, or use --handler for all jobs of a handler in one state, by default the dead
    ones. Jobs that wait for their next attempt run now. The handler of a job that is done runs
    again. Running jobs aren't changed.
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

    Select jobs by ID, or use --handler for all jobs of a handler in one state, by default the dead
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
    if not chosen and handler is None:
        raise JobsMissing()

    async def move_jobs(admin: Admin) -> tuple[int, int]:
        if move is JobMove.DISCARD:
            return await admin.discard_jobs(chosen, handler=handler, state=state), 0
        done = await _count_done(admin, chosen)
        moved = await admin.retry_jobs(chosen, handler=handler, state=state)
        return moved, moved if state is JobState.DONE else done

    try:
        moved, done = run_admin(settings, move_jobs)
    except JobUnknown as error:
        output.fail(str(error))
    total = len(chosen) or moved
    result = "queued for retry" if move is JobMove.REPEAT else "discarded"
    if as_json:
        print(output.to_json({"jobs": total, "moved": moved}))
    elif total:
        output.say(f"{moved} of {Count(total):job|jobs} {result}.")
    else:
        output.note(f"{handler} has no {state or JobState.DEAD} jobs: none {result}.")
    if done:
        output.note(
            f"{Count(done):job was already done and runs|jobs were already done and run} again."
        )
    if moved < total:
        output.note(_UNCHANGED[move])
    if not moved:
        raise Exit(1)


async def _count_done(admin: Admin, ids: list[int]) -> int:
    pieces = [tuple(ids[start : start + AT_ONCE]) for start in range(0, len(ids), AT_ONCE)]
    filters = [JobFilter(ids=piece, state=JobState.DONE, limit=len(piece)) for piece in pieces]
    return sum([len(await admin.jobs(filter)) for filter in filters])
