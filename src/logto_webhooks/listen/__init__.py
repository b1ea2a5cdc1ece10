"""`listen`: forward Logto's deliveries to a local application, from its log or through a tunnel."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx2
from msgspec import Struct

from logto_webhooks import server
from logto_webhooks.clock import SystemClock
from logto_webhooks.errors import AlreadyListening, LogtoUnreachable, WebhookChanged
from logto_webhooks.listen.forwarder import Forwarder, ForwardResult, describe_forward
from logto_webhooks.listen.log_reader import LogReader
from logto_webhooks.listen.tunnel import (
    PREFIX,
    PROBE_S,
    Lease,
    LeaseFolder,
    Relay,
    Tunnel,
    borrow_webhook,
    make_tunnel_app,
    probe_url,
    restore_leases,
)
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.logto.webhooks import Webhook, find_webhook, list_webhooks
from logto_webhooks.private_files import LockFile
from logto_webhooks.runtime import open_client
from logto_webhooks.settings import Settings
from logto_webhooks.validation import is_url, strip_url

FOLDER: Final = Path(".logto-webhooks")
WATCH_S: Final = 5.0


class ListenConfig(Struct, frozen=True, kw_only=True):
    """What to listen to, and where to forward it.

    Without a `tunnel` command, read the log of one `webhook` or of all, `since` a time (ms). With
    one, use a temporary webhook, or the one to `repoint`. `count` limits the deliveries.
    """

    to: str
    key: str
    is_new_key: bool = True  # made for this session, so it may be shown
    webhook: str | None = None
    since: int | None = None
    tunnel: str | None = None
    repoint: str | None = None
    count: int | None = None


class ListenCallbacks(Struct, frozen=True):
    """`show` gets each delivery, `tell` gets messages. `confirm` raises if a webhook's URL may not
    be changed."""

    show: Callable[[ForwardResult], None]
    tell: Callable[[str], None]
    confirm: Callable[[Webhook], None]


async def listen(settings: Settings, config: ListenConfig, callbacks: ListenCallbacks) -> None:
    """Forward until cancelled, or until `count` deliveries are forwarded.

    Raises AlreadyListening, NoEnabledWebhook, WebhookChanged, WebhookUnknown, TunnelFailed,
    SettingInvalid, ApiNotConfigured, LogtoUnreachable, LogtoApiError.
    """
    async with open_client(settings) as logto:
        with _lock_folder() as is_locked:
            if not is_locked:
                what = "runs in this folder, and both would forward each delivery"
                raise AlreadyListening(what=what, instead="in another folder")
            await restore_leases(logto, _endpoint(settings), LeaseFolder(FOLDER), callbacks.tell)
            async with Forwarder(config.to, config.key) as forwarder:
                if config.tunnel is None:
                    await _forward_log(logto, forwarder, config, callbacks)
                else:
                    await _forward_tunnel(
                        settings, logto, forwarder, config, config.tunnel, callbacks
                    )


async def restore_webhooks(settings: Settings, tell: Callable[[str], None]) -> None:
    """Undo the changes in Logto of a killed `listen` in this folder, unless another one runs.

    Raises ApiNotConfigured, LogtoUnreachable, LogtoApiError.
    """
    leases = LeaseFolder(FOLDER)
    if leases.read_all():
        async with open_client(settings) as logto:
            with _lock_folder() as is_locked:
                if is_locked:
                    await restore_leases(logto, _endpoint(settings), leases, tell)


async def _forward_log(
    logto: ManagementClient, forwarder: Forwarder, config: ListenConfig, callbacks: ListenCallbacks
) -> None:
    reader = LogReader(logto, SystemClock(), callbacks.tell, config.webhook, config.since)
    forwarded, begin = 0, await reader.begin()
    _tell_ready(config, callbacks)
    async with aclosing(reader.deliveries(begin)) as deliveries:
        async for delivery in deliveries:
            callbacks.show(describe_forward(delivery, await forwarder.forward(delivery.body)))
            forwarded += 1
            if forwarded == config.count:
                return


def _tell_ready(config: ListenConfig, callbacks: ListenCallbacks) -> None:
    key = f"the key {config.key}" if config.is_new_key else "your signing key"
    callbacks.tell(
        f"Forwarding to {strip_url(config.to)}, signed with {key}. Press Ctrl-C to stop."
    )


async def _forward_tunnel(
    settings: Settings,
    logto: ManagementClient,
    forwarder: Forwarder,
    config: ListenConfig,
    command: str,
    callbacks: ListenCallbacks,
) -> None:
    session = PREFIX + secrets.token_hex(8)
    webhook = None if config.repoint is None else await _find(logto, config.repoint, callbacks)
    relay = Relay(forwarder.forward, SystemClock(), callbacks.show, config.count)
    app = make_tunnel_app(relay.take, session, settings.max_body_bytes)
    async with _serve(app) as port, Tunnel(command, port, session) as tunnel:
        url = await tunnel.find_url() + forwarder.path
        lease = Lease(endpoint=_endpoint(settings), session=session)
        if webhook is not None:
            lease = Lease(
                endpoint=lease.endpoint,
                session=session,
                webhook=webhook.id,
                url=webhook.url,
                lent=url,
            )
        leases = LeaseFolder(FOLDER)
        async with borrow_webhook(logto, leases, lease, webhook, url, callbacks.tell) as borrowed:
            relay.open(borrowed.signing_key)
            callbacks.tell(
                f"The webhook {borrowed.name!r} sends to this machine through {url} until you stop."
            )
            _tell_ready(config, callbacks)
            await _wait_first(tunnel.wait(), relay.enough.wait(), _watch(logto, borrowed))


async def _find(logto: ManagementClient, repoint: str, callbacks: ListenCallbacks) -> Webhook:
    """Find the webhook to repoint, unless another `listen` uses it, and ask for confirmation."""
    webhook = find_webhook((await list_webhooks(logto))[0], repoint)
    mark = None
    if is_url(webhook.url):  # Logto accepts any text
        async with httpx2.AsyncClient(timeout=PROBE_S) as client:
            url = httpx2.URL(webhook.url)
            mark = await probe_url(client, f"{url.scheme}://{url.netloc.decode()}")
    if mark is not None and mark.startswith(PREFIX):
        what = f"uses the webhook {webhook.name} ({webhook.shown_url})"
        raise AlreadyListening(what=what, instead="without --repoint")
    callbacks.confirm(webhook)
    return webhook


async def _watch(logto: ManagementClient, borrowed: Webhook) -> None:
    """Check the webhook regularly. Raises WebhookChanged, LogtoApiError."""
    while True:
        await asyncio.sleep(WATCH_S)
        with contextlib.suppress(LogtoUnreachable):
            webhooks = {webhook.id: webhook for webhook in (await list_webhooks(logto))[0]}
            webhook = webhooks.get(borrowed.id)
            if webhook is None or not webhook.enabled:
                raise WebhookChanged(name=borrowed.name, what="deleted or disabled")
            if webhook.url != borrowed.url:
                raise WebhookChanged(name=borrowed.name, what="pointed elsewhere")


async def _wait_first(*coroutines: Coroutine[Any, Any, Any]) -> None:
    """Wait until one ends or raises, and cancel the others."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@asynccontextmanager
async def _serve(app: Any) -> AsyncIterator[int]:
    listener = server.listen("127.0.0.1", 0)
    running = server.Server(app, listener)
    serving = asyncio.create_task(running.serve())
    try:
        yield listener.getsockname()[1]
    finally:
        running.stop()
        await serving


@contextlib.contextmanager
def _lock_folder() -> Iterator[bool]:
    """Lock the folder during the block; yield False if another `listen` has locked it."""
    LeaseFolder(FOLDER).create()
    lock = LockFile(FOLDER / "lock")
    try:
        yield lock.acquire()
    finally:
        lock.release()


def _endpoint(settings: Settings) -> str:
    return (settings.endpoint or "").rstrip("/")
