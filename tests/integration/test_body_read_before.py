"""What else an application does with the webhook's body, before and after it is received."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from logto_webhooks import LogtoWebhooks
from logto_webhooks.fastapi import router
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.starlette import routes
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.mounted import on_sqlite

Build = Callable[[LogtoWebhooks], ASGIApp]
read: list[bytes] = []


@pytest.fixture(autouse=True)
def _nothing_read() -> None:
    read.clear()


async def _json(request: Request) -> None:
    await request.json()
    read.append(await request.body())


async def _after(request: Request) -> AsyncIterator[None]:
    yield
    read.append(await request.body())


async def _stream(request: Request) -> None:
    read.extend([chunk async for chunk in request.stream()])


def _with(dependency: Callable[..., object]) -> Build:
    def build(logto: LogtoWebhooks) -> ASGIApp:
        app = FastAPI()
        app.include_router(router(logto), dependencies=[Depends(dependency)])
        return app

    return build


def _route_class(logto: LogtoWebhooks) -> ASGIApp:
    """FastAPI's documented way to log bodies."""

    class Logged(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
            handle = super().get_route_handler()

            async def logged(request: Request) -> Response:
                read.append(await request.body())
                return await handle(request)

            return logged

    app = FastAPI()
    outer = APIRouter(route_class=Logged, lifespan=logto.lifespan)
    outer.post(logto.path)(logto.respond)
    app.include_router(outer)
    return app


class _Reads(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        read.append(await request.body())
        return await call_next(request)


def _starlette(logto: LogtoWebhooks) -> ASGIApp:
    """A function around the endpoint reads."""

    def logged(route: Route) -> Route:
        async def endpoint(request: Request) -> Response:
            read.append(await request.body())
            return await logto.respond(request)

        return Route(route.path, endpoint, methods=["POST"])

    return Starlette(routes=[logged(route) for route in routes(logto)], lifespan=logto.lifespan)


def _mounted(logto: LogtoWebhooks) -> ASGIApp:
    """The bare application behind Starlette's middleware."""
    return Starlette(
        routes=[Mount("/", app=logto)], lifespan=logto.lifespan, middleware=[Middleware(_Reads)]
    )


class _Spends(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        read.extend([chunk async for chunk in request.stream()])
        return await call_next(request)


class _SpendsSome:
    """Bare ASGI, which reads the first piece and passes on the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await receive()
        await self._app(scope, receive, send)


def _behind(middleware: Middleware, mounted: bool) -> Build:
    def build(logto: LogtoWebhooks) -> ASGIApp:
        app = FastAPI(middleware=[middleware])
        if mounted:
            app.mount("/", logto)
        else:
            app.include_router(router(logto))
        return app

    return build


async def _in_pieces(body: bytes) -> AsyncIterator[bytes]:
    yield body[:50]
    yield body[50:]


@asynccontextmanager
async def _client(logto: LogtoWebhooks, build: Build) -> AsyncIterator[httpx2.AsyncClient]:
    await logto.migrate()
    app = build(logto)
    transport = httpx2.ASGITransport(app=app)
    async with (
        logto.lifespan(),
        httpx2.AsyncClient(transport=transport, base_url="http://app") as client,
    ):
        yield client


async def _post(client: httpx2.AsyncClient, delivery: SignedRequest) -> httpx2.Response:
    headers = dict(delivery.headers)
    async with asyncio.timeout(5):
        return await client.post("/api/webhooks/logto", content=delivery.body, headers=headers)


@pytest.mark.parametrize(
    "build",
    [_with(_json), _with(_after), _route_class, _starlette, _mounted],
    ids=["json", "after", "route class", "starlette", "mounted"],
)
def test_others_may_read_the_body(build: Build, tmp_path: Path) -> None:
    """Before the webhook or after it: it is stored, and they see all of it."""

    async def run() -> None:
        logto = on_sqlite(tmp_path)
        async with _client(logto, build) as client:
            delivery = make.user_created()
            answer = await _post(client, delivery)
            assert answer.status_code == 200, answer.text
            assert read == [delivery.body]

    asyncio.run(run())


def test_a_body_that_was_read_before_is_bounded(tmp_path: Path) -> None:
    """As one that wasn't."""

    async def run() -> None:
        url = f"sqlite:///{tmp_path / 'app.db'}"
        logto = LogtoWebhooks(
            signing_key=SIGNING_KEY, engine=sa.create_engine(url), max_body_bytes=2**16
        )
        async with _client(logto, _with(_json)) as client:
            answer = await _post(client, make.user_created(name="x" * 2**16))
            assert (answer.status_code, answer.json()) == (413, {"error": "too_large"})

    asyncio.run(run())


def test_a_stream_that_is_spent_is_told_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With what to do about it."""

    async def run() -> None:
        async with _client(on_sqlite(tmp_path), _with(_stream)) as client:
            answer = await _post(client, make.user_created())
            assert (answer.status_code, answer.json()) == (503, {"error": "body_gone"})

    asyncio.run(run())
    assert "Change that code to await request.body()" in caplog.text


@pytest.mark.parametrize("middleware", [Middleware(_Spends), Middleware(_SpendsSome)])
@pytest.mark.parametrize("mounted", [False, True])
def test_a_body_of_which_less_is_left_than_was_announced_is_no_forgery(
    middleware: Middleware, mounted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A middleware read all of it, or a part."""

    async def run() -> None:
        async with _client(on_sqlite(tmp_path), _behind(middleware, mounted)) as client:
            delivery = make.user_created()
            headers = dict(delivery.headers) | {"content-length": str(len(delivery.body))}
            async with asyncio.timeout(5):
                answer = await client.post(
                    "/api/webhooks/logto", content=_in_pieces(delivery.body), headers=headers
                )
            assert (answer.status_code, answer.json()) == (503, {"error": "body_gone"})

    asyncio.run(run())
    assert "Change that code to await request.body()" in caplog.text


def test_a_middleware_that_keeps_the_body_is_a_suspect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When not a byte came in time."""
    monkeypatch.setattr("logto_webhooks.ingest.asgi.READ_S", 0.2)

    def build(logto: LogtoWebhooks) -> ASGIApp:
        inner = _starlette(logto)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await receive()

            async def silent() -> dict[str, object]:
                await asyncio.sleep(60)
                return {}

            await logto(scope, silent, send) if scope["type"] == "http" else await inner(
                scope, receive, send
            )

        return app

    async def run() -> None:
        async with _client(on_sqlite(tmp_path), build) as client:
            assert (await _post(client, make.user_created())).status_code == 408

    asyncio.run(run())
    assert "middleware has read the body" in caplog.text
