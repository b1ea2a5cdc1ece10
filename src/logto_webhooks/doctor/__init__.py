"""Looks at both sides, and tells what is wrong and what to do: one check after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from logto_webhooks.doctor.checks import CHECKS, Check
from logto_webhooks.doctor.context import CheckContext, DoctorTarget
from logto_webhooks.doctor.findings import Finding, Level, make_finding, skipped
from logto_webhooks.errors import describe
from logto_webhooks.validation import check_choice

_UNWELL = (Level.BROKEN, Level.SKIPPED)


async def diagnose(patient: DoctorTarget, only: Sequence[str], timeout_s: float) -> list[Finding]:
    """Run all checks, or `only` some and those that they build on; each may take `timeout_s`.

    Raises SettingInvalid for a name that is no check's.
    """
    facts = CheckContext(patient)
    findings: list[Finding] = []
    try:
        for check in _chosen(only):
            told = await _checked(check, facts, timeout_s)
            if not any(each.level in _UNWELL for each in told):
                facts.well.add(check.name)
            findings += [replace(each, check=check.name) for each in told]
    finally:
        await facts.close()
    return findings


async def _checked(check: Check, facts: CheckContext, timeout_s: float) -> list[Finding]:
    for needed in check.needs:
        if needed not in facts.well:
            return [skipped(f"Left out, because the check {needed} must be well first.")]
    try:
        async with asyncio.timeout(timeout_s):
            return await check.run(facts)
    except TimeoutError:
        return [make_finding("check_failed", problem=f"it took longer than {timeout_s:g} s")]
    except Exception as error:
        return [make_finding("check_failed", problem=describe(error).rstrip("."))]


def _chosen(only: Sequence[str]) -> list[Check]:
    names = [each.name for each in CHECKS]
    for name in only:
        check_choice("--only", name, names)
    wanted = set(only or names)
    for check in reversed(CHECKS):  # what a check builds on stands before it
        if check.name in wanted:
            wanted |= {*check.needs, *check.uses}
    return [each for each in CHECKS if each.name in wanted]
