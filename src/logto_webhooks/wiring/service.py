"""Receiver, worker and handlers over one database."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator
from typing import Final

from starlette.types import ASGIApp

from logto_webhooks.adapters import web
from logto_webhooks.adapters.room import Room
from logto_webhooks.core.ports import Observer, Store
from logto_webhooks.core.reports import (
    Asked,
    Compared,
    HandlersKnown,
    Report,
    Stalled,
    Synced,
    Unrunnable,
)
from logto_webhooks.core.silence import Silence
from logto_webhooks.errors import LogtoWebhooksError, StoreUnavailable, described
from logto_webhooks.service.apart import Apart
from logto_webhooks.service.clocks import Ahead
from logto_webhooks.service.handlers import Handlers
from logto_webhooks.service.keyring import Keyring
from logto_webhooks.service.quarantine import Quarantine, asker
from logto_webhooks.service.readiness import Readiness
from logto_webhooks.service.receive import GroupCommit, Receiver
from logto_webhooks.service.run import Runner
from logto_webhooks.service.silence import Watch
from logto_webhooks.service.work import Worker
from logto_webhooks.settings import Settings
from logto_webhooks.wiring.api import api_of, asking
from logto_webhooks.wiring.clock import SystemClock
from logto_webhooks.wiring.databases import Database
from logto_webhooks.wiring.spool import spool_of, unspooling

BODIES_IN_FLIGHT: Final = 256 * 2**20
AGAIN_S: Final = 2.0
WATCH_S: Final = 60.0
LONGEST_STOP_S: Final = 12.0
# How long a thread that computes may keep the interpreter from those that accept; Python's own
# 5 ms are waited for several times in each answer.
SWITCH_S: Final = 0.0005


class Service:
    """All of it: `webhook` receives, `running` does the rest, `app` is both, for a server."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        observe: Observer,
        handlers: Handlers | None = None,
        scrape: web.Scrape | None = None,
        apart: Database | None = None,
    ) -> None:
        """Opens nothing; `scrape` answers `GET /metrics`. With `apart`, the same database for
        another event loop, handlers run on a loop of their own. Raises SigningKeyMissing,
        HandlerRefused."""
        self._settings = settings
        self._database = database
        self._observe = observe
        self._handlers = Handlers() if handlers is None else handlers
        self._workers = Workers(settings, database, observe, self._handlers, apart)
        self.api = api_of(settings) if settings.endpoint else None
        commit = GroupCommit(database.host, observe, self._workers.wake, spool_of(settings))
        self._readiness = Readiness(database.check, database.host, SystemClock(), commit)
        ring = Keyring(settings.signing_keys)
        self._ahead = Ahead(database.host, SystemClock())
        self._quarantine = self._set_aside(ring)
        receiver = Receiver(
            ring,
            commit.add,
            SystemClock(),
            observe,
            reject=self._quarantine.offer,
            ahead=self._ahead,
        )
        self.webhook = web.Webhook(
            receiver,
            settings.max_body_bytes,
            Room(max(BODIES_IN_FLIGHT, 4 * settings.max_body_bytes)),
        )
        self._watch = Watch(database.host, SystemClock(), observe, settings.silence_after_s)
        self.app: ASGIApp = web.application(
            self.webhook,
            receiver,
            self._ready,
            lambda _: self.running(),
            settings.path,
            scrape,
        )

    def wake(self) -> None:
        """Tell that there may be something to apply, or to run."""
        self._workers.wake()
        self._workers.wake_runner()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Apply, run handlers, ask Logto, as long as the block lasts."""
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self._handlers.in_use())
            stack.push_async_callback(self._database.host.close)
            wake = self._workers.wake
            spooled = unspooling(self._settings, self._database, self._observe, wake)
            await stack.enter_async_context(spooled)
            await stack.enter_async_context(self._setting_aside())
            if self._settings.worker:
                await stack.enter_async_context(self._workers.running())
            else:
                await self._workers.register()
            if self.api is not None:
                told = self._workers.observe
                loops = asking(self._settings, self.api, self._database, told, wake)
                await stack.enter_async_context(loops)
            yield

    async def _ready(self) -> Silence | None:
        await self._readiness.check()
        return self._watch.silence

    def _set_aside(self, ring: Keyring) -> Quarantine:
        host, clock, api = self._database.host, SystemClock(), self.api
        ask = asker(api, host, clock, self._settings.public_url) if api else None
        wake = self._workers.wake
        return Quarantine(host, ring, clock, self._observe, wake, ask, self._ahead)

    @contextlib.asynccontextmanager
    async def _setting_aside(self) -> AsyncIterator[None]:
        keeping = asyncio.gather(self._quarantine.keep(), self._watch.keep(), self._ahead.keep())
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            with contextlib.suppress(LogtoWebhooksError):
                await self._quarantine.write_down()


class Workers:
    """What applies deliveries, and what runs handlers."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        observe: Observer,
        handlers: Handlers,
        apart: Database | None = None,
    ) -> None:
        """With `apart`, the same database for another event loop, `run` runs handlers on a loop of
        their own, if there are any. Raises HandlerRefused."""
        handlers.fit(database.host.provides)
        apart = apart if len(handlers) else None
        self._database = database
        self._handlers = handlers
        self._tell = observe
        self._registered = False
        self._loops: list[asyncio.Task[None]] = []
        self.worker = worker_of(settings, database, self.observe)
        self._handlers_database = database if apart is None else apart
        self._apart = None if apart is None else Apart("logto-handlers")
        host = self._handlers_database.host
        self.runner = Runner(
            host, SystemClock(), observe, random.random, handlers, database.may_work
        )

    def wake(self) -> None:
        """Tell that something is pending."""
        self.worker.wake()

    def wake_runner(self) -> None:
        """Tell that there may be jobs."""
        if self._apart is None:
            self.runner.wake()
        elif not self.runner.woken:
            self._apart.call(self.runner.wake)

    def observe(self, report: Report) -> None:
        """Pass on what is reported; what was applied may have made jobs."""
        self._tell(report)
        if isinstance(report, Synced | Asked | Compared):
            self.wake_runner()

    def stop(self) -> None:
        """End `run`, whatever a handler or the database does, within `LONGEST_STOP_S`."""
        self.worker.stop()
        self.runner.stop(self.wake_runner)
        for each in self._loops:
            asyncio.get_running_loop().call_later(LONGEST_STOP_S, each.cancel)

    async def run(self) -> None:
        """Work until stopped. Handlers are made known first, or jobs would be missing."""
        if not await self.register():
            return
        watching = asyncio.create_task(self._watch())
        loops = (self.worker.run(), self._run_handlers())
        self._loops = [asyncio.create_task(each) for each in loops]
        over, _ = await asyncio.wait(self._loops, return_when=asyncio.FIRST_EXCEPTION)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        for each in over:
            if not each.cancelled():
                each.result()

    async def _run_handlers(self) -> None:
        if self._apart is None:
            await self.runner.run()
        else:
            sys.setswitchinterval(SWITCH_S)
            await self._apart.run(self._run_apart)

    async def _run_apart(self) -> None:
        with self._handlers.in_use():
            await self.runner.run()
        if self._handlers_database is not self._database:
            await self._handlers_database.host.close()

    async def drain(self) -> None:
        """Work until nothing is pending, and no job is due."""
        if await self.register():
            await self.worker.drain()
            await self.runner.drain()
            await self._tell_of_others()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Work as long as the block lasts; handlers are known once it begins."""
        await self.register()
        working = asyncio.create_task(self.run())
        try:
            yield
        finally:
            self.stop()
            await working

    async def register(self) -> bool:
        """Make the handlers known, once the database can be reached; False when stopped."""
        registered = [each.registered for each in self._handlers]

        def register(store: Store) -> None:
            store.jobs.register(registered)

        while not self._registered and not self.worker.stopping:
            try:
                await self._database.host.run(register)
                self._registered = True
                if registered:
                    self._tell(HandlersKnown(tuple(each.name for each in registered)))
            except StoreUnavailable as error:
                self._tell(Stalled(described(error), AGAIN_S))
                await asyncio.sleep(AGAIN_S)
        return self._registered

    async def _watch(self) -> None:
        """Tell, again when it changes, of jobs that wait for code which isn't here."""
        told = 0
        while True:
            with contextlib.suppress(LogtoWebhooksError):
                told = await self._tell_of_others(told)
            await asyncio.sleep(WATCH_S)

    async def _tell_of_others(self, told: int = 0) -> int:
        counts = await self._database.host.read(lambda store: store.jobs.counts())
        waiting = [each for each in counts if each.state == "waiting"]
        others = [each for each in waiting if self._handlers.get(each.handler) is None]
        jobs = sum(each.count for each in others)
        if jobs and jobs != told:
            self._tell(Unrunnable(tuple(each.handler for each in others), jobs))
        return jobs


def worker_of(settings: Settings, database: Database, observe: Observer) -> Worker:
    """Make a worker on `database`."""
    return Worker(
        database.host,
        SystemClock(),
        observe,
        random.random,
        lag_ms=settings.lag_ms,
        max_attempts=settings.max_attempts,
        replay_window_ms=settings.replay_window_s * 1000,
        budget_s=database.budget_s,
        may_work=database.may_work,
    )
