"""Logto's webhooks: `endpoint create`, `list`, `test` and `rotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from dotenv import set_key
from typer import Argument, Exit, Option

from logto_webhooks import private_files
from logto_webhooks.admin import Admin
from logto_webhooks.cli import make_group, output
from logto_webhooks.cli.options import (
    DATABASE,
    LOGTO_API,
    AsJson,
    check_url,
    parse_duration,
    read_env_file,
    with_settings,
)
from logto_webhooks.cli.session import load_code, run_admin, run_async
from logto_webhooks.errors import NotWritable, SigningKeyExists
from logto_webhooks.listen import restore_webhooks
from logto_webhooks.logto.webhooks import NAME, Webhook
from logto_webhooks.settings import VARIABLES, Settings

[_KEY] = VARIABLES["signing_key"]
OneWebhook = Annotated[
    str | None,
    Argument(help="The webhook's ID, name or URL. Default: the one with your signing key or URL."),
]
app = make_group()


@app.command()
@with_settings("app", *LOGTO_API)
def create(
    settings: Settings,
    url: Annotated[str, Option(help="The URL at which Logto reaches the service, with its path.")],
    name: Annotated[str, Option(help="The webhook's name in Logto.")] = NAME,
    env_file: Annotated[
        Path | None,
        Option(
            help="Write the signing key to this file. If it exists, read settings from it.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a webhook and print its signing key.

    It sends all events that the sync and your handlers need. The key is saved only if you give
    --env-file.
    """
    check_url("--url", url, "https://host/path")
    handlers, _ = load_code(settings)
    if env_file is not None:
        _check_writable(env_file)

    async def create_webhook(admin: Admin) -> Webhook:
        admin.handlers = handlers
        return await admin.create_endpoint(url, name=name)

    _restore_webhooks(settings)
    webhook = run_admin(settings, create_webhook)
    if as_json:
        print(output.to_json(_to_row(webhook) | {"signing_key": webhook.signing_key}))
    else:
        print(f"{_KEY}={webhook.signing_key}")
    output.note(
        f"Created {webhook.name} ({webhook.id}) for {webhook.shown_url}, "
        f"with {len(webhook.events)} events."
    )
    serve = f"logto-webhooks serve{settings.repeat_options('app')}"
    if env_file is None:
        output.note(f"Set this key, then start or restart `{serve}`.")
    else:
        _write_key(env_file, webhook.signing_key)
        output.note(f"The key is in {env_file}. Start or restart `{serve}`.")
    if not urlsplit(webhook.url).path.rstrip("/").endswith(settings.path.rstrip("/")):
        output.warn(f"serve answers only at {settings.path}, and this URL has another path.")


@app.command("list")
@with_settings("signing_key", *DATABASE, *LOGTO_API, "public_url")
def list_(settings: Settings, as_json: AsJson = False) -> None:
    """List Logto's webhooks and mark yours.

    Yours have your signing key, or the key that replaced it, or your URL. No keys are shown.
    """

    async def list_rows(admin: Admin) -> list[dict[str, Any]]:
        webhooks = await admin.endpoints()
        ours = await admin.find_ours(webhooks)
        return [_to_row(webhook) | {"ours": webhook.id in ours} for webhook in webhooks]

    _restore_webhooks(settings)
    rows = run_admin(settings, list_rows)
    if rows or as_json:
        output.show(rows, as_json, _print_rows)
    else:
        output.note("Logto has no webhooks.")
    if not rows:
        raise Exit(1)


def _print_rows(rows: list[dict[str, Any]]) -> None:
    counted = [row | {"events": len(row["events"])} for row in rows]
    output.print_list("webhook", counted, wide=True)


@app.command("test")
@with_settings("signing_key", *DATABASE, *LOGTO_API, "public_url")
def send_test(
    settings: Settings,
    webhook: OneWebhook = None,
    event: Annotated[
        str | None, Option(help="The event to send. Default: the webhook's first.")
    ] = None,
    timeout: Annotated[
        float, Option(min=0.1, help="How long to wait for the delivery, in seconds.")
    ] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Make Logto send a test delivery and wait for it."""
    _restore_webhooks(settings)
    result = run_admin(
        settings, lambda admin: admin.test_endpoint(webhook, event=event, timeout_s=timeout)
    )
    if as_json:
        print(output.to_json(result))
    elif result.problem is None:
        output.say(
            f"{result.event} arrived as delivery {result.delivery}, after {result.took_ms} ms."
        )
    else:
        output.note(f"{result.event} to {result.url} did not arrive: {result.problem}.")
    if not result.enabled:
        output.note(
            "The webhook is disabled, so Logto sends only tests. Enable it in Logto's console."
        )
    if result.problem is not None:
        raise Exit(1)


@app.command()
@with_settings("signing_key", *DATABASE, *LOGTO_API, "public_url")
def rotate(
    settings: Settings,
    webhook: OneWebhook = None,
    overlap: Annotated[
        str,
        Option(
            help="How long the old key stays valid: 30s, 10m, 2h, 1d. 0s revokes it immediately."
        ),
    ] = "10m",
    as_json: AsJson = False,
) -> None:
    """Rotate a webhook's signing key and print the new one.

    Both keys are accepted during the overlap.
    """
    overlap_s = parse_duration("--overlap", overlap)
    _restore_webhooks(settings)
    result = run_admin(settings, lambda admin: admin.rotate_endpoint(webhook, overlap_s=overlap_s))
    if as_json:
        print(output.to_json(result))
        return
    print(f"{_KEY}={result.signing_key}")
    ends = output.format_time(result.old_ends_at)
    used = output.format_time(result.old_used_at)
    last = f"its last recorded use was at {used}" if used else "no use of it has been recorded yet"
    output.note(
        f"Rotated the key of {result.webhook} ({result.url}). "
        f"The old key expires at {ends}; {last}."
    )
    output.note(
        "All processes on this database read both keys from it. Replace the old key in your "
        "settings with the new one."
    )


def _restore_webhooks(settings: Settings) -> None:
    """Undo the changes of a killed `listen` in Logto."""
    run_async(restore_webhooks(settings, output.note))


def _to_row(webhook: Webhook) -> dict[str, Any]:
    row = {name: getattr(webhook, name) for name in ("id", "name", "enabled", "url", "events")}
    return row | {"url": webhook.shown_url}


def _check_writable(file: Path) -> None:
    """Check a file before a webhook is created. Raises SigningKeyExists, NotWritable."""
    try:
        if file.exists():
            if read_env_file(file, warn=False).get(_KEY):
                raise SigningKeyExists(path=file)
        else:
            private_files.create(file)
        with file.open("a"):
            pass
    except OSError as error:
        raise NotWritable(path=file, problem=error.strerror) from None


def _write_key(file: Path, key: str) -> None:
    try:
        private_files.close_to_others(file)
        set_key(file, _KEY, key, quote_mode="auto", follow_symlinks=True)
    except OSError as error:
        raise NotWritable(path=file, problem=error.strerror) from None
