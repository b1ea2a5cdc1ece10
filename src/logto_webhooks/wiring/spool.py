"""The spool directory of the settings, and what empties it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from logto_webhooks.adapters.spool import SpoolDirectory
from logto_webhooks.core.ports import Observer
from logto_webhooks.service.unspool import Unspooler
from logto_webhooks.settings import Settings
from logto_webhooks.wiring.databases import Database


def spool_of(settings: Settings) -> SpoolDirectory | None:
    """The spool directory, if one is set; nothing is opened."""
    return SpoolDirectory(Path(settings.spool_dir)) if settings.spool_dir else None


@contextlib.asynccontextmanager
async def unspooling(
    settings: Settings, database: Database, observe: Observer, stored: Callable[[], None]
) -> AsyncIterator[None]:
    """Make the spool directory, and store what is in it, as long as the block lasts.

    Raises SettingInvalid.
    """
    spool = spool_of(settings)
    if spool is None:
        yield
        return
    spool.make()
    keeping = asyncio.create_task(Unspooler(spool, database.host, observe, stored).keep())
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
