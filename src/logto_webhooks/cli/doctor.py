"""What is wrong, and what to do: `doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Final

import typer

from logto_webhooks.admin import LEAST_FREE_MB, TIMEOUT_S, Admin
from logto_webhooks.cli import options, output, records
from logto_webhooks.cli.load_app import load_application
from logto_webhooks.doctor.checks import CHECKS
from logto_webhooks.doctor.findings import Finding, Level, exit_code
from logto_webhooks.plural import Count

_NAMES: Final = ", ".join(each.name for each in CHECKS)
_MARKS: Final = {Level.OK: "✓", Level.SKIPPED: "-", Level.WARNING: "!", Level.BROKEN: "✗"}


def doctor(
    only: Annotated[
        str | None,
        typer.Option(
            help=f"Which of {_NAMES}, separated by commas; with those that they need.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="How long a check may take, in seconds.")
    ] = TIMEOUT_S,
    least_free_mb: Annotated[
        int, typer.Option(min=0, help="How much must be free where the SQLite file is, in MB.")
    ] = LEAST_FREE_MB,
    app: options.App = None,
    signing_key: options.SigningKey = None,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    path: options.Path_ = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    recover_every_s: options.RecoverEvery = None,
    public_url: options.PublicUrl = None,
    spool_dir: options.SpoolDir = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Look at both sides, here and at Logto, and say what is wrong and what to do."""
    settings = options.settings(
        env_file,
        app=app,
        signing_key=signing_key,
        database_url=database_url,
        schema=schema,
        path=path,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
        recover_every_s=recover_every_s,
        public_url=public_url,
        spool_dir=spool_dir,
    )
    application = load_application(settings)
    names = [each.strip() for each in (only or "").split(",") if each.strip()]

    async def work(to: Admin) -> list[Finding]:
        if application is not None:
            to.handlers = application.handlers
        return await to.diagnose(
            names,
            timeout_s=timeout,
            least_free_mb=least_free_mb,
            application=application,
            files=[env_file or Path(".env")],
        )

    findings = records.run_admin(settings, work)
    if as_json:
        print(output.to_json(findings))
    else:
        _show(findings)
    raise typer.Exit(exit_code(findings))


def _show(findings: Sequence[Finding]) -> None:
    """A line for each finding, and what to do below it; in the end, how many there are.

    Checks in a row that are skipped for one reason share a line.
    """
    for (level, text), group in groupby(findings, attrgetter("level", "text")):
        alike = list(group)
        checks = ", ".join(dict.fromkeys(each.check for each in alike))
        _say(f"{_MARKS[level]} {checks}: {text}")
        if alike[0].do:
            _say(f"    {alike[0].do}")
            _say(f"    {alike[0].docs}")
    levels = [each.level for each in findings]
    broken, warnings, skipped = (
        Count(levels.count(each)) for each in (Level.BROKEN, Level.WARNING, Level.SKIPPED)
    )
    _say(f"\n{broken} broken, {warnings:warning|warnings}, {skipped:check|checks} skipped.")


def _say(text: str) -> None:
    output.out.print(output.strip_controls(text), markup=False, soft_wrap=True)
