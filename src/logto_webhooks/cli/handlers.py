"""What is registered: `handlers list` and `handlers forget`."""

from __future__ import annotations

from typing import Annotated

import typer

from logto_webhooks.cli import look, options, tables
from logto_webhooks.core.jobs import JobCount, Registered
from logto_webhooks.core.ports import Store

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

    def read(store: Store) -> tuple[list[Registered], list[JobCount]]:
        return store.jobs.handlers(), store.jobs.counts()

    known, counted = look.read(settings, read)
    counts = {(each.handler, each.state): each.count for each in counted}
    names = sorted({each.name for each in known} | {each.handler for each in counted})
    patterns = {each.name: ", ".join(each.patterns) for each in known}
    columns = ("handler", "events", "waiting", "done", "dead", "discarded")
    cells = [
        (
            name,
            patterns.get(name, "not registered"),
            *(counts.get((name, state), 0) for state in columns[2:]),
        )
        for name in names
    ]
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

    def work(store: Store) -> tuple[bool, int]:
        known = any(each.name == name for each in store.jobs.handlers())
        return known, store.jobs.forget(name)

    known, discarded = look.write(settings, work)
    if not known and not discarded:
        tables.err.print(f"No handler is called {name!r}.", markup=False)
        raise typer.Exit(1)
    if as_json:
        print(tables.as_json({"handler": name, "discarded": discarded}))
    else:
        tables.out.print(f"{name} is forgotten, {discarded} jobs are discarded.", markup=False)
