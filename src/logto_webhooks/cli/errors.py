"""Print any error of a command as one line instead of a traceback."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

from logto_webhooks.errors import REPORT, LogtoWebhooksError, located

DEBUG: Final = "--debug"
_USAGE: Final = 2
_INTERRUPTED: Final = 130
_PIPE_CLOSED: Final = 141  # as a shell reports SIGPIPE
_HELP: Final = "Usage: "
# Typer's words about an invalid value -> plain words.
_PLAIN_WORDS: Final = (
    ("Input should be a valid integer.*", "it must be a whole number"),
    ("Input should be a valid number.*", "it must be a number"),
    ("Input should be greater than or equal to", "it must be at least"),
    ("Input should be less than or equal to", "it must be at most"),
    ("Input should be", "it must be"),
    ("Value error, ", ""),
    # A URL in the wrong place can have a password.
    (r"(://[^/\s:@]*:)\S*@", r"\1***@"),
    (r"(password=)[^&\s)]*", r"\1***"),
)


def take_debug() -> bool:
    """Remove `--debug` from the arguments, wherever it is; return whether it was there."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    debug = DEBUG in sys.argv[1:end]
    sys.argv[1:end] = [word for word in sys.argv[1:end] if word != DEBUG]
    return debug


def run(command: Callable[[], object], *, debug: bool) -> NoReturn:
    """Run a command, and exit with the code that it returns. An error is printed as one line, with
    exit code 2. With `debug`, an unexpected error is raised."""
    _prepare_output()
    if not debug:
        sys.unraisablehook = _print_unraisable
        threading.excepthook = _print_from_thread
    code: Any = 0
    try:
        try:
            code = command()
        except SystemExit as exit:
            code = exit.code
        _flush()
    except BaseException as error:
        if debug and not _is_expected(_choose(error)):
            raise
        code = _print_error(error)
    # From here on, nothing can handle a KeyboardInterrupt, because the interpreter shuts down.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _prepare_output() -> None:
    """Make printing safe if the encoding of a stream lacks characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _print_error(raised: BaseException) -> int:
    """Print an error as one line; return the exit code."""
    error = _choose(raised)
    if isinstance(error, BrokenPipeError):
        _silence()
        return _PIPE_CLOSED
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    text = _format(error)
    try:
        print(text if text.startswith(_HELP) else f"error: {text}", file=sys.stderr, flush=True)
    except OSError:
        _silence()
    except KeyboardInterrupt:
        return _INTERRUPTED
    if isinstance(error, OSError):
        _silence()  # standard output may be unwritable
    return _USAGE


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, LogtoWebhooksError | KeyboardInterrupt) or _is_usage_error(error)


def _format(error: BaseException) -> str:
    if isinstance(error, LogtoWebhooksError):
        return str(error)
    if _is_usage_error(error):
        return _format_usage_error(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{_make_printable(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return f"the operating system reports: {error.strerror} ({located(error)})"
    return f"unexpected {located(error)}; {REPORT} ({DEBUG} shows the traceback)"


def _is_usage_error(error: Any) -> bool:
    """Whether Typer raised it about the command line. Typer doesn't export the class."""
    return hasattr(error, "format_message")


def _format_usage_error(error: Any) -> str:
    """Describe an error in the command line, and name the help. A group without a command raises
    its help text."""
    text = str(error.format_message())
    if text.startswith(_HELP):
        return text
    for pattern, words in _PLAIN_WORDS:
        text = re.sub(pattern, words, text)
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "logto-webhooks"
    text = " ".join(text.split()).removesuffix(".")
    return f"{text}{'' if text.endswith('?') else '.'} See: {command} --help"


def _choose(error: BaseException) -> BaseException:
    """Choose the most helpful error of a group: one of ours, else the first."""
    leaves = list(_list_leaves(error))
    for kind in (KeyboardInterrupt, LogtoWebhooksError, BrokenPipeError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


def _list_leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for exception in error.exceptions:
            yield from _list_leaves(exception)
    else:
        yield error


def _silence() -> None:
    """Redirect unwritable streams to the null device, because they are flushed at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(devnull, stream.fileno())


def _print_from_thread(raised: threading.ExceptHookArgs) -> None:
    if raised.exc_value is not None and not isinstance(raised.exc_value, SystemExit):
        _print_line(f"error: in a thread: {_format(raised.exc_value)}")


def _print_unraisable(raised: sys.UnraisableHookArgs) -> None:
    if raised.exc_value is not None and not isinstance(
        raised.exc_value, KeyboardInterrupt | BrokenPipeError
    ):
        _print_line(f"warning: while cleaning up: {_format(raised.exc_value)}")


def _print_line(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        _silence()


def _make_printable(value: object) -> str:
    text = os.fsdecode(value) if isinstance(value, bytes) else str(value)
    return text if text.isprintable() else ascii(text)
