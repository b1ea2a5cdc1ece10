"""Run the service: receive deliveries, apply them, run jobs, and use Logto's API."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final

from logto_webhooks.apply import DeliveryWorker
from logto_webhooks.arrivals import FlowMonitor, compare_clocks
from logto_webhooks.clock import SystemClock
from logto_webhooks.database import Database
from logto_webhooks.database.store import RECONCILE, Store
from logto_webhooks.deliveries import NewDelivery, StoreResult
from logto_webhooks.errors import (
    ApiNotConfigured,
    ExtraMissing,
    LogtoWebhooksError,
    SchemaMismatch,
    StoreUnavailable,
    describe,
)
from logto_webhooks.event_loop import (
    LoopThread,
    Main,
    forever,
    keep_running,
    run_in_background,
    run_in_thread,
    wait_for_event,
)
from logto_webhooks.events.local import Source
from logto_webhooks.handlers import Handlers
from logto_webhooks.handlers.worker import JobWorker
from logto_webhooks.ingest import Receiver
from logto_webhooks.ingest.body import ByteLimiter, RequestBody
from logto_webhooks.ingest.group_commit import GroupCommit, Readiness
from logto_webhooks.ingest.quarantine import Quarantine, make_key_reader
from logto_webhooks.ingest.spool import spool_of, unspool_in_background
from logto_webhooks.instrumentation import (
    ApiUnavailable,
    DeliverySynced,
    HandlersKnown,
    NotOpened,
    Observer,
    Opened,
    Reconciled,
    Refetched,
    Stalled,
    TelemetryEvent,
    Unrunnable,
    logs,
)
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.apply import apply_due, keep_applied
from logto_webhooks.mapping.file import MapFile, map_tables
from logto_webhooks.mapping.report import REPORT_S, UnwrittenReporter, report_missing
from logto_webhooks.reconcile.leader import LeaderLease
from logto_webhooks.reconcile.reconcile import Reconciliation
from logto_webhooks.reconcile.recover import Recovery
from logto_webhooks.reconcile.refetch import Refetcher
from logto_webhooks.settings import Settings, split_keys
from logto_webhooks.signing_keys import Keyring

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from logto_webhooks.ingest import asgi
    from logto_webhooks.logto.client import ManagementClient

logger = logging.getLogger("logto_webhooks")
BUDGET: Final = 15.0  # requests per second
CLOUD_BUDGET: Final = 20.0  # Logto Cloud's limit; a self-hosted Logto has none
NO_BUDGET: Final = 1_000.0


def make_client(
    settings: Settings, *, fast: bool = False, longest_wait_s: float = inf
) -> ManagementClient:
    """Make a client, which connects on first use. With `fast`, it sends as many requests as Logto
    allows, unless a budget is set. It waits at most `longest_wait_s` before a retry. Raises
    ApiNotConfigured, ExtraMissing."""
    if not (settings.endpoint and settings.app_id and settings.app_secret):
        raise ApiNotConfigured(settings.missing_credentials)
    try:
        # Imported here, because a service without credentials doesn't need the extra `api`.
        from logto_webhooks.logto.client import ManagementClient
    except ModuleNotFoundError as error:
        raise ExtraMissing(feature="Logto's API", extra="api", package=error.name) from None

    is_cloud = settings.endpoint.rstrip("/").endswith(".logto.app")
    most = CLOUD_BUDGET if is_cloud else NO_BUDGET
    return ManagementClient(
        settings.endpoint,
        settings.app_id,
        settings.app_secret,
        now=SystemClock(),
        resource=settings.api_resource,
        budget=settings.api_budget or (most if fast else BUDGET),
        sleep=lambda seconds: asyncio.sleep(min(seconds, longest_wait_s)),
    )


@contextlib.asynccontextmanager
async def open_client(settings: Settings, *, fast: bool = False) -> AsyncIterator[ManagementClient]:
    """Make a client as `make_client` does, and close it at the end of the block."""
    logto = make_client(settings, fast=fast)
    try:
        yield logto
    finally:
        await logto.close()


@contextlib.asynccontextmanager
async def talk_to_logto(
    settings: Settings,
    logto: ManagementClient,
    database: Database,
    observe: Observer,
    stored: Callable[[], None],
) -> AsyncIterator[None]:
    """Recover, refetch and reconcile within the block, while this process holds the leader's
    lease."""
    recovery = make_recovery(settings, logto, database, stored)
    reads = Refetcher(logto, database.host, observe)
    reconciliation = make_reconciliation(logto, database)

    def tell(problem: str, wait_s: float) -> None:
        observe(ApiUnavailable(problem, wait_s))

    async def ask() -> None:
        loops: list[Main] = [
            partial(recovery.keep, settings.recover_every_s, observe),
            reads.keep,
        ]
        if settings.reconcile_every_s:
            loops.append(partial(reconciliation.keep, settings.reconcile_every_s, observe))
        async with asyncio.TaskGroup() as group:
            for loop in loops:
                group.create_task(keep_running(loop, tell))

    lease = LeaderLease(database.host, SystemClock(), random.getrandbits(62))
    try:
        async with run_in_background(partial(lease.keep, ask, observe), tell=tell):
            yield
    finally:
        await logto.close()


def make_reconciliation(
    logto: ManagementClient,
    database: Database,
    source: Source | None = "reconcile",
    name: str = RECONCILE,
) -> Reconciliation:
    """Make a reconciliation. Without a `source`, no handlers run. Only a killed run of the same
    `name` is resumed."""
    return Reconciliation(logto, database.host, SystemClock(), source, name)


def make_recovery(
    settings: Settings,
    logto: ManagementClient,
    database: Database,
    stored: Callable[[], None] = lambda: None,
) -> Recovery:
    """Make a recovery, which restores missing deliveries from Logto's log."""
    return Recovery(
        logto,
        database.host,
        SystemClock(),
        split_signing_keys(settings),
        settings.public_url,
        stored,
    )


