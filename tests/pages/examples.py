"""The examples of a page: each is run, and what it printed is compared, or written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tests.pages import tree
from tests.support.doc_runner import CUT, is_alike, run_command

PROMPT: Final = "$ "
_BLOCK: Final = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
# All of a traceback but its last line of code: whose folders they are in is nobody's business.
_FRAMES: Final = re.compile(r"(Traceback .*:\n)(?: .*\n)*?((?: {4}.*\n){0,2}(?=\S))")


class Example(NamedTuple):
    """A command line, and what it printed."""

    line: str
    printed: str


def are_in(page: Path) -> bool:
    """Whether a page has some."""
    return bool(_BLOCK.search(page.read_text()))


def examples(page: str) -> Iterator[Example]:
    """All of a page, in order."""
    for block in _BLOCK.findall(page):
        yield from _of_block(block)


def rewritten(page: str) -> str:
    """The page with what its examples print now, where that differs from what it says."""
    return _BLOCK.sub(lambda found: "".join(map(_again, _of_block(found[0]))), page)


def _of_block(block: str) -> Iterator[Example]:
    for found in re.split(rf"^{re.escape(PROMPT)}", block, flags=re.MULTILINE)[1:]:
        line, _, printed = found.partition("\n")
        yield Example(line, printed)


def _again(example: Example) -> str:
    printed = _FRAMES.sub(rf"\1{CUT}\n\2", run_command(example.line))
    kept = example.printed if is_alike(example.printed, printed) else printed
    return f"{PROMPT}{example.line}\n{kept}"


def command_lines(page: str) -> Iterator[list[str]]:
    """The words of the command lines in a page's blocks."""
    for line in re.findall(r"^ *(?:\$ )?logto-webhooks +(.*?)(?: +#.*)?$", page, re.MULTILINE):
        yield shlex.split(line)


def mentioned(page: str) -> Iterator[list[str]]:
    """The words of each piece of code in a page's prose that begins with a command."""
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", prose):
        words = code.removeprefix("logto-webhooks ").split()
        if tree.named_in(words):
            yield words
