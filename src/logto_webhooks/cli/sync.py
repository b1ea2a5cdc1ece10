"""Compare with Logto, and get what was missed: `recover`, `reconcile` and `backfill`."""

from __future__ import annotations

from typing import Annotated, Final

from typer import Exit, Option

from logto_webhooks.admin import Admin
from logto_webhooks.cli import output
from logto_webhooks.cli.options import (
    DATABASE,
    LOGTO_API,
    AsJson,
    DryRun,
    parse_moment,
    with_settings,
)
from logto_webhooks.cli.session import run_admin
from logto_webhooks.errors import NoLocalHandlers
from logto_webhooks.reconcile.reconcile import ReconcileResult
from logto_webhooks.reconcile.recover import RecoverResult
from logto_webhooks.settings import Settings

_RUN_AGAIN: Final = "Run it again within a day to continue."
_LOG_ENTRIES: Final = "entries of Logto's log"


@with_settings("signing_key", *DATABASE, *LOGTO_API, "api_budget", "public_url")
def recover(
    settings: Settings,
    since: Annotated[
        str | None,
        Option(
            help="Start at this time (2026-11-24T08:00Z), or this long ago (90m, 36h, 7d). "
            "Default: the end of the last run."
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Recover missed deliveries from Logto's log."""
    start = parse_moment("--since", since)

    async def run(admin: Admin) -> RecoverResult:
        with output.show_progress(_LOG_ENTRIES, silent=as_json) as bar:
            return await admin.recover(
                start,
                dry_run=dry_run,
                progressed=lambda result: bar.update(_LOG_ENTRIES, result.entries, result.done),
            )

    resume = "The deliveries recovered so far are stored. Run it again for the rest."
    with output.stoppable(output.UNCHANGED if dry_run else resume):
        result = run_admin(settings, run)
    output.show(result, as_json, lambda result: output.show_recovered(result, dry_run))
    if not result.webhooks:
        raise Exit(1)


@with_settings(*DATABASE, *LOGTO_API, "api_budget", "map_file")
def reconcile(
    settings: Settings,
    user: Annotated[
        str | None,
        Option(help="Only this user: a Logto ID, or a query matching exactly one user."),
    ] = None,
    dry_run: DryRun = False,
    report: Annotated[
        bool,
        Option("--report", help="For each difference, show when it began and a likely reason."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare all records with Logto and correct the differences.

    It compares users, organizations, members and roles. An interrupted run resumes.
    """

    async def run(admin: Admin) -> ReconcileResult:
        if user is not None:
            return await admin.reconcile(user, dry_run=dry_run)
        with output.show_progress("users", silent=as_json) as bar:
            return await admin.reconcile(dry_run=dry_run, progressed=bar.update)

    with output.stoppable(output.UNCHANGED if dry_run else _RUN_AGAIN):
        result = run_admin(settings, run, maps=True)
    output.show(result, as_json, lambda result: output.show_reconciled(result, dry_run, report))
    if user is not None and not result.users:
        output.fail(f"No user found for {user!r}, neither here nor in Logto.")
    _fail_if_not_compared(result)


@with_settings(*DATABASE, *LOGTO_API, "api_budget", "map_file")
def backfill(
    settings: Settings,
    run_handlers: Annotated[
        bool,
        Option("--run-handlers", help="Run handlers of local events for each row that is written."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fill an empty database from Logto.

    It is as fast as Logto allows: Logto Cloud allows 20 requests per second. An interrupted run
    resumes.
    """

    async def run(admin: Admin) -> ReconcileResult:
        with output.show_progress("users", silent=as_json) as bar:
            return await admin.backfill(run_handlers=run_handlers, progressed=bar.update)

    with output.stoppable(_RUN_AGAIN):
        try:
            result = run_admin(settings, run, maps=True)
        except NoLocalHandlers as error:
            output.fail(str(error))
    output.show(result, as_json, output.show_backfilled)
    if run_handlers and result.drifted < result.users and not as_json:
        output.note(
            "Handlers ran only for rows that were written. For rows that already existed, run: "
            "logto-webhooks handlers run NAME"
        )
    _fail_if_not_compared(result)


def _fail_if_not_compared(result: ReconcileResult) -> None:
    if result.not_compared or result.doubts:
        raise Exit(1)
