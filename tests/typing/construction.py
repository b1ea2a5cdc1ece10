"""Making one, and what it answers."""

from __future__ import annotations

from typing import assert_type

import sqlalchemy as sa
from fastapi import APIRouter, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.routing import Route

from logto_webhooks import LogtoWebhooks, UserIsDeletedError, UserRow
from logto_webhooks.fastapi import router
from logto_webhooks.starlette import routes

by_url = LogtoWebhooks(signing_key="k", database_url="sqlite:///app.db", worker=False)
by_engine = LogtoWebhooks(signing_key="k", engine=sa.create_engine("sqlite:///app.db"))
by_async_engine = LogtoWebhooks(
    signing_key="k,older",
    engine=create_async_engine("postgresql+asyncpg://127.0.0.1/app"),
    path="/hooks/logto",
    schema="logto",
    endpoint="https://auth.example.com",
    app_id="app",
    app_secret="secret",
    api_budget=5,
    recover_every_s=60,
)
by_environment = LogtoWebhooks.from_env(path="/hooks/logto")

assert_type(router(by_url), APIRouter)
api = FastAPI()
api.include_router(router(by_url))
assert_type(routes(by_url), list[Route])
application = Starlette(routes=routes(by_url), lifespan=by_url.lifespan)
api.mount("/logto", by_engine)


async def early(session: AsyncSession, sync_session: Session) -> None:
    """A user of a token whom no webhook told of yet."""
    claims = {"sub": "ana", "email": "ana@example.com"}
    assert_type(await by_async_engine.ensure_user(claims), UserRow)
    assert_type(await by_async_engine.ensure_user(claims, session=session), UserRow)
    assert_type(await by_engine.ensure_user(claims, session=sync_session), UserRow)
    try:
        assert_type(await by_url.wait_for_user("ana", timeout_s=1), UserRow)
    except UserIsDeletedError as error:
        assert_type(str(error), str)
    assert_type((await by_url.status()).deliveries, dict[str, int])


def in_a_thread() -> str:
    """Beside the event loop."""
    row = by_url.call(by_url.ensure_user({"sub": "ana"}))
    assert_type(row, UserRow)
    return row.id
