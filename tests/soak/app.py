"""The application that the soak serves: a good handler, and one that misbehaves."""

from __future__ import annotations

import asyncio
import sys
import time

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from logto_webhooks import LogtoWebhooks, events

logto = LogtoWebhooks.from_env()


@logto.on(events.LocalUserCreated)
async def count(event: events.LocalUserCreated, session: AsyncSession) -> None:
    """Write a row for each user, in the transaction that says "done"."""
    statement = sa.text("INSERT INTO effects (user_id) VALUES (:user_id)")
    await session.execute(statement, {"user_id": event.user.logto_user_id})


@logto.on("PostResetPassword", time_limit=2, max_attempts=2, waits=(0.5,))
async def misbehave(event: events.PostResetPassword, session: AsyncSession) -> None:
    """Do harm of one of six kinds."""
    match hash(event.user_id) % 6:
        case 0:
            time.sleep(1.5)  # noqa: ASYNC251 - blocks its loop: that is the harm
        case 1:
            sys.exit(3)
        case 2:
            await session.execute(sa.text("SET search_path TO pg_catalog"))
        case 3:
            await asyncio.sleep(60)
        case 4:
            raise ValueError("a handler's own error")
        case 5:
            await session.execute(sa.text("SELECT pg_sleep(30)"))
