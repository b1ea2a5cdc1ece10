"""`python -m logto_webhooks`, and the command `logto-webhooks`."""

import os
import signal
import sys
from typing import Final

_STREAMS: Final = {"stdin": "r", "stdout": "w", "stderr": "w"}


def main() -> None:
    """Run the command line, or say how to install it."""
    _open_missing_streams()
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:
        # Ctrl-C ends the process: in an import, Python would print a traceback, whoever catches it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from logto_webhooks.cli import run
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and not _is_ours(error):
            print(
                f"error: {error.name} isn't installed. Install this package with the extra `all`. "
                'In a clone: pip install ".[all]". From a wheel: pip install "FILE.whl[all]"',
                file=sys.stderr,
            )
            sys.exit(2)
        if "--debug" in sys.argv:
            raise
        print(
            f"error: the command line can't be imported: {type(error).__name__}. Install this "
            "package again; --debug shows the traceback.",
            file=sys.stderr,
        )
        sys.exit(2)
    if on_interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, on_interrupt)
    run()


def _open_missing_streams() -> None:
    """Open the null device for each standard stream that is closed. Otherwise, the database or a
    socket would get its file descriptor, and uvloop aborts when it closes such a one."""
    for descriptor, (name, mode) in enumerate(_STREAMS.items()):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _is_ours(error: ModuleNotFoundError) -> bool:
    """Whether the module is a part of this package, which no extra brings."""
    return (error.name or "").partition(".")[0] == "logto_webhooks"


if __name__ == "__main__":
    main()
