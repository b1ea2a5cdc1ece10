"""The application's engine, which also stores Logto's deliveries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from app.settings import DATABASE_URL

engine = create_async_engine(sa.make_url(DATABASE_URL).set(drivername="postgresql+asyncpg"))
sessions = async_sessionmaker(engine, expire_on_commit=False)


async def _session() -> AsyncIterator[AsyncSession]:
    # Endpoints commit themselves: what follows the yield runs after the answer is sent.
    async with sessions() as session:
        yield session


InSession = Annotated[AsyncSession, Depends(_session)]
