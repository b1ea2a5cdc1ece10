"""Looking for people: `users`, here and at Logto."""

from __future__ import annotations

from typing import Annotated

import typer

from logto_webhooks.cli import look, options, tables


def users(
    query: look.Query,
    ask_logto: Annotated[
        bool,
        typer.Option("--ask-logto", help="Of one user: ask Logto now, and show both sides."),
    ] = False,
    limit: look.Limit = 20,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Find users by id, email, phone or username, or by a part of one.

    The id is Logto's, or the local one. A part is looked for, in the name, too, only if nobody
    has all of it.
    """
    settings = options.settings(
        env_file,
        database_url=database_url,
        schema=schema,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
    )
    if not ask_logto:
        found = look.done(settings, lambda to: to.users(query, limit + 1))
        look.show(found, "user", query, limit, as_json)
        return
    sides = look.done(settings, lambda to: to.compare_user(query))
    unknown = sides.ours is None and sides.logto is None
    if as_json:
        print(tables.as_json(sides))
    elif unknown:
        tables.err.print(f"No user found for {query!r}, neither here nor at Logto.", markup=False)
    else:
        tables.show_sides(sides)
    if unknown:
        raise typer.Exit(1)
