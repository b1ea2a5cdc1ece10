"""An application that mounts the package, with its lifespan, and who sends to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Unpack

import httpx2
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import create_async_engine

from logto_webhooks import LogtoWebhooks
from logto_webhooks.fastapi import router
from logto_webhooks.jobs import JobFilter, JobRow
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.settings import MountedSettings
from logto_webhooks.testing import SIGNING_KEY
from tests.support import postgres
from tests.support.waiting import eventually

Body = Callable[[LogtoWebhooks, httpx2.AsyncClient], Awaitable[None]]


def soon() -> int:
    """A moment after the installation: what is older runs no handlers."""
    return time.time_ns() // 1_000_000 + 1_000


def on_sqlite(folder: Path, **settings: Unpack[MountedSettings]) -> LogtoWebhooks:
    return LogtoWebhooks(
        signing_key=SIGNING_KEY,
        engine=sa.create_engine(f"sqlite:///{folder / 'app.db'}"),
        **settings,
    )


def on_postgres() -> LogtoWebhooks:
    schema = postgres.emptied_schema()
    engine = create_async_engine(postgres.server_url().set(drivername="postgresql+asyncpg"))
    return LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)


def live(logto: LogtoWebhooks, body: Body) -> None:
    """Mount it in FastAPI, with its lifespan, and send to it."""

    async def run() -> None:
        await logto.migrate()
        app = FastAPI()
        app.include_router(router(logto))
        transport = httpx2.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://app") as client,
        ):
            await body(logto, client)
        engine = logto._engine
        if isinstance(engine, sa.Engine):
            engine.dispose()
        elif engine is not None:
            await engine.dispose()

    asyncio.run(run())


async def send(client: httpx2.AsyncClient, *deliveries: SignedRequest) -> None:
    for each in deliveries:
        answer = await client.post(
            "/api/webhooks/logto", content=each.body, headers=dict(each.headers)
        )
        assert answer.status_code == 200, answer.text


async def jobs(logto: LogtoWebhooks) -> list[JobRow]:
    return await logto.database.host.read(lambda store: store.jobs.find(JobFilter(limit=1000)))


async def until(holds: Callable[[list[JobRow]], bool], logto: LogtoWebhooks) -> list[JobRow]:
    return await eventually(lambda: jobs(logto), holds)


def all_over(count: int) -> Callable[[list[JobRow]], bool]:
    return lambda rows: len(rows) == count and all(each.state != "waiting" for each in rows)
