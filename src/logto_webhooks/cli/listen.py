"""Local development: `listen`."""

from __future__ import annotations

import asyncio
import secrets
import signal
from typing import Annotated, Final

import typer
from msgspec.structs import replace
from rich.text import Text
from typer import Exit, Option

from logto_webhooks import event_loop
from logto_webhooks import listen as listening
from logto_webhooks.cli import output
from logto_webhooks.cli.options import LOGTO_API, AsJson, ExitAfter, parse_moment, with_settings
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.listen import ListenCallbacks, ListenConfig
from logto_webhooks.listen.forwarder import ForwardResult
from logto_webhooks.logto.webhooks import Webhook
from logto_webhooks.settings import Settings

_COMMAND: Final = "--tunnel-command"


@with_settings("signing_key", *LOGTO_API)
def listen(
    settings: Settings,
    forward_to: Annotated[
        str | None, Option(help="The URL to forward to. Default: `serve` on this machine.")
    ] = None,
    webhook: Annotated[
        str | None, Option(help="Read only the log of this webhook: its ID, name or URL.")
    ] = None,
    since: Annotated[
        str | None,
        Option(help="Start at this time (2026-11-24T08:00Z), or this long ago (90m, 36h, 7d)."),
    ] = None,
    tunnel_command: Annotated[
        str | None,
        Option(
            help="Use a tunnel and a temporary webhook. This command must open the tunnel to the "
            "local port {port} and print its URL."
        ),
    ] = None,
    repoint: Annotated[
        str | None,
        Option(
            help="With a tunnel, change the URL of this webhook until the end, instead of creating "
            "a webhook."
        ),
    ] = None,
    yes: Annotated[
        bool, Option("--yes", help="Don't ask for confirmation before --repoint.")
    ] = False,
    count: ExitAfter = None,
    as_json: AsJson = False,
) -> None:
    """Forward Logto's webhooks to an application on localhost.

    It reads Logto's log every two seconds and signs each body again, so you need no tunnel, and
    nothing changes in Logto. With --tunnel-command, deliveries arrive immediately, through a
    temporary webhook.
    """
    config = ListenConfig(
        to=forward_to or settings.url_at(settings.port),
        key=settings.signing_keys[0] if settings.signing_key else secrets.token_urlsafe(24),
        is_new_key=not settings.signing_key,
        webhook=webhook,
        since=parse_moment("--since", since),
        tunnel=tunnel_command,
        repoint=repoint,
        count=count,
    )
    _check(config)
    printer = _Printer(as_json)
    callbacks = ListenCallbacks(printer.show, output.note, (lambda _: None) if yes else _confirm)
    # Not on uvloop, which doesn't notice the end of a tunnel's process while its pipes are open.
    if not asyncio.run(_run_until_stopped(settings, config, callbacks)):
        output.stop("Run it again with --since to get deliveries sent in the meantime.")
    if printer.has_failed:
        raise Exit(1)


async def _run_until_stopped(
    settings: Settings, config: ListenConfig, callbacks: ListenCallbacks
) -> bool:
    """Listen and clean up. Return False if a signal stopped it."""
    loop = asyncio.get_running_loop()

    def confirm(webhook: Webhook) -> None:
        event_loop.reset_signal(loop, signal.SIGINT)  # otherwise, Ctrl-C would wait for the answer
        callbacks.confirm(webhook)
        event_loop.on_signal(loop, signal.SIGINT, task.cancel)

    listener = listening.listen(settings, config, replace(callbacks, confirm=confirm))
    task = asyncio.ensure_future(listener)
    event_loop.on_stop(task.cancel)
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return not task.cancelled()


def _check(config: ListenConfig) -> None:
    if config.tunnel is None and config.repoint is not None:
        raise SettingInvalid(name="--repoint", problem=f"it needs {_COMMAND}")
    if config.tunnel is not None and "{port}" not in config.tunnel:
        raise SettingInvalid(name=_COMMAND, problem="it must contain {port}")
    for name, value in (("--webhook", config.webhook), ("--since", config.since)):
        if config.tunnel is not None and value is not None:
            raise SettingInvalid(name=name, problem=f"it has no effect with {_COMMAND}")


def _confirm(webhook: Webhook) -> None:
    question = f"Change the URL of the webhook {webhook.name!r} until this command ends?"
    typer.confirm(
        f"{question} Until then, {webhook.shown_url} gets no deliveries.", abort=True, err=True
    )


class _Printer:
    """Prints a line for each forwarded delivery, and remembers whether any failed."""

    def __init__(self, as_json: bool) -> None:
        self.has_failed = False
        self._as_json = as_json
        self._statuses: set[int | None] = set()

    def show(self, result: ForwardResult) -> None:
        """Print a result. Print the hint for a status, if there is one, the first time."""
        self.has_failed |= not _is_success(result)
        if self._as_json:
            print(output.to_json(result), flush=True)
        else:
            output.print_line(_format(result))
        if result.status not in self._statuses:
            self._statuses.add(result.status)
            output.show_hint(result.status, "--forward-to")


def _is_success(result: ForwardResult) -> bool:
    return result.status is not None and 200 <= result.status < 300


def _format(result: ForwardResult) -> Text:
    moment = output.format_time(result.occurred_at)
    line = Text(f"{moment}  {output.strip_controls(result.event):<31}  ")
    line.append(f"{output.strip_controls(result.subject) or '-':<24}  ")
    line.append(f"{output.strip_controls(result.call):<28}  ")
    style = "green" if _is_success(result) else "bold red"
    line.append(result.problem or str(result.status), style)
    if result.status is not None and 300 <= result.status < 400:
        line.append(" a redirect: Logto would lose this delivery", "red")
    return line.append(f"  after {result.took_ms} ms", "dim")
