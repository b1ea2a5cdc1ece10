"""A stand-in for a mail provider. Like a real one, it sends one mail for each idempotency key."""

from __future__ import annotations

from sqlalchemy.dialects.postgresql import insert

from app.database import sessions
from app.models import Greeting


async def send(logto_user_id: str, text: str, idempotency_key: str) -> None:
    """Send a mail, unless one with this key was sent before."""
    values = {"key": idempotency_key, "logto_user_id": logto_user_id, "text": text}
    async with sessions.begin() as session:
        await session.execute(insert(Greeting).values(values).on_conflict_do_nothing())
