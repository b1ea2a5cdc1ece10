"""Receiver and worker over one database."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

from starlette.types import ASGIApp

from logto_webhooks.adapters import web
from logto_webhooks.adapters.room import Room
from logto_webhooks.core.ports import Observer
from logto_webhooks.service.receive import GroupCommit, Receiver
from logto_webhooks.service.turn import Turn
from logto_webhooks.service.work import Worker
from logto_webhooks.settings import Settings
from logto_webhooks.wiring.api import api_of, reads_of, reconciliation_of, recovery_of
from logto_webhooks.wiring.clock import SystemClock
from logto_webhooks.wiring.databases import Database

BODIES_IN_FLIGHT = 256 * 2**20


class Service:
    """Receiver and worker over one database."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        observe: Observer,
        scrape: web.Scrape | None = None,
    ) -> None:
        """Opens nothing; `scrape` answers `GET /metrics`. Raises SigningKeyMissing."""
        clock = SystemClock()
        self._database = database
        self._settings = settings
        self._observe = observe
        self.worker = worker_of(settings, database, observe)
        self._api = api_of(settings) if settings.endpoint else None
        commit = GroupCommit(database.host, observe, stored=self.worker.wake)
        receiver = Receiver(settings.signing_keys, commit.add, clock, observe)
        self.app: ASGIApp = web.application(
            receiver,
            database.check,
            self._lifespan,
            path=settings.path,
            max_body=settings.max_body_bytes,
            room=Room(BODIES_IN_FLIGHT),
            scrape=scrape,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        working = asyncio.create_task(self.worker.run()) if self._settings.worker else None
        try:
            async with self._asking():
                yield
        finally:
            self.worker.stop()
            if working:
                await working
            await self._database.host.close()

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        settings = self._settings
        if self._api is None:
            yield
            return
        recovery = recovery_of(settings, self._api, self._database, self.worker.wake)
        reads = reads_of(self._api, self._database, self._observe)
        reconciliation = reconciliation_of(self._api, self._database)

        async def ask() -> None:
            async with asyncio.TaskGroup() as loops:
                loops.create_task(recovery.keep(settings.recover_every_s, self._observe))
                loops.create_task(reads.keep())
                if settings.reconcile_every_s:
                    loops.create_task(
                        reconciliation.keep(settings.reconcile_every_s, self._observe)
                    )

        turn = Turn(self._database.host, SystemClock(), random.getrandbits(62))
        asking = asyncio.create_task(turn.keep(ask, self._observe))
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await self._api.close()


def worker_of(settings: Settings, database: Database, observe: Observer) -> Worker:
    """Make a worker on `database`."""
    return Worker(
        database.host,
        SystemClock(),
        observe,
        random.random,
        lag_ms=settings.lag_ms,
        max_attempts=settings.max_attempts,
        budget_s=database.budget_s,
        may_work=database.may_work,
    )
