"""A service that asks a FakeLogto."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from logto_webhooks.testing.fake import FakeLogto
from tests.support.service import Service


def credentials(logto: FakeLogto) -> dict[str, str]:
    """The settings with which a command asks it, and accepts what it sends."""
    return {
        "LOGTO_ENDPOINT": logto.url,
        "LOGTO_M2M_APP_ID": logto.app_id,
        "LOGTO_M2M_APP_SECRET": logto.app_secret,
        "LOGTO_WEBHOOK_SIGNING_KEY": logto.signing_key,
        "LOGTO_WEBHOOKS_API_BUDGET": "1000",
    }


@asynccontextmanager
async def serving(folder: Path, logto: FakeLogto, **given: str) -> AsyncIterator[Service]:
    """`serve` with credentials, beside the event loop on which the Logto answers.

    It compares all records only if that is `given`.
    """
    given = credentials(logto) | {"LOGTO_WEBHOOKS_RECONCILE_EVERY_S": "0"} | given
    service = await asyncio.to_thread(Service, folder, port=0, **given)
    await asyncio.to_thread(service.__enter__)
    try:
        yield service
    finally:
        await asyncio.to_thread(service.__exit__, None, None, None)
