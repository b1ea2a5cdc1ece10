"""The examples of a page: each is run, and what it printed is compared, or written."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from logto_webhooks import cli
from logto_webhooks.cli import output
from tests.pages import tree
from tests.pages.scene import WIDTH

PROMPT: Final = "$ "
CUT: Final = "…"  # a line that stands for any number of lines
_BLOCK: Final = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
# All of a traceback but its last line of code: whose folders they are in is nobody's business.
_FRAMES: Final = re.compile(r"(Traceback .*:\n)(?: .*\n)*?((?: {4}.*\n){0,2}(?=\S))")
# These set up logging, or wait for signals: a process of their own is for them.
_APART: Final = ("demo", "listen", "worker")
# What differs each time.
_VARYING: Final = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", "TIME"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
    (r"[0-9a-f]{64}", "DIGEST"),
    (r"(SIGNING_KEY=)[\w,]+", "KEY"),
    (r"127\.0\.0\.1:\d+", "ADDRESS"),
    (r"(attempts\W+)\d+", "ATTEMPTS"),
    (r"(took_ms=|after )\d+(\.\d+)?", "TOOK"),
    (r"[ \t]+", " "),
)


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


def run(line: str) -> str:
    """What a command prints, to either stream, in this folder and environment."""
    program, *words = shlex.split(line)
    assert program == "logto-webhooks", line
    if words[0] in _APART:
        return _run_apart(words)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *words])
        for console in (output.out, output.err):
            patch.setattr(console, "_width", WIDTH)
        with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit):
            cli.run()
    return _trimmed(printed.getvalue())


def alike(said: str, printed: str) -> bool:
    """Whether a page says what was printed, but for what differs each time, and what it cuts.

    Rows may come in another order: that of local ids, of which some are of the same millisecond.
    """
    said, printed = _plain(said), _plain(printed)
    pieces = re.split(rf"^{CUT}\n", said, flags=re.MULTILINE)
    pattern = "(?:.*\n)*".join(map(re.escape, pieces))
    in_any_order = sorted(said.splitlines()) == sorted(printed.splitlines())
    return in_any_order or re.fullmatch(pattern, printed) is not None


def _run_apart(words: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "logto_webhooks", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return _trimmed(done.stdout)


def _of_block(block: str) -> Iterator[Example]:
    for found in re.split(rf"^{re.escape(PROMPT)}", block, flags=re.MULTILINE)[1:]:
        line, _, printed = found.partition("\n")
        yield Example(line, printed)


def _again(example: Example) -> str:
    printed = _FRAMES.sub(rf"\1{CUT}\n\2", run(example.line))
    kept = example.printed if alike(example.printed, printed) else printed
    return f"{PROMPT}{example.line}\n{kept}"


def _trimmed(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.rstrip().splitlines())


def _plain(text: str) -> str:
    for pattern, word in _VARYING:
        text = re.sub(pattern, word, text)
    return _trimmed(text)


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
