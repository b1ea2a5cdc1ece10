"""Progress of long work: a bar on a terminal, and what to do after Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from logto_webhooks.cli import output

STOPPED = 130


class Bar:
    """Shows progress: one stage after the other, each from 0 to 100 %."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=1.0, rate="")
        self._stage = ""
        self._began = (time.monotonic(), 0)

    def update(self, stage: str, count: int, done: float) -> None:
        """Show that `count` items of a stage are done; `done` is the share, from 0 to 1."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began = stage, (now, count)
            self._progress.reset(self._task, rate="")
        began, first = self._began
        self._progress.update(
            self._task,
            completed=done,
            description=f"{stage}: {count:,}",
            rate=f"{(count - first) / (now - began):,.0f}/s" if count > first else "",
        )


@contextmanager
def bar(first: str, *, silent: bool = False) -> Iterator[Bar]:
    """Show a bar on stderr during the block, if that is a terminal, and unless `silent`."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    hidden = silent or not output.err.is_terminal
    with Progress(*columns, console=output.err, transient=True, disable=hidden) as progress:
        shown = Bar(progress)
        shown.update(first, 0, 0.0)
        yield shown


@contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """Let Ctrl-C end the block with a line of advice, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        stopped(advice)


def stopped(advice: str) -> None:
    """Print that the command was stopped, and advice. Raises Exit."""
    output.note(f"Stopped. {advice}")
    raise typer.Exit(STOPPED)
