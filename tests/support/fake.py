"""What asks a FakeLogto: a service, an application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any, Final

import httpx2
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.clock import SystemClock
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.errors import LogtoUnreachable
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.logto.errors import ApiReply
from logto_webhooks.testing import FrozenClock
from logto_webhooks.testing.fake import FakeLogto
from logto_webhooks.testing.fake.app import serve
from tests.support import postgres
from tests.support.service import PATH, Service
from tests.support.stores import StoreKind, open_host

_FORWARDED: Final = ("content-type", "total-number")
NOBODY: Final = f"http://127.0.0.1:9{PATH}"


def credentials(logto: FakeLogto) -> dict[str, str]:
    """The settings with which a command asks it, and accepts what it sends."""
    return {
        "LOGTO_ENDPOINT": logto.url,
        "LOGTO_M2M_APP_ID": logto.app_id,
        "LOGTO_M2M_APP_SECRET": logto.app_secret,
        "LOGTO_WEBHOOK_SIGNING_KEY": logto.signing_key,
        "LOGTO_WEBHOOKS_API_BUDGET": "1000",
    }


@asynccontextmanager
async def serving(folder: Path, logto: FakeLogto, **given: str) -> AsyncIterator[Service]:
    """`serve` with credentials, beside the event loop on which the Logto answers.

    It compares all records only if that is `given`.
    """
    given = credentials(logto) | {"LOGTO_WEBHOOKS_RECONCILE_EVERY_S": "0"} | given
    service = await asyncio.to_thread(Service, folder, port=0, **given)
    await asyncio.to_thread(service.__enter__)
    try:
        yield service
    finally:
        await asyncio.to_thread(service.__exit__, None, None, None)


class _ClockOf:
    """The clock of a Logto."""

    def __init__(self, logto: FakeLogto) -> None:
        self.ahead_ms = 0
        self.now = logto._now


@asynccontextmanager
async def asking(
    logto: FakeLogto, cls: type[ManagementClient] = ManagementClient
) -> AsyncIterator[ManagementClient]:
    """A client of its API that has no budget to mind, on Logto's own clock."""
    clock = _ClockOf(logto)
    api = cls(logto.url, logto.app_id, logto.app_secret, now=clock, budget=100_000)
    try:
        yield api
    finally:
        await api.close()


@asynccontextmanager
async def proxy_of(
    logto: FakeLogto,
    ahead_ms: Callable[[], int] = lambda: 0,
    alter: Callable[[str, Any], Any] = lambda path, content: content,
) -> AsyncIterator[str]:
    """A proxy that tells the Date by a clock of its own, and alters what it answers; gives its
    address."""

    async def forward(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        url = f"{logto.url}{scope['raw_path'].decode()}?{scope['query_string'].decode()}"
        headers = {
            name: value for name, value in request.headers.items() if name not in ("host", "date")
        }
        answer = await http.request(
            request.method, url, headers=headers, content=await request.body()
        )
        kept = {name: answer.headers[name] for name in _FORWARDED if name in answer.headers}
        date = time.time() + ahead_ms() / 1000
        kept["date"] = formatdate(date, usegmt=True)
        content = answer.content
        if "json" in kept.get("content-type", ""):
            content = msgspec.json.encode(alter(scope["path"], answer.json()))
        await Response(content, answer.status_code, kept)(scope, receive, send)

    async with httpx2.AsyncClient() as http, serve(forward, 0) as address:
        yield address


@asynccontextmanager
async def behind_proxy(
    logto: FakeLogto, ahead_ms: Callable[[], int]
) -> AsyncIterator[ManagementClient]:
    """A client that asks through such a proxy."""
    async with proxy_of(logto, ahead_ms) as url:
        api = ManagementClient(
            url, logto.app_id, logto.app_secret, now=SystemClock(), budget=100_000
        )
        try:
            yield api
        finally:
            await api.close()


@asynccontextmanager
async def mirroring(
    kind: StoreKind, folder: Path, cls: type[ManagementClient] = ManagementClient
) -> AsyncIterator[tuple[TransactionRunner, FrozenClock, FakeLogto, ManagementClient]]:
    """An empty database, a Logto whose clock stands still, and a client of it."""
    host, clock = open_host(kind, folder), FrozenClock()
    async with FakeLogto(now=clock.now) as logto, asking(logto, cls) as api:
        yield host, clock, logto, api
    await host.close()


def application(kind: str, folder: Path, fake: FakeLogto) -> LogtoWebhooks:
    """One that asks it, and has a handler that fails."""
    url, schema = f"sqlite:///{folder / 'app.db'}", None
    if kind == "postgres":
        url = postgres.server_url().render_as_string(hide_password=False)
        schema = postgres.emptied_schema()
    logto = LogtoWebhooks(
        signing_key=fake.signing_key,
        database_url=url,
        schema=schema,
        endpoint=fake.url,
        app_id=fake.app_id,
        app_secret=fake.app_secret,
        recover_every_s=3600,
        reconcile_every_s=0,
        api_budget=1000.0,
        public_url=NOBODY,
    )

    @logto.on(events.UserDataUpdated, name="breaks", max_attempts=1)
    def breaks(event: events.UserDataUpdated) -> None:
        raise ValueError

    return logto


class Refusing(ManagementClient):
    """A client to which Logto refuses everything that is about some records, or everything. About
    those that are `silent`, it never answers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refused: set[str] = set()
        self.silent: set[str] = set()
        self.error: Exception = LogtoUnreachable(endpoint="e", problem="it answers 500")
        self.asked: list[str] = []

    async def _ask(self, path: str, **params: int) -> ApiReply:
        self.asked.append(path)
        if any(f"/{refused}" in path for refused in self.refused):
            raise self.error
        if any(f"/{silent}" in path for silent in self.silent):
            await asyncio.Event().wait()
        return await super()._ask(path, **params)
