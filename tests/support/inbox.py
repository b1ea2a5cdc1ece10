"""An inbox with something in it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from logto_webhooks.testing import make
from logto_webhooks.wiring import database_of
from tests.support.copy import delivery


def fill(folder: Path, count: int, at: int | None = None) -> None:
    """Put deliveries into an inbox that no worker reads: of users who were created then (ms)."""
    database = database_of(f"sqlite:///{folder / 'logto-webhooks.db'}")
    deliveries = [delivery(make.user_created(at=at).body) for _ in range(count)]

    async def add() -> None:
        await database.open()
        await database.host.run(lambda store: store.add(deliveries))
        await database.host.close()

    asyncio.run(add())
