"""Logto's webhooks: `endpoint create`, `list`, `test` and `rotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
from dotenv import set_key

from logto_webhooks import private_files
from logto_webhooks.admin import Admin
from logto_webhooks.cli import arguments, envfile, event_loop, options, output, records
from logto_webhooks.cli.load_app import load_handlers
from logto_webhooks.errors import NotWritable, SigningKeyExists
from logto_webhooks.listen import session
from logto_webhooks.logto.webhooks import NAME, Webhook, is_ours
from logto_webhooks.runtime import split_signing_keys
from logto_webhooks.settings import VARIABLES, Settings

[_KEY] = VARIABLES["signing_key"]
app = typer.Typer(
    no_args_is_help=True, help="Make, list and test webhooks of Logto, and change their keys."
)


@app.command()
def create(
    url: Annotated[
        str, typer.Option(help="Where Logto reaches the service, with the webhook's path.")
    ],
    name: Annotated[str, typer.Option(help="What it is called in Logto.")] = NAME,
    app: options.App = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    env_file: Annotated[
        Path | None,
        typer.Option(
            help="Write the key into this file, and read settings from it if it is there.",
            show_default=False,
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a webhook for what the sync and the handlers need, and print its key.

    The key is written nowhere unless --env-file is given.
    """
    settings = options.settings(
        env_file if env_file and env_file.exists() else None,
        app=app,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
    )
    handlers = load_handlers(settings)
    if env_file is not None:
        _may_write(env_file)

    async def work(to: Admin) -> Webhook:
        to.handlers = handlers
        return await to.create_endpoint(url, name=name)

    _tidy(settings)
    made = records.run_admin(settings, work)
    if as_json:
        print(output.to_json(_shown(made) | {"signing_key": made.signing_key}))
    else:
        print(f"{_KEY}={made.signing_key}")
    print_webhook(f"Made {made.name} ({made.id}) for {made.url}, with {len(made.events)} events.")
    if env_file is None:
        print_webhook("Set that key, and start `logto-webhooks serve` (again) with it.")
    else:
        _write(env_file, made.signing_key)
        print_webhook(f"The key is in {env_file}: start `logto-webhooks serve` (again).")
    if not urlsplit(made.url).path.rstrip("/").endswith(settings.path.rstrip("/")):
        output.warn(f"serve answers at {settings.path}, and 404 elsewhere.")


@app.command("list")
def list_(
    signing_key: options.SigningKey = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    public_url: options.PublicUrl = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """List Logto's webhooks, and which of them has our key or our URL; no key is shown."""
    settings = options.settings(
        env_file,
        signing_key=signing_key,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
        public_url=public_url,
    )
    _tidy(settings)
    found = records.run_admin(settings, lambda to: to.endpoints())
    keys = split_signing_keys(settings)
    rows = [_shown(each) | {"ours": is_ours(each, keys, settings.public_url)} for each in found]
    if as_json:
        print(output.to_json(rows))
    elif rows:
        columns = ("id", "name", "enabled", "ours", "url")
        cells = [
            [*(row[name] for name in columns), len(each.events)]
            for row, each in zip(rows, found, strict=True)
        ]
        output.table("", (*columns, "events"), cells, wide=True)
    else:
        output.err.print("Logto has no webhook.")
    if not rows:
        raise typer.Exit(1)


@app.command("test")
def send_test(
    hook: Annotated[
        str | None,
        typer.Argument(help="Its id, name or URL; the one with our key or URL if left out."),
    ] = None,
    event: Annotated[
        str | None, typer.Option(help="Which event; the webhook's first if unset.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="How long to wait for it here, in seconds.")
    ] = 10.0,
    signing_key: options.SigningKey = None,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    public_url: options.PublicUrl = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Have Logto send a test by a webhook, and wait until it is in the inbox."""
    settings = options.settings(
        env_file,
        signing_key=signing_key,
        database_url=database_url,
        schema=schema,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
        public_url=public_url,
    )
    _tidy(settings)
    tested = records.run_admin(
        settings, lambda to: to.test_endpoint(hook, event=event, timeout_s=timeout)
    )
    if as_json:
        print(output.to_json(tested))
    elif tested.problem is None:
        said = f"is delivery {tested.delivery} here, after {tested.took_ms} ms"
        output.out.print(f"{tested.event} {said}.", markup=False)
    else:
        said = f"{tested.event} to {tested.url} did not arrive: {tested.problem}."
        output.err.print(said, markup=False, soft_wrap=True)
    if not tested.enabled:
        print_webhook(
            "The webhook is disabled: Logto sends tests by it, and nothing else. Enable it there."
        )
    if tested.problem is not None:
        raise typer.Exit(1)


@app.command()
def rotate(
    hook: Annotated[
        str | None,
        typer.Argument(help="Its id, name or URL; the one with our key or URL if left out."),
    ] = None,
    overlap: Annotated[
        str, typer.Option(help="How long the old key is accepted: 30s, 10m, 2h, 1d; 0s for not.")
    ] = "10m",
    signing_key: options.SigningKey = None,
    database_url: options.DatabaseUrl = None,
    schema: options.Schema = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    public_url: options.PublicUrl = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Change a webhook's key at Logto, and print the new one; both keys are accepted meanwhile."""
    settings = options.settings(
        env_file,
        signing_key=signing_key,
        database_url=database_url,
        schema=schema,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
        public_url=public_url,
    )
    overlap_s = arguments.parse_duration("--overlap", overlap)
    _tidy(settings)
    done = records.run_admin(settings, lambda to: to.rotate_endpoint(hook, overlap_s=overlap_s))
    if as_json:
        print(output.to_json(done))
        return
    print(f"{_KEY}={done.signing_key}")
    ends, used = (output.format_value("_at", each) for each in (done.old_ends_at, done.old_used_at))
    last = f"its last use that is noted (every 30 s) was at {used}" if used else "no use is noted"
    print_webhook(
        f"The key of {done.hook} ({done.url}) is changed. The old one ends at {ends}; {last}."
    )
    print_webhook(
        "What runs on this database learns both keys from it. "
        "Set the new key in place of the old one."
    )


def _tidy(settings: Settings) -> None:
    event_loop.run_async(session.restore_webhooks(settings, print_webhook))


def print_webhook(text: str) -> None:
    """Tell a person, beside what is printed."""
    output.err.print(text, markup=False, soft_wrap=True)


def _shown(hook: Webhook) -> dict[str, object]:
    return {
        "id": hook.id,
        "name": hook.name,
        "enabled": hook.enabled,
        "url": hook.url,
        "events": hook.events,
    }


def _may_write(file: Path) -> None:
    """Raises SigningKeyExists, NotWritable: before anything is made."""
    try:
        if file.exists():
            if _KEY in envfile.values(file):
                raise SigningKeyExists(path=file)
        else:
            private_files.create(file)
        with file.open("a"):
            pass
    except OSError as error:
        raise NotWritable(path=file, problem=error.strerror) from None


def _write(file: Path, key: str) -> None:
    try:
        private_files.close_to_others(file)
        set_key(file, _KEY, key, quote_mode="auto", follow_symlinks=True)
    except OSError as error:
        raise NotWritable(path=file, problem=error.strerror) from None
