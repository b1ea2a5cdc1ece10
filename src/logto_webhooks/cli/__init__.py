"""The command line: parse, call, print."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from logto_webhooks.cli import (
    deliveries,
    demo,
    doctor,
    errors,
    explain,
    handlers,
    init,
    jobs,
    listen,
    reconcile,
    records,
    recover,
    serve,
    sign,
    tail,
    trigger,
    webhooks,
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
        typer.Option(errors.DEBUG, help="Show the traceback of an error that nobody foresaw."),
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
    init.init,
    init.migrate,
    records.status,
    doctor.doctor,
    records.users,
    records.organizations,
    tail.tail,
    recover.recover,
    reconcile.reconcile,
    reconcile.backfill,
    trigger.trigger,
    sign.sign,
    listen.listen,
):
    app.command()(command)

app.add_typer(deliveries.app, name="deliveries")
app.add_typer(webhooks.app, name="endpoint")
app.add_typer(explain.app, name="explain")
app.add_typer(handlers.app, name="handlers")
app.add_typer(jobs.app, name="jobs")


def run() -> None:
    """Run the command line. Whatever goes wrong is one line, and exit code 2."""
    errors.run(app, debug=errors.take_debug())