def split_signing_keys(settings: Settings) -> list[str]:
    """Return the signing keys; none if none are configured."""
    return list(split_keys(settings.signing_key))


BODIES_IN_FLIGHT: Final = 256 * 2**20
AGAIN_S: Final = 2.0
WATCH_S: Final = 60.0
# How long the start waits for the database, if it can go on without.
OPEN_S: Final = 3.0
REGISTER_S: Final = 2.0
CLOSED_S: Final = 1.0  # how long a delivery may wait for a database that isn't open
LONGEST_STOP_S: Final = 12.0
# How long a busy thread may keep the interpreter from the event loop that accepts deliveries. Each
# answer waits for it several times, so Python's default of 5 ms is too long.
SWITCH_S: Final = 0.0005


class Service:
    """The whole service: `webhook` receives deliveries, `running` does the rest, `app` is both."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        observe: Observer,
        handlers: Handlers | None = None,
        scrape: asgi.Scrape | None = None,
        handlers_database: Database | None = None,
        mappings: Mappings | None = None,
        map_file: MapFile | None = None,
    ) -> None:
        """Opens nothing. `scrape` answers `GET /metrics`. With a `handlers_database`, the same
        database for another event loop, handlers run on their own loop. The tables of a `map_file`
        are mapped, too, once the database is open. Raises SigningKeyMissing, InvalidHandler, and
        ApiNotConfigured if only some of the credentials are set."""
        # Imported here, so that commands that only read the database don't load a web framework.
        from logto_webhooks.ingest import asgi

        self._settings = settings
        self._database = database
        self._observe = observe
        self._handlers = Handlers() if handlers is None else handlers
        self._workers = WorkerGroup(
            settings, database, observe, self._handlers, handlers_database, mappings, map_file
        )
        self.api = make_client(settings) if settings.uses_api else None
        host, clock, wake = database.host, SystemClock(), self._workers.delivery_worker.wake
        self._spool = spool_of(settings)
        self._is_open = True  # unless `open` fails
        commit = self._commit = GroupCommit(host, observe, wake, self._spool)
        self._readiness = Readiness(database.check, host, clock, commit, self._spool)
        keyring = Keyring(settings.signing_keys)
        self._clock = clock
        read_keys = (
            make_key_reader(self.api, host, clock, settings.public_url) if self.api else None
        )
        self._quarantine = Quarantine(host, keyring, clock, observe, wake, read_keys)
        receiver = self._receiver = Receiver(
            keyring, self._store, clock, observe, reject=self._quarantine.offer
        )
        self.webhook = asgi.WebhookApp(
            receiver,
            settings.max_body_bytes,
            ByteLimiter(max(BODIES_IN_FLIGHT, 4 * settings.max_body_bytes)),
        )
        self._flow = FlowMonitor(host, clock, observe, settings.silence_after_s)
        self.app: ASGIApp = asgi.make_application(
            self.webhook,
            receiver,
            self._check_ready,
            lambda _: self.running(),
            settings.path,
            scrape,
        )

    def wake(self) -> None:
        """Tell the workers that deliveries or jobs may be pending."""
        self._workers.delivery_worker.wake()
        self._workers.wake_job_worker()

    def hurry(self, seconds: float) -> None:
        """Answer open requests within `seconds`, because the server stops."""
        self._commit.hurry(asyncio.get_running_loop().time() + seconds)

    async def open(self) -> None:
        """Open the database. With a spool directory, deliveries can be received without it, and
        `running` opens it as soon as possible.

        Raises StoreUnavailable and SchemaMismatch without a spool directory, SettingInvalid,
        MapFileInvalid, InvalidMapping.
        """
        if self._spool is None:
            await self._database.open()
            await self._workers.read_map_file()
            return
        self._spool.make()
        with contextlib.suppress(OSError):  # `/readyz` says if nothing can be written
            await run_in_thread(self._spool.claim, self._database.place)
        error: Exception
        try:
            await asyncio.wait_for(self._database.open(), OPEN_S)
            await self._workers.read_map_file()
            return
        except TimeoutError:
            error = StoreUnavailable(problem=f"no answer within {OPEN_S:g} s")
        except (StoreUnavailable, SchemaMismatch) as problem:
            error = problem
        except LogtoWebhooksError:  # the user must correct something first
            raise
        except Exception as problem:
            error = problem
        self._observe(NotOpened(describe(error), AGAIN_S))
        self._is_open = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Apply deliveries, run handlers and use Logto's API within the block."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(logs.sum_up)
            stack.enter_context(self._handlers.in_use())
            stack.push_async_callback(self._database.host.close)
            stack.push_async_callback(self._commit.finish)
            stack.push_async_callback(self._receiver.finish)
            working = self._using_database() if self._is_open else self._waiting_for_database()
            await stack.enter_async_context(working)
            yield

    async def _store(
        self, delivery: NewDelivery, deadline: float | None, room: RequestBody | None
    ) -> StoreResult | None:
        if not self._is_open:  # otherwise, it would be spooled late
            deadline = asyncio.get_running_loop().time() + CLOSED_S
        return await self._commit.add(delivery, deadline, room)

    @contextlib.asynccontextmanager
    async def _waiting_for_database(self) -> AsyncIterator[None]:
        """Wait for the database in the background, then use it."""
        stopping = asyncio.Event()

        async def open_and_use() -> None:
            await self._open_repeatedly()
            while not stopping.is_set():
                try:
                    async with self._using_database():
                        await stopping.wait()
                except Exception as error:
                    if stopping.is_set():
                        raise
                    self._observe(Stalled(describe(error), AGAIN_S))
                    await wait_for_event(stopping, AGAIN_S)

        tell, is_over = tell_stall(self._observe), lambda _: stopping.is_set()
        working = asyncio.create_task(keep_running(open_and_use, tell, is_over))
        try:
            yield
        finally:
            stopping.set()
            if not self._is_open:
                working.cancel()
            await _finish(working)

    async def _open_repeatedly(self) -> None:
        while not self._is_open:
            await asyncio.sleep(AGAIN_S)
            try:
                await self._database.open()
                self._is_open = True
            except Exception as error:
                self._observe(NotOpened(describe(error), AGAIN_S))
        self._observe(Opened())

    @contextlib.asynccontextmanager
    async def _using_database(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            wake = self._workers.delivery_worker.wake
            unspooling = unspool_in_background(self._settings, self._database, self._observe, wake)
            await stack.enter_async_context(unspooling)
            stack.push_async_callback(self._write_quarantine)
            loops = (
                self._quarantine.keep,
                self._flow.keep,
                partial(compare_clocks, self._database.host, self._clock),
            )
            tell = tell_stall(self._observe)
            await stack.enter_async_context(run_in_background(*loops, tell=tell))
            await stack.enter_async_context(self._workers.running(work=self._settings.worker))
            if self.api is not None:
                observe = self._workers.observe
                asking = talk_to_logto(self._settings, self.api, self._database, observe, wake)
                await stack.enter_async_context(asking)
            yield

    async def _check_ready(self) -> dict[str, Any]:
        """Return what else the answer says: why deliveries are spooled, and the silence."""
        remarks = {"spooling": await self._readiness.check(), "silence": self._flow.silence}
        return {name: remark for name, remark in remarks.items() if remark}

    async def _write_quarantine(self) -> None:
        with contextlib.suppress(LogtoWebhooksError):
            await self._quarantine.write_down()


class WorkerGroup:
    """The worker that applies deliveries, and the worker that runs handlers."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        observe: Observer,
        handlers: Handlers,
        handlers_database: Database | None = None,
        mappings: Mappings | None = None,
        map_file: MapFile | None = None,
    ) -> None:
        """With a `handlers_database`, the same database for another event loop, handlers run on
        their own loop, if there are any. Raises InvalidHandler, and InvalidMapping."""
        self._mappings = Mappings() if mappings is None else mappings
        self._map_file = map_file
        database.host.project = self._mappings.write
        handlers.fit(database.host.provides)
        if map_file is None:  # or it may map what is missing
            self._mappings.check_complete()
        handlers_database = handlers_database if len(handlers) else None
        self._database = database
        self._handlers = handlers
        self._observe = observe
        self._unwritten = UnwrittenReporter(database.host, observe)
        self._registered = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._tell = tell_stall(observe)
        self._is_spare = False
        self.delivery_worker = make_worker(settings, database, self.observe, self._may_work)
        self._handlers_database = database if handlers_database is None else handlers_database
        self._handlers_database.allow_statements(handlers.longest_transaction_s)
        self._thread = None if handlers_database is None else LoopThread("logto-handlers")
        host = self._handlers_database.host
        self.job_worker = JobWorker(
            host, SystemClock(), observe, random.random, handlers, database.may_work
        )

    def wake_job_worker(self) -> None:
        """Tell the job worker that there may be jobs."""
        if self._thread is None:
            self.job_worker.wake()
        elif not self.job_worker.woken:
            self._thread.call(self.job_worker.wake)

    def observe(self, report: TelemetryEvent) -> None:
        """Pass on a telemetry event. If something was applied, wake the job worker."""
        self._observe(report)
        if isinstance(report, DeliverySynced | Refetched | Reconciled):
            self.wake_job_worker()

    def stop(self) -> None:
        """End `run` within `LONGEST_STOP_S`, whatever a handler or the database does."""
        self.delivery_worker.stop()
        self.job_worker.stop(self.wake_job_worker)
        for loop in self._loops:
            asyncio.get_running_loop().call_later(LONGEST_STOP_S, loop.cancel)

    async def run(self) -> None:
        """Work until stopped. Registers the handlers first, or jobs would be missing."""
        if not await self.register():
            return
        thread = self._thread
        run_jobs = partial(self._run_in_thread, thread) if thread else self.job_worker.run
        loops: tuple[Main, ...] = (self.delivery_worker.run, run_jobs)
        self._loops = [asyncio.create_task(self._keep_working(loop)) for loop in loops]
        async with run_in_background(
            self._watch,
            partial(keep_applied, self._database.host, self._mappings),
            partial(forever, self._unwritten.report, REPORT_S),
            tell=self._tell,
        ):
            await asyncio.gather(*self._loops, return_exceptions=True)
        for task in self._loops:
            if not task.cancelled():
                task.result()

    async def _keep_working(self, loop: Main) -> None:
        """Run a loop until `stop` was called, again if it ends before that."""
        await keep_running(loop, self._tell, lambda _: self.delivery_worker.stopping)

    def _may_work(self) -> bool:
        """Return whether this process may work. Log it when another one works, and when that one
        is gone."""
        may_work = self._database.may_work()
        if self._is_spare == may_work:
            self._is_spare = not may_work
            text = "working on" if may_work else "on standby: another process works on"
            logger.info("%s %s", text, self._database.name)
        return may_work

    async def _run_in_thread(self, thread: LoopThread) -> None:
        async def run() -> None:
            with self._handlers.in_use():
                await self._keep_working(self.job_worker.run)
            if self._handlers_database is not self._database:
                await self._handlers_database.host.close()

        sys.setswitchinterval(SWITCH_S)
        await thread.run(run)

    async def drain(self) -> None:
        """Work until nothing is pending, and no job is due."""
        if await self.register():
            await self.delivery_worker.drain()
            await apply_due(self._database.host, self._mappings)
            await self.job_worker.drain()
            await self._report_unrunnable()
            await self._unwritten.report()

    @contextlib.asynccontextmanager
    async def running(self, *, work: bool = True) -> AsyncIterator[None]:
        """Work, or only register the handlers, within the block. They are registered when it
        begins, unless the database takes long."""
        loop = self.run if work else self._keep_registered
        working = asyncio.create_task(self._keep_working(loop))
        await wait_for_event(self._registered, REGISTER_S)
        try:
            yield
        finally:
            self.stop()
            if not (work and self._registered.is_set()):
                working.cancel()
            await _finish(working)

    async def _keep_registered(self) -> None:
        """Register the handlers, and tell that this process has them, until cancelled."""
        if await self.register():
            await forever(lambda: self._database.host.run(self._register), WATCH_S)

    async def read_map_file(self) -> None:
        """Map the tables of the file, if there is one. Raises MapFileInvalid, InvalidMapping,
        StoreUnavailable."""
        if self._map_file is not None:
            await map_tables(self._database.host, self._map_file, self._mappings)
            self._map_file = None

    async def register(self) -> bool:
        """Register the handlers once the database can be reached. Return False if stopped."""
        while not self._registered.is_set() and not self.delivery_worker.stopping:
            try:
                await self.read_map_file()
                await self._database.host.run(self._register)
                self._registered.set()
                if self._handlers.by_name:
                    self._observe(HandlersKnown(tuple(self._handlers.by_name)))
                await report_missing(self._database.host, self._mappings, self._observe)
            except Exception as error:  # or it would be reported only at the end
                self._observe(Stalled(describe(error), AGAIN_S))
                await asyncio.sleep(AGAIN_S)
        return self._registered.is_set()

    def _register(self, store: Store) -> None:
        store.jobs.register([handler.registered for handler in self._handlers])
        store.mappings.register(self._mappings.registered)

    async def _watch(self) -> None:
        """Tell that this process has its handlers. Report jobs that wait for handlers of other
        processes, whenever their number changes."""
        jobs = 0

        async def look() -> None:
            nonlocal jobs
            await self._database.host.run(self._register)
            jobs = await self._report_unrunnable(jobs)

        await forever(look, WATCH_S)

    async def _report_unrunnable(self, reported: int = 0) -> int:
        known = self._handlers.by_name
        unknown = await self._database.host.read_long(lambda store: store.jobs.count_waiting(known))
        jobs = sum(unknown.values())
        if jobs and jobs != reported:
            self._observe(Unrunnable(tuple(unknown), jobs))
        return jobs


def make_worker(
    settings: Settings,
    database: Database,
    observe: Observer,
    may_work: Callable[[], bool] | None = None,
) -> DeliveryWorker:
    """Make a worker on `database`, which waits until `may_work`."""
    return DeliveryWorker(
        database.host,
        SystemClock(),
        observe,
        random.random,
        lag_ms=settings.lag_ms,
        max_attempts=settings.max_attempts,
        replay_window_ms=settings.replay_window_s * 1000,
        budget_s=database.budget_s,
        may_work=may_work or database.may_work,
    )


def tell_stall(observe: Observer) -> Callable[[str, float], None]:
    """Return a function that reports a loop that ended, and when it is run again."""
    return lambda problem, wait_s: observe(Stalled(problem, wait_s))


async def _finish(task: asyncio.Task[Any]) -> None:
    """Wait for the end of a task. Raises what it raises."""
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()
