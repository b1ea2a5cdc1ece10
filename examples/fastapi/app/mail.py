"""A stand-in for a provider of mail. Like a real one it does once what it is asked by one key."""

from __future__ import annotations

from sqlalchemy.dialects.postgresql import insert

from app.database import sessions
from app.models import Greeting


async def send(logto_user_id: str, text: str, idempotency_key: str) -> None:
    """Send a mail, unless one was sent by this key."""
    values = {"key": idempotency_key, "logto_user_id": logto_user_id, "text": text}
    async with sessions.begin() as session:
        await session.execute(insert(Greeting).values(values).on_conflict_do_nothing())
