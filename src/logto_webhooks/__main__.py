"""`python -m logto_webhooks`, and the command `logto-webhooks`."""

import signal
import sys


def main() -> None:
    """Run the command line, or say how to install it."""
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


def _is_ours(error: ModuleNotFoundError) -> bool:
    """Whether the module is a part of this package, which no extra brings."""
    return (error.name or "").partition(".")[0] == "logto_webhooks"


if __name__ == "__main__":
    main()
