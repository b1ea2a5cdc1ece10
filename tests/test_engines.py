"""The application's own engine, whatever it is set to, and whatever a handler does on it."""

from __future__ import annotations

import asyncio

import httpx2
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, live, send, soon, until


def test_what_a_handler_left_on_its_connection_is_in_no_other_transaction() -> None:
    """One who uses its session several times at once breaks that connection alone: asyncpg's
    can't be rolled back while it is used, and the next to have it would fail for ever."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)

    @logto.on("User.Created", name="careless", max_attempts=1)
    async def careless(event: events.UserCreated, session: AsyncSession) -> None:
        await asyncio.gather(*(session.execute(sa.text("SELECT pg_sleep(0.1)")) for _ in range(3)))

    @logto.on("User.Deleted", name="good", max_attempts=1)
    async def good(event: events.UserDeleted, connection: AsyncConnection) -> None: ...

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, *(make.user_created(id=f"u{each}", at=soon()) for each in range(5)))
        await until(all_over(5), logto)
        await send(client, *(make.user_deleted(id=f"u{each}", at=soon()) for each in range(5)))
        rows = await until(all_over(10), logto)
        states = {(each.handler, each.state) for each in rows}
        assert states == {("careless", "dead"), ("good", "done")}

    live(logto, body)
