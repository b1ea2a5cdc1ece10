"""One session of `listen`: by Logto's log, or through a tunnel."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx2
from msgspec import Struct

from logto_webhooks import server
from logto_webhooks.clock import SystemClock
from logto_webhooks.errors import AlreadyListening, LogtoUnreachable, WebhookChanged
from logto_webhooks.files import LockFile
from logto_webhooks.listen import temporary_webhook
from logto_webhooks.listen.forwarder import Forwarder
from logto_webhooks.listen.log_reader import ForwardResult, LogReader, describe_forward
from logto_webhooks.listen.temporary_webhook import LeaseFolder
from logto_webhooks.listen.tunnel import ASKED_S, PROBE, Relay, Tunnel, ask_url, make_tunnel_app
from logto_webhooks.logto.webhooks import Webhook, find_webhook, list_webhooks, subscription
from logto_webhooks.runtime import make_client
from logto_webhooks.settings import Settings

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

FOLDER: Final = Path(".logto-webhooks")
WATCH_S: Final = 5.0


class ListenConfig(Struct, frozen=True, kw_only=True):
    """What to listen to, and where it goes.

    Without a `tunnel` command, the log of one `hook`, or of all, `since` (ms) a moment. With one,
    a webhook of its own, or the one to `repoint`. `count` is after how many it ends.
    """

    to: str
    key: str
    key_is_ours: bool = True  # it was made up for this session, so it may be shown
    hook: str | None = None
    since: int | None = None
    tunnel: str | None = None
    repoint: str | None = None
    count: int | None = None


class ListenCallbacks(Struct, frozen=True):
    """Who is told, line by line, and of what else happens; `ask` raises if a webhook's URL may
    not be changed."""

    show: Callable[[ForwardResult], None]
    tell: Callable[[str], None]
    ask: Callable[[Webhook], None]


async def listen(settings: Settings, wanted: ListenConfig, ears: ListenCallbacks) -> None:
    """Forward until cancelled, or until it is enough.

    Raises AlreadyListening, NoEnabledWebhook, WebhookChanged, WebhookUnknown,
    TunnelFailed, SettingInvalid, ApiNotConfigured, LogtoUnreachable, LogtoApiError.
    """
    async with _asking(settings) as logto, _held() as held:
        if not held:
            what = "runs in this folder, and each forwards all"
            raise AlreadyListening(what=what, instead="in a folder of its own")
        await temporary_webhook.restore_leases(
            logto, _endpoint(settings), LeaseFolder(FOLDER), ears.tell
        )
        async with Forwarder(wanted.to, wanted.key) as forwarder:
            if wanted.tunnel is None:
                await _by_log(logto, forwarder, wanted, ears)
            else:
                await _by_tunnel(settings, logto, forwarder, wanted, wanted.tunnel, ears)


async def restore_webhooks(settings: Settings, tell: Callable[[str], None]) -> None:
    """Give back what a `listen` that was killed in this folder left at Logto, unless one runs.

    Raises ApiNotConfigured, LogtoUnreachable, LogtoApiError.
    """
    notes = LeaseFolder(FOLDER)
    if notes.all():
        async with _asking(settings) as logto, _held() as held:
            if held:
                await temporary_webhook.restore_leases(logto, _endpoint(settings), notes, tell)


async def _by_log(
    logto: ManagementClient, forwarder: Forwarder, wanted: ListenConfig, ears: ListenCallbacks
) -> None:
    reader = LogReader(logto, SystemClock(), ears.tell, wanted.hook, wanted.since)
    shown, begin = 0, await reader.begin()
    _ready(wanted, ears)
    async with aclosing(reader.deliveries(begin)) as coming:
        async for entry in coming:
            ears.show(describe_forward(entry, await forwarder.forward(entry.body)))
            shown += 1
            if shown == wanted.count:
                return


def _ready(wanted: ListenConfig, ears: ListenCallbacks) -> None:
    key = f"the key {wanted.key}" if wanted.key_is_ours else "the signing key that is set"
    ears.tell(f"Forwarding to {wanted.to}, signed with {key}; Ctrl-C ends.")


async def _by_tunnel(
    settings: Settings,
    logto: ManagementClient,
    forwarder: Forwarder,
    wanted: ListenConfig,
    command: str,
    ears: ListenCallbacks,
) -> None:
    session = temporary_webhook.PREFIX + secrets.token_hex(8)
    hook = await _chosen(logto, wanted, ears)
    relay = Relay(forwarder.forward, SystemClock(), ears.show, wanted.count)
    app = make_tunnel_app(relay.take, PROBE, session, settings.max_body_bytes)
    async with _served(app) as port, Tunnel(command, port, session) as tunnel:
        url = await tunnel.url() + forwarder.path
        async with _borrowed(settings, logto, session, hook, url, ears) as lent:
            relay.open(lent.signing_key)
            ears.tell(f"The webhook {lent.name!r} leads here by {url} until this ends.")
            _ready(wanted, ears)
            await _first(tunnel.ended(), relay.enough.wait(), _watch(logto, lent))


async def _chosen(
    logto: ManagementClient, wanted: ListenConfig, ears: ListenCallbacks
) -> Webhook | None:
    """The webhook to repoint, if there is to be one."""
    if wanted.repoint is None:
        return None
    hook = find_webhook((await list_webhooks(logto))[0], wanted.repoint)
    async with httpx2.AsyncClient(timeout=ASKED_S) as client:
        url = httpx2.URL(hook.url)
        mark = await ask_url(client, f"{url.scheme}://{url.netloc.decode()}")
    if mark is not None and mark.startswith(temporary_webhook.PREFIX):
        what = f"has the webhook {hook.name} lead to {hook.url}"
        raise AlreadyListening(what=what, instead="without --repoint")
    ears.ask(hook)
    return hook


def _borrowed(
    settings: Settings,
    logto: ManagementClient,
    session: str,
    hook: Webhook | None,
    url: str,
    ears: ListenCallbacks,
) -> AbstractAsyncContextManager[Webhook]:
    notes, endpoint = LeaseFolder(FOLDER), _endpoint(settings)
    if hook is None:
        note = temporary_webhook.Lease(endpoint=endpoint, session=session)
        return temporary_webhook.temporary_webhook(
            logto, notes, note, url, subscription(["*"]), ears.tell
        )
    note = temporary_webhook.Lease(
        endpoint=endpoint, session=session, hook=hook.id, url=hook.url, lent=url
    )
    return temporary_webhook.repointed_webhook(logto, notes, note, hook, ears.tell)


async def _watch(logto: ManagementClient, lent: Webhook) -> None:
    """Look after the webhook. Raises WebhookChanged, LogtoApiError."""
    while True:
        await asyncio.sleep(WATCH_S)
        with contextlib.suppress(LogtoUnreachable):
            found = {webhook.id: webhook for webhook in (await list_webhooks(logto))[0]}
            there = found.get(lent.id)
            if there is None or not there.enabled:
                raise WebhookChanged(name=lent.name, what="deleted or disabled")
            if there.url != lent.url:
                raise WebhookChanged(name=lent.name, what="pointed elsewhere")


async def _first(*works: Coroutine[Any, Any, Any]) -> None:
    """Wait until one ends, or raises; end the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        over, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in over:
        task.result()


@contextlib.asynccontextmanager
async def _served(app: Any) -> AsyncIterator[int]:
    listener = server.listen("127.0.0.1", 0)
    running = server.Server(app, listener)
    serving = asyncio.create_task(running.serve())
    try:
        yield listener.getsockname()[1]
    finally:
        running.stop()
        await serving


@contextlib.asynccontextmanager
async def _asking(settings: Settings) -> AsyncIterator[ManagementClient]:
    logto = make_client(settings)
    try:
        yield logto
    finally:
        await logto.close()


@contextlib.asynccontextmanager
async def _held() -> AsyncIterator[bool]:
    """Whether this is the only one that listens in this folder, as long as the block lasts."""
    LeaseFolder(FOLDER).make()
    lock = LockFile(FOLDER / "lock")
    try:
        yield lock.acquire()
    finally:
        lock.release()


def _endpoint(settings: Settings) -> str:
    return (settings.endpoint or "").rstrip("/")
