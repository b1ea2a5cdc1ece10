"""Local development: `listen`."""

from __future__ import annotations

import asyncio
import secrets
import signal
from datetime import UTC, datetime
from typing import Annotated

import typer
from msgspec.structs import replace
from rich.text import Text

from logto_webhooks import signals
from logto_webhooks.cli import options, output, progress
from logto_webhooks.cli.arguments import parse_moment
from logto_webhooks.cli.output import Hints
from logto_webhooks.cli.webhooks import print_webhook
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.listen.log_reader import ForwardResult
from logto_webhooks.listen.session import ListenCallbacks, ListenConfig
from logto_webhooks.listen.session import listen as run
from logto_webhooks.logto.webhooks import Webhook
from logto_webhooks.settings import Settings

_COMMAND = "--tunnel-command"


def listen(
    forward_to: Annotated[
        str | None,
        typer.Option(help="The URL to send to; the local service's if unset.", show_default=False),
    ] = None,
    hook: Annotated[
        str | None,
        typer.Option(help="Read only this webhook's log: its id, name or URL."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Begin in the past: a time (2026-11-24T08:00Z), or 90m, 36h, 7d ago."),
    ] = None,
    tunnel_command: Annotated[
        str | None,
        typer.Option(
            help="Make a webhook for the session, that leads through a tunnel: the command that "
            "opens one to the local port {port}, and prints its URL."
        ),
    ] = None,
    repoint: Annotated[
        str | None,
        typer.Option(
            help="With a tunnel: no new webhook, but this one's URL is changed until the end."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask before --repoint.")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
    signing_key: options.SigningKey = None,
    endpoint: options.Endpoint = None,
    app_id: options.AppId = None,
    app_secret: options.AppSecret = None,
    api_resource: options.ApiResource = None,
    env_file: options.EnvFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Forward what Logto sends to an application on this machine, and show its answers.

    It reads Logto's log, every two seconds, and signs again: no tunnel is needed, and nothing is
    changed at Logto. With --tunnel-command deliveries come at once, from a webhook that is removed
    in the end.
    """
    settings = options.settings(
        env_file,
        signing_key=signing_key,
        endpoint=endpoint,
        app_id=app_id,
        app_secret=app_secret,
        api_resource=api_resource,
    )
    wanted = ListenConfig(
        to=forward_to or settings.url_at(settings.port),
        key=settings.signing_keys[0] if settings.signing_key else secrets.token_urlsafe(24),
        key_is_ours=not settings.signing_key,
        hook=hook,
        since=parse_moment("--since", since, datetime.now(UTC)),
        tunnel=tunnel_command,
        repoint=repoint,
        count=count,
    )
    _check(wanted)
    shown = _Shown(as_json)
    ears = ListenCallbacks(shown.show, print_webhook, _go_on if yes else _ask)
    # Not on uvloop: there, the end of a tunnel's process isn't noticed while its pipes are open.
    if not asyncio.run(_until_stopped(settings, wanted, ears)):
        progress.stopped("Begin again with --since to have what comes meanwhile.")
    if shown.refused:
        raise typer.Exit(1)


async def _until_stopped(settings: Settings, wanted: ListenConfig, ears: ListenCallbacks) -> bool:
    """Listen; return False if a signal ended it, once all is given back."""
    loop = asyncio.get_running_loop()

    def ask(hook: Webhook) -> None:
        signals.default(loop, signal.SIGINT)  # else it would wait for the answer
        ears.ask(hook)
        signals.on_signal(loop, signal.SIGINT, listening.cancel)

    listening = asyncio.ensure_future(run(settings, wanted, replace(ears, ask=ask)))
    signals.on_stop(listening.cancel)
    await asyncio.wait([listening])
    if not listening.cancelled():
        listening.result()
    return not listening.cancelled()


def _check(wanted: ListenConfig) -> None:
    if wanted.tunnel is None and wanted.repoint is not None:
        raise SettingInvalid(name="--repoint", problem=f"it needs {_COMMAND}")
    if wanted.tunnel is not None and "{port}" not in wanted.tunnel:
        raise SettingInvalid(name=_COMMAND, problem="it doesn't say where {port} goes")
    for name, value in (("--hook", wanted.hook), ("--since", wanted.since)):
        if wanted.tunnel is not None and value is not None:
            raise SettingInvalid(name=name, problem=f"it is about the log, {_COMMAND} isn't")


def _go_on(hook: Webhook) -> None:
    """It was agreed to."""


def _ask(hook: Webhook) -> None:
    question = f"Change the URL of the webhook {hook.name!r} until this ends? {hook.url} gets"
    typer.confirm(f"{question} nothing meanwhile.", abort=True, err=True)


class _Shown:
    """Shows what was forwarded, a line each; notes whether some was `refused`."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._hints = Hints("--forward-to")
        self.refused = False

    def show(self, each: ForwardResult) -> None:
        """Print it, and once what to do about such an answer."""
        self.refused |= not _is_fine(each)
        if self._as_json:
            print(output.to_json(each), flush=True)
        else:
            output.print_line(_line(each))
        self._hints.tell(each.status)


def _is_fine(each: ForwardResult) -> bool:
    return each.status is not None and 200 <= each.status < 300


def _line(each: ForwardResult) -> Text:
    line = Text(
        f"{output.format_value('_at', each.occurred_at)}  {output.strip_controls(each.event):<31}  "
    )
    line.append(f"{output.strip_controls(each.subject) or '-':<24}  ")
    line.append(f"{output.strip_controls(each.call):<28}  ")
    line.append(each.problem or str(each.status), "green" if _is_fine(each) else "bold red")
    if each.status is not None and 300 <= each.status < 400:
        line.append(" a redirect: Logto would lose it", "red")
    return line.append(f"  after {each.took_ms} ms", "dim")
