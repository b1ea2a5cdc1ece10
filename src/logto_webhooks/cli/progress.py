"""Long work: a bar on a terminal, with rate and time left; a line about going on after Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from logto_webhooks.cli import output

STOPPED = 130


class Bar:
    """How far work came: `stage` after `stage`, each with a bar of its own."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=1.0, rate="")
        self._stage = ""
        self._began = (time.monotonic(), 0)

    def update(self, stage: str, count: int, done: float) -> None:
        """Say that `count` items of a stage are done, which is so much of it, from 0 to 1."""
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
    """Show a bar on stderr while the block lasts, if that is a terminal and it isn't `silent`."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    hidden = silent or not output.err.is_terminal
    with Progress(*columns, console=output.err, transient=True, disable=hidden) as progress:
        made = Bar(progress)
        made.update(first, 0, 0.0)
        yield made


@contextmanager
def stoppable(how_to_go_on: str) -> Iterator[None]:
    """Let Ctrl-C end the block with a line that says how to go on, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        stopped(how_to_go_on)


def stopped(how_to_go_on: str) -> None:
    """Say how to go on, and leave. Raises Exit."""
    output.err.print(f"Stopped. {how_to_go_on}", markup=False, soft_wrap=True)
    raise typer.Exit(STOPPED)
