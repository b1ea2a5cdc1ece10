"""A healthy system, whole and small, for faults to be put into; and servers that answer wrongly."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import sqlalchemy as sa
from msgspec import Struct
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.admin import Admin
from logto_webhooks.doctor.faults import Finding, Level
from logto_webhooks.settings import from_env
from logto_webhooks.testing.fake import FakeLogto
from logto_webhooks.testing.fake.app import serve
from tests.support.service import PATH
from tests.support.waiting import eventually

RARE: Final = "Scope.Deleted"
OTHER_KEY: Final = "another-key-that-no-webhook-has-1"
NEIGHBOUR: Final = "http://user:hush@127.0.0.1:9/?token=hush"  # another's webhook
# Made for these tests, good for a hundred years or for one: an authority, and whom it knows.
TLS: Final = Path(__file__).parent / "tls"


class Clinic(Struct):
    """A Logto, an application that it sends to, and a webhook between them."""

    folder: Path
    logto: FakeLogto
    app: LogtoWebhooks
    url: str
    webhook: str
    settings: dict[str, Any]

    async def ask(self, *only: str, engine: Any = None, **how: Any) -> list[Finding]:
        """Examine it, with other settings than its own if they are named."""
        options = {name: how.pop(name) for name in _OPTIONS & how.keys()}
        operations = Admin(lambda: from_env({}, **self.settings | how), engine)
        operations.handlers = self.app.handlers
        try:
            return await operations.diagnose(only, **options)
        finally:
            await operations.close()

    @contextmanager
    def changed(self, **fields: Any) -> Iterator[None]:
        """A time in which Logto's webhook is another."""
        [webhook] = [each for each in self.logto.hooks if each["id"] == self.webhook]
        before = {name: webhook[name] for name in fields}
        self.logto.change_hook(self.webhook, **fields)
        try:
            yield
        finally:
            self.logto.change_hook(self.webhook, **before)

    def sql(self, statement: str, file: str = "app.db") -> None:
        """Change the database beside the product."""
        engine = sa.create_engine(f"sqlite:///{self.folder / file}")
        with engine.begin() as connection:
            connection.execute(sa.text(statement))
        engine.dispose()

    async def another(self, *changed: str) -> dict[str, Any]:
        """The settings of a database of its own, in which only the handlers are known."""
        file = f"another-{next(_numbers)}.db"
        database_url = f"sqlite:///{self.folder / file}"
        operations = Admin(lambda: from_env({}, **self.settings | {"database_url": database_url}))
        await operations.migrate()
        known = [each.registered for each in self.app.handlers]
        await operations.database.host.run(lambda store: store.jobs.register(known))
        await operations.close()
        for statement in changed:
            self.sql(statement, file)
        return {"database_url": database_url}


_numbers = itertools.count()
_OPTIONS: Final = {"timeout_s", "least_free_mb", "application", "read_map_file"}


def settings_of(folder: Path, logto: FakeLogto) -> dict[str, Any]:
    return {
        "signing_key": logto.signing_key,
        "database_url": f"sqlite:///{folder / 'app.db'}",
        "endpoint": logto.url,
        "app_id": logto.app_id,
        "app_secret": logto.app_secret,
        "api_budget": 1000.0,
        "reconcile_every_s": 0,
    }


@asynccontextmanager
async def clinic(folder: Path, *, ahead_ms: int = 0, **given: Any) -> AsyncIterator[Clinic]:
    """All is well, but for a clock of Logto's that may be ahead; settings may be `given`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(TLS / "other.pem"))  # to load all authorities takes long
        async with _healthy(folder, ahead_ms, given) as healthy:
            yield healthy


@asynccontextmanager
async def _healthy(folder: Path, ahead_ms: int, given: dict[str, Any]) -> AsyncIterator[Clinic]:
    async with FakeLogto(now=lambda: time.time_ns() // 1_000_000 + ahead_ms) as logto:
        settings = settings_of(folder, logto) | given
        app = LogtoWebhooks(**settings)

        @app.on(events.UserCreated, name="greet", max_attempts=1)
        def greet(event: events.UserCreated) -> None:
            if event.user and event.user.username == "bad":
                raise ValueError

        @app.on(events.RoleCreated, name="audit")
        def audit(event: events.RoleCreated) -> None: ...

        async with serve(app, 0) as origin:
            webhook = logto.add_hook(f"{origin}{PATH}", name="the webhook")["id"]
            logto.add_hook(NEIGHBOUR, signing_key="hush", name="a neighbour", events=[RARE])
            async with app.lifespan():
                logto.create_user(primaryEmail="ana@example.com")
                await logto.settle()
                await eventually(app.status, lambda found: found.deliveries["done"] == 1)
                await eventually(app.status, lambda found: found.complete_up_to is not None)
                yield Clinic(folder, logto, app, f"{origin}{PATH}", webhook, settings)


def bad(findings: list[Finding]) -> set[str]:
    """The codes of what isn't well."""
    return {each.code for each in findings if each.level in (Level.WARNING, Level.BROKEN)}


@asynccontextmanager
async def answering(status: int, after_s: float = 0, **headers: str) -> AsyncIterator[str]:
    """A server that says the same to all; gives the webhook's URL there."""
    answer = Response("{}", status, headers)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(after_s)
        await answer(scope, receive, send)

    async with _at(app) as url:
        yield url


@asynccontextmanager
async def refusing(after_s: float) -> AsyncIterator[str]:
    """One that answers as ours does, but late."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(after_s)
        await Response('{"error": "invalid_signature"}', 401)(scope, receive, send)

    async with _at(app) as url:
        yield url


@asynccontextmanager
async def breaking(tls: str | None = None) -> AsyncIterator[str]:
    """One that hangs up, after it showed a certificate of that name."""
    context = None
    if tls is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(TLS / f"{tls}.pem")

    def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"http{'s' if tls else ''}://127.0.0.1:{port}{PATH}"


@asynccontextmanager
async def _at(app: ASGIApp) -> AsyncIterator[str]:
    async with serve(app, 0) as origin:
        yield f"{origin}{PATH}"


class Ill(Struct, frozen=True):
    """A fault: puts itself in, and asks. One that stays needs a system of its own."""

    codes: set[str]
    stays: bool
    examine: Callable[[Clinic], Coroutine[Any, Any, list[Finding]]]


Examine = Callable[[Clinic], Coroutine[Any, Any, list[Finding]]]


def ills() -> tuple[dict[str, Ill], Callable[..., Callable[[Examine], Examine]]]:
    """A collection of faults by name, and what adds one with the codes that must be found."""
    known: dict[str, Ill] = {}

    def finds(*codes: str, stays: bool = False) -> Callable[[Examine], Examine]:
        def add(examine: Examine) -> Examine:
            known[examine.__name__] = Ill(set(codes), stays, examine)
            return examine

        return add

    return known, finds
