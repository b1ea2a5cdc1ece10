"""Elect one process that uses Logto's API, while the others stand by."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from logto_webhooks.clock import Clock
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import ProcessLease, Store
from logto_webhooks.event_loop import describe_end, forever
from logto_webhooks.instrumentation import ApiUnavailable, Observer
from logto_webhooks.reconcile import report_to

LEASE_MS: Final = 10_000
RENEW_S: Final = 3.0
_NAME: Final = "asking"


class LeaderLease:
    """A lease in the database, which its holder renews. `number` identifies the process.

    Two processes may hold it for a moment. That costs Logto some requests, and harms nothing.
    """

    def __init__(self, host: TransactionRunner, clock: Clock, number: int) -> None:
        self._host = host
        self._clock = clock
        self._number = number

    async def keep(self, work: Callable[[], Coroutine[Any, Any, None]], observe: Observer) -> None:
        """Run `work` while this process holds the lease. Never returns."""
        working: asyncio.Task[None] | None = None
        report = report_to(observe, RENEW_S)

        async def work_if_ours() -> None:
            nonlocal working
            is_ours = await self._take(report)
            if working is not None and working.done():
                observe(ApiUnavailable(describe_end(working), RENEW_S))
            if is_ours and (working is None or working.done()):
                working = asyncio.create_task(work())
            elif not is_ours and working is not None:
                ended, working = working, None
                await _end(ended)

        try:
            await forever(work_if_ours, RENEW_S, report)
        finally:
            if working is not None:
                await _end(working)
                await self._host.run(
                    lambda store: store.save_lease(_NAME, ProcessLease(self._number, 0))
                )

    async def _take(self, report: Callable[[Exception], float]) -> bool:
        try:
            return await self._host.run(self._try_to_take)
        except Exception as error:
            report(error)
            return False

    def _try_to_take(self, store: Store) -> bool:
        now = self._clock.now()
        held = store.lease(_NAME)
        # A lease that is longer than ours can be is from before the clock was set back.
        if held and held.holder != self._number and now < held.until <= now + 2 * LEASE_MS:
            return False
        store.save_lease(_NAME, ProcessLease(self._number, now + LEASE_MS))
        return True


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
