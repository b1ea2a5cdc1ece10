"""An inbox with something in it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from logto_webhooks.database import open_database
from logto_webhooks.testing import make
from tests.support.stores import delivery


def fill(folder: Path, count: int, at: int | None = None) -> None:
    """Put deliveries into an inbox that no worker reads: of users who were created then (ms)."""
    database = open_database(f"sqlite:///{folder / 'logto-webhooks.db'}")
    deliveries = [delivery(make.user_created(at=at).body) for _ in range(count)]

    async def add() -> None:
        await database.open()
        await database.host.run(lambda store: store.add(deliveries))
        await database.host.close()

    asyncio.run(add())
