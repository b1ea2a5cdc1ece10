"""What is registered: `handlers list` and `handlers forget`."""

from __future__ import annotations

from typing import Annotated

import typer
from msgspec import structs

from logto_webhooks.cli import look, options, tables
from logto_webhooks.core.count import Count
from logto_webhooks.service.manage import Known

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

    known = look.done(settings, lambda to: to.known_handlers())
    columns = ("handler", "events", "waiting", "done", "dead", "discarded")
    rows = [structs.asdict(each) | {"events": _events(each)} for each in known]
    cells = [tuple(row[name] for name in columns) for row in rows]
    if as_json:
        print(tables.as_json([dict(zip(columns, each, strict=True)) for each in cells]))
    elif cells:
        tables.table("", columns, cells, fold=True)
    else:
        tables.err.print("No handler is known: serve or worker with --app makes them known.")
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

    discarded = look.done(settings, lambda to: to.forget_handler(name))
    if discarded is None:
        tables.err.print(f"No handler is called {name!r}.", markup=False)
        raise typer.Exit(1)
    if as_json:
        print(tables.as_json({"handler": name, "discarded": discarded}))
    else:
        told = f"{name} is forgotten, {Count(discarded):job is|jobs are} discarded."
        tables.out.print(told, markup=False)


def _events(known: Known) -> str:
    return ", ".join(known.events) or "not registered"
