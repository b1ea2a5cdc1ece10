"""The handlers, which run when something happens in Logto."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from app import mail
from app.database import engine
from app.models import SignIn, Workspace
from logto_webhooks import Delivery, LogtoWebhooks, events

logto = LogtoWebhooks(engine=engine, environment=os.environ)


@logto.on(events.LocalUserCreated, events.LocalUserDeleted)
async def keep_workspace(
    event: events.LocalUserCreated | events.LocalUserDeleted, session: AsyncSession
) -> None:
    """Create and delete a user's workspace, once: the session commits together with the job.

    One handler does both, because only the jobs of the same handler run in order.
    """
    user = event.user
    if isinstance(event, events.LocalUserDeleted):
        await session.execute(sa.delete(Workspace).where(Workspace.owner == user.logto_user_id))
    else:
        title = f"Workspace of {user.name or user.username or user.email or 'somebody'}"
        session.add(Workspace(owner=user.logto_user_id, title=title))


@logto.on(events.PostSignIn)
async def note_sign_in(event: events.PostSignIn, delivery: Delivery, session: AsyncSession) -> None:
    """Record a sign-in. `occurred_at` is its time, even if the delivery arrived late."""
    at = datetime.fromtimestamp(delivery.occurred_at / 1000, UTC)
    session.add(SignIn(logto_user_id=event.user_id, at=at, ip=event.user_ip))


@logto.on(events.LocalUserCreated)
async def greet(event: events.LocalUserCreated, delivery: Delivery) -> None:
    """Send a mail. If the process ends meanwhile, this runs again: the key prevents a second."""
    text = f"Welcome, {event.user.name or 'stranger'}!"
    await mail.send(event.user.logto_user_id, text, delivery.idempotency_key)
