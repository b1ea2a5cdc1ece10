"""`python -m logto_webhooks`, and the command `logto-webhooks`."""

import sys


def main() -> None:
    """Run the command line, or say how to install it."""
    try:
        from logto_webhooks.cli import run
    except ModuleNotFoundError as error:
        print(
            f"{error.name} is missing. Install the command line with: "
            'pip install "logto-webhooks[all]"',
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
