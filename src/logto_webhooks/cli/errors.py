"""Turn whatever a command raises into one line, never a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

from logto_webhooks.errors import REPORT, LogtoWebhooksError, located

DEBUG: Final = "--debug"
_USAGE: Final = 2
_INTERRUPTED: Final = 130
_PIPE_CLOSED: Final = 141  # as of a process that SIGPIPE ended


def take_debug() -> bool:
    """Whether `--debug` is among the arguments, wherever it stands; it is taken out of them."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    found = DEBUG in sys.argv[1:end]
    sys.argv[1:end] = [word for word in sys.argv[1:end] if word != DEBUG]
    return found


def run(command: Callable[[], object], *, debug: bool) -> NoReturn:
    """Run a command, and end the process. What the user can mend is one line, and exit code 2;
    with `debug`, what nobody foresaw is raised as it is."""
    _prepare_output()
    if not debug:
        sys.unraisablehook = _unraisable
        threading.excepthook = _of_a_thread
    code: Any = 0
    try:
        try:
            command()
        except SystemExit as ended:
            code = ended.code
        _flush()
    except BaseException as error:
        if debug and not isinstance(_foreseen(error), LogtoWebhooksError | KeyboardInterrupt):
            raise
        code = _told(error)
    # What is still to come is the interpreter's end, which has no place to say anything.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _prepare_output() -> None:
    """Let anything be printed: where nothing is open, and in an encoding that lacks characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _told(error: BaseException) -> int:
    """Say what happened in one line; return the exit code."""
    found = _foreseen(error)
    if isinstance(found, BrokenPipeError):
        _silence()
        return _PIPE_CLOSED
    if isinstance(found, KeyboardInterrupt):
        return _INTERRUPTED
    try:
        print(f"error: {_line(found)}", file=sys.stderr, flush=True)
    except OSError:
        _silence()
    except KeyboardInterrupt:
        return _INTERRUPTED
    if isinstance(found, OSError):
        _silence()  # it may be standard output that can't be written
    return _USAGE


def _line(error: BaseException) -> str:
    if isinstance(error, LogtoWebhooksError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{_plain(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return f"the system refuses: {error.strerror} ({located(error)})"
    return f"unexpected {located(error)}; {REPORT} ({DEBUG} shows the traceback)"


def _foreseen(error: BaseException) -> BaseException:
    """Of a group the one that says most: one of ours, else the first."""
    leaves = list(_leaves(error))
    for kind in (KeyboardInterrupt, LogtoWebhooksError, BrokenPipeError):
        for each in leaves:
            if isinstance(each, kind):
                return each
    return leaves[0]


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _silence() -> None:
    """Let nothing more be written: the interpreter would try it again at its end."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(devnull, stream.fileno())


def _of_a_thread(raised: threading.ExceptHookArgs) -> None:
    if raised.exc_value is not None and not isinstance(raised.exc_value, SystemExit):
        _say(f"error: in a thread: {_line(raised.exc_value)}")


def _unraisable(raised: sys.UnraisableHookArgs) -> None:
    if raised.exc_value is not None and not isinstance(
        raised.exc_value, KeyboardInterrupt | BrokenPipeError
    ):
        _say(f"warning: while cleaning up: {_line(raised.exc_value)}")


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        _silence()


def _plain(value: object) -> str:
    text = os.fsdecode(value) if isinstance(value, bytes) else str(value)
    return text if text.isprintable() else ascii(text)
