"""The command line."""

from __future__ import annotations

import gc
import importlib
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from logto_webhooks.cli import errors

# Name -> the module with its function or group, and the first sentence of its help. Only the module
# of the command that runs is imported.
COMMANDS: Final = {
    "demo": ("demo:demo", "Send a recorded history and show the result."),
    "serve": ("serve:serve", "Receive Logto's webhooks and apply them."),
    "worker": ("serve:worker", "Apply deliveries in the inbox without receiving new ones."),
    "init": ("init:init", "Write an .env file that explains every setting."),
    "migrate": ("init:migrate", "Migrate the database's schema to this release."),
    "status": ("records:status", "Count deliveries and jobs, and list records to refetch."),
    "doctor": (
        "doctor:doctor",
        "Find problems, here and in Logto, and say how to fix them.",
    ),
    "users": ("records:users", "Find users by ID, email, phone or username."),
    "organizations": ("records:organizations", "Find organizations by ID or name."),
    "tail": ("deliveries:tail", "Print each delivery as it arrives, until you press Ctrl-C."),
    "recover": ("sync:recover", "Recover missed deliveries from Logto's log."),
    "reconcile": ("sync:reconcile", "Compare all records with Logto and correct the differences."),
    "backfill": ("sync:backfill", "Fill an empty database from Logto."),
    "trigger": ("trigger:trigger", "Send a signed sample of any event, or a scenario."),
    "sign": ("trigger:sign", "Print the value of Logto's signature header for a body."),
    "listen": ("listen:listen", "Forward Logto's webhooks to an application on localhost."),
    "deliveries": ("deliveries:app", "List, show and replay the deliveries in the inbox."),
    "endpoint": ("webhooks:app", "Create, list and test webhooks in Logto, and rotate keys."),
    "explain": ("records:explain", "Show a record's history and which delivery set each field."),
    "handlers": (
        "jobs:handlers",
        "List handlers, run them for existing rows, and forget old ones.",
    ),
    "mapping": ("mapping:app", "Check and apply the mappings of your own tables."),
    "jobs": ("jobs:app", "List, show, retry and discard the jobs of handlers."),
}


class LazyGroup(TyperGroup):
    """A group that imports a command when it runs. Its help imports none."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (_, summary) in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=summary)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command = load_command(cmd_name)
        collect_seldom()
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        width = formatter.width - 6 - max(map(len, self.commands))
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, stub.get_short_help_str(width)) for name, stub in self.commands.items()]
            )


def load_command(name: str) -> Any:
    """Import a command, or a group of commands."""
    place, summary = COMMANDS[name]
    module, _, attribute = place.partition(":")
    target = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    if isinstance(target, typer.Typer):
        target.info.help = summary
        return typer.main.get_group(target)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(target)
    return typer.main.get_command(single)


def collect_seldom() -> None:
    """Look for garbage cycles rarely: batches make many objects but hardly any cycles, and the
    default threshold of 700 objects costs a third of the sync's time."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def make_group() -> typer.Typer:
    """Make a group of commands. Its help is in `COMMANDS`."""
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None)


app = typer.Typer(
    name="logto-webhooks",
    cls=LazyGroup,
    invoke_without_command=True,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option(errors.DEBUG, help="Show the traceback of an unexpected error.")
    ] = False,
) -> None:
    """Receive Logto's webhooks and keep an exact copy of Logto's users and organizations."""
    if version:
        from importlib import metadata

        print(metadata.version("logto-webhooks"))
        raise typer.Exit


def run() -> None:
    """Run the command line. An error is printed as one line, with exit code 2."""
    gc.disable()  # until the command is imported, because imports take 10% longer with it
    errors.run(_run_app, debug=errors.take_debug())


def _run_app() -> object:
    """Return the exit code. Errors in the command line are raised."""
    try:
        return app(standalone_mode=False)
    except typer.Abort:  # the user answered a question with no
        print("Aborted.", file=sys.stderr)
        return 1
