"""Plain handlers run beside the event loop, whatever they ask for."""

from __future__ import annotations

import threading

import httpx2
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, live, send, soon, until


class Own(Session):
    """A subclass, as an application or SQLModel has it."""


def test_a_session_of_an_asynchronous_engine_is_used_in_a_thread() -> None:
    """A plain handler with one blocks no event loop; what it writes commits with "done"."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
    threads: list[str] = []

    @logto.on("User.Created", name="plain", max_attempts=1)
    def plain(event: events.UserCreated, session: Own) -> None:
        assert type(session) is Own
        assert session.scalar(sa.text("SELECT 1")) == 1
        threads.append(threading.current_thread().name)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="u", at=soon()))
        assert [each.state for each in await until(all_over(1), logto)] == ["done"]

    live(logto, body)
    assert threads == ["logto-handler"]
