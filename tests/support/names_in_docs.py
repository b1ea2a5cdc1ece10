"""What a page or a file names: commands with their options, settings, metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable

from logto_webhooks.instrumentation.prometheus import GAUGES, METRICS, SPOOLED, UP
from logto_webhooks.settings import FILE_VARIABLES, VARIABLES
from tests.pages import examples, tree

_OURS = {"logto_webhooks"}  # the package


def unknown_settings(text: str) -> set[str]:
    """Variables of ours that nothing reads."""
    known = {name for names in VARIABLES.values() for name in names} | {*FILE_VARIABLES}
    return set(re.findall(r"\bLOGTO_[A-Z0-9_]+\b", text)) - known


def unknown_metrics(text: str) -> set[str]:
    """Those that `/metrics` doesn't have."""
    known = {UP, SPOOLED} | {each.full_name for each in (*METRICS, *GAUGES)}
    named = re.findall(r"\blogto_webhooks_[a-z_]+\b(?!\.)", text)
    return {re.sub("_(bucket|count|sum)$", "", each) for each in named} - known - _OURS


def of_page(page: str) -> list[list[str]]:
    """The words of each command that a page names, in blocks and in prose."""
    return [*examples.command_lines(page), *examples.mentioned(page)]


def unknown_commands(lines: Iterable[list[str]]) -> list[str]:
    """Those that aren't there, or lack an option that is given."""
    return [" ".join(line) for line in lines if not _is_known(line)]


def _is_known(line: list[str]) -> bool:
    path = tree.named_in(line)
    if path not in tree.COMMANDS:
        return bool(path)
    return {each.partition("=")[0] for each in line if each.startswith("--")} <= tree.flags(path)
