"""Find problems and say how to fix them: `doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Final

from typer import Exit, Option

from logto_webhooks.admin import LEAST_FREE_MB, TIMEOUT_S, Admin
from logto_webhooks.cli import output
from logto_webhooks.cli.options import DATABASE, LOGTO_API, AsJson, EnvFile, with_settings
from logto_webhooks.cli.session import load_application, run_admin
from logto_webhooks.doctor.checks import CHECKS
from logto_webhooks.doctor.faults import Finding, Level, exit_code
from logto_webhooks.mapping.file import find_map_file
from logto_webhooks.plural import Count
from logto_webhooks.settings import Settings

_NAMES: Final = ", ".join(check.name for check in CHECKS)
_MARKS: Final = {Level.OK: "✓", Level.SKIPPED: "-", Level.WARNING: "!", Level.BROKEN: "✗"}


@with_settings(
    "app",
    "map_file",
    "signing_key",
    *DATABASE,
    "path",
    *LOGTO_API,
    "recover_every_s",
    "public_url",
    "spool_dir",
)
def doctor(
    settings: Settings,
    only: Annotated[
        str | None,
        Option(
            help=f"Run only these checks, separated by commas, and those they depend on: {_NAMES}.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float, Option(min=0.1, help="The time limit of each check, in seconds.")
    ] = TIMEOUT_S,
    least_free_mb: Annotated[
        int, Option(min=0, help="Warn if less disk space is free for the SQLite file, in MB.")
    ] = LEAST_FREE_MB,
    env_file: EnvFile = None,
    as_json: AsJson = False,
) -> None:
    """Find problems, here and in Logto, and say how to fix them."""
    application = load_application(settings)
    names = [name.strip() for name in (only or "").split(",") if name.strip()]

    async def diagnose(admin: Admin) -> list[Finding]:
        if application is not None:
            admin.handlers = application.handlers
        try:
            return await admin.diagnose(
                names,
                timeout_s=timeout,
                least_free_mb=least_free_mb,
                application=application,
                files=[env_file or Path(".env")],
                read_map_file=lambda: find_map_file(settings),
            )
        finally:
            if application is not None:
                await application.close()

    findings = run_admin(settings, diagnose)
    output.show(findings, as_json, _show)
    raise Exit(exit_code(findings))


def _show(findings: Sequence[Finding]) -> None:
    """Print findings, what to do about them, and how many there are.

    Consecutive checks that are skipped for the same reason share a line.
    """
    for (level, text), group in groupby(findings, attrgetter("level", "text")):
        alike = list(group)
        checks = ", ".join(dict.fromkeys(finding.check for finding in alike))
        output.say(f"{_MARKS[level]} {checks}: {text}")
        if alike[0].do:
            output.say(f"    {alike[0].do}")
            output.say(f"    {alike[0].docs}")
    levels = [finding.level for finding in findings]
    broken, warnings, skipped = (
        Count(levels.count(level)) for level in (Level.BROKEN, Level.WARNING, Level.SKIPPED)
    )
    output.say(f"\n{broken} broken, {warnings:warning|warnings}, {skipped:check|checks} skipped.")
