"""What is registered: `handlers list` and `handlers forget`."""

from __future__ import annotations

from typing import Annotated

import typer
from msgspec import structs

from logto_webhooks.admin import HandlerInfo
from logto_webhooks.cli import options, output, records
from logto_webhooks.plural import Count

app = typer.Typer(no_args_is_help=True, help="List the handlers that are known, or forget one.")


@app.command("list")
def list_(
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """List handlers, with how many of their jobs wait, are done, dead or discarded."""
    settings = options.settings(env_file, database_url=database_url, schema=schema)

    known = records.run_admin(settings, lambda to: to.known_handlers())
    columns = ("handler", "events", "waiting", "done", "dead", "discarded")
    rows = [structs.asdict(each) | {"events": _events(each)} for each in known]
    cells = [tuple(row[name] for name in columns) for row in rows]
    if as_json:
        print(output.to_json([dict(zip(columns, each, strict=True)) for each in cells]))
    elif cells:
        output.table("", columns, cells, fold=True)
    else:
        output.err.print("No handler is known: serve or worker with --app makes them known.")
    if not cells:
        raise typer.Exit(1)


@app.command()
def forget(
    name: Annotated[str, typer.Argument(help="Its name, as `handlers list` shows it.")],
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Forget a handler whose code is gone, and discard the jobs that wait for it.

    No more jobs are made for it. A process that has its code makes it known again when it starts.
    """
    settings = options.settings(env_file, database_url=database_url, schema=schema)

    discarded = records.run_admin(settings, lambda to: to.forget_handler(name))
    if discarded is None:
        output.err.print(f"No handler is called {name!r}.", markup=False)
        raise typer.Exit(1)
    if as_json:
        print(output.to_json({"handler": name, "discarded": discarded}))
    else:
        told = f"{name} is forgotten, {Count(discarded):job is|jobs are} discarded."
        output.out.print(told, markup=False)


def _events(known: HandlerInfo) -> str:
    return ", ".join(known.events) or "not registered"
