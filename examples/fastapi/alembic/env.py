"""Alembic's environment: the application's own tables, on its own engine."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa
from alembic import context

from app.database import engine
from app.models import Base
from logto_webhooks import tables


def migrate(connection: sa.Connection) -> None:
    """Do what the command asks for."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_object=tables.include_object,  # `logto-webhooks migrate` makes and changes its own
    )
    with context.begin_transaction():
        context.run_migrations()


async def main() -> None:
    """Connect, and let go of the engine at the end."""
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


if context.is_offline_mode():
    context.configure(url=engine.url, target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(main())
