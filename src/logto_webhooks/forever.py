"""Loops in the background, which no error ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from logto_webhooks.errors import LogtoWebhooksError, describe

logger = logging.getLogger("logto_webhooks")


async def forever(
    step: Callable[[], Awaitable[object]],
    pause_s: float,
    failed: Callable[[Exception], float] | None = None,
) -> None:
    """Take a step again and again, with a pause after each, until cancelled.

    `failed` reports an error and returns the pause that follows. Without it, what the package
    foresees passes in silence: others report that the database is away. All else is logged.
    """
    while True:
        wait_s = pause_s
        try:
            await step()
        except Exception as error:
            if failed is not None:
                wait_s = failed(error)
            elif not isinstance(error, LogtoWebhooksError):
                logger.error("%s, in a loop that goes on", describe(error))
        await asyncio.sleep(wait_s)
