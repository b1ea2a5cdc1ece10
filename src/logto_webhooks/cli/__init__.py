"""The command line: parse, call, print."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from logto_webhooks.cli import (
    deliveries,
    demo,
    doctor,
    endpoint,
    explain,
    handlers,
    jobs,
    listen,
    look,
    outermost,
    person,
    reconcile,
    recover,
    send,
    serve,
    setup,
    tail,
    trigger,
    worker,
)

app = typer.Typer(
    name="logto-webhooks",
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
        bool,
        typer.Option(outermost.DEBUG, help="Show the traceback of an error that nobody foresaw."),
    ] = False,
) -> None:
    """Receive Logto's webhooks, and keep an exact copy of Logto's users and organizations."""
    if version:
        print(metadata.version("logto-webhooks"))
        raise typer.Exit


for command in (
    demo.demo,
    serve.serve,
    worker.worker,
    setup.init,
    setup.migrate,
    look.status,
    doctor.doctor,
    person.users,
    look.organizations,
    tail.tail,
    recover.recover,
    reconcile.reconcile,
    reconcile.backfill,
    trigger.trigger,
    send.sign,
    listen.listen,
):
    app.command()(command)

app.add_typer(deliveries.app, name="deliveries")
app.add_typer(endpoint.app, name="endpoint")
app.add_typer(explain.app, name="explain")
app.add_typer(handlers.app, name="handlers")
app.add_typer(jobs.app, name="jobs")


def run() -> None:
    """Run the command line. Whatever goes wrong is one line, and exit code 2."""
    outermost.run(app, debug=outermost.take_debug())
