"""What SIGTERM and SIGINT do while a loop runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable


def on_stop(stop: Callable[[], object]) -> None:
    """Call `stop` on the running loop when this process is asked to end."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        on_signal(loop, number, stop)


def on_signal(
    loop: asyncio.AbstractEventLoop, number: signal.Signals, work: Callable[[], object]
) -> None:
    """Call `work` on the loop for each such signal, on Windows, too, whose loops take none."""
    try:
        loop.add_signal_handler(number, work)
    except NotImplementedError:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(work))


def default(loop: asyncio.AbstractEventLoop, number: signal.Signals) -> None:
    """Let a signal do again what it does without `on_signal`."""
    try:
        loop.remove_signal_handler(number)
    except NotImplementedError:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)
