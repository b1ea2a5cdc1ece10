"""Check this service and Logto, and report problems and how to fix them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from logto_webhooks.doctor.checks import CHECKS, Check
from logto_webhooks.doctor.context import CheckContext, DoctorTarget
from logto_webhooks.doctor.faults import Finding, Level, make_finding, make_skipped
from logto_webhooks.errors import describe
from logto_webhooks.validation import check_choice

_FAILED: Final = (Level.BROKEN, Level.SKIPPED)


async def diagnose(target: DoctorTarget, only: Sequence[str], timeout_s: float) -> list[Finding]:
    """Run all checks, or `only` some and those that they depend on, each within `timeout_s`.

    Raises SettingInvalid for an unknown name.
    """
    context = CheckContext(target)
    findings: list[Finding] = []
    try:
        for check in _choose(only):
            results = await _run(check, context, timeout_s)
            if not any(finding.level in _FAILED for finding in results):
                context.passed.add(check.name)
            findings += [replace(finding, check=check.name) for finding in results]
    finally:
        await context.close()
    return findings


async def _run(check: Check, context: CheckContext, timeout_s: float) -> list[Finding]:
    for needed in check.needs:
        if needed not in context.passed:
            return [make_skipped(f"Skipped, because the check {needed} did not pass.")]
    try:
        async with asyncio.timeout(timeout_s):
            return await check.run(context)
    except TimeoutError:
        return [make_finding("check_failed", problem=f"it took longer than {timeout_s:g} s")]
    except Exception as error:
        return [make_finding("check_failed", problem=describe(error).rstrip("."))]


def _choose(only: Sequence[str]) -> list[Check]:
    names = [check.name for check in CHECKS]
    for name in only:
        check_choice("--only", name, names)
    chosen = set(only or names)
    for check in reversed(CHECKS):  # checks come after those that they depend on
        if check.name in chosen:
            chosen |= {*check.needs, *check.uses}
    return [check for check in CHECKS if check.name in chosen]
