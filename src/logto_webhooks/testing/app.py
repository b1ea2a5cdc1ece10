"""`testing.app`: a receiver, a worker and a database for tests, without a server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast, overload

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks import admin
from logto_webhooks.apply import DeliveryWorker
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery, Status, StoreResult
from logto_webhooks.errors import (
    Discard,
    HandlerUnknown,
    InvalidHandler,
    RetryLater,
    RowWaits,
    SettingInvalid,
)
from logto_webhooks.event_loop import Offloader, is_loop_running
from logto_webhooks.handlers import Handler, Handlers
from logto_webhooks.handlers.call import ClaimedJob, HandlerCaller, call_function
from logto_webhooks.ingest import Receiver
from logto_webhooks.ingest.body import RequestBody
from logto_webhooks.instrumentation import (
    DeliveryFailed,
    DeliverySynced,
    HandlerFailed,
    TelemetryEvent,
)
from logto_webhooks.jobs import JobFilter, JobRow
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.apply import apply_due
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.signing_keys import HEADER
from logto_webhooks.testing.backend import (
    Backend,
    MemoryBackend,
    SavepointRunner,
    hide_running_loop,
)
from logto_webhooks.testing.clock import MOMENTS, FrozenClock
from logto_webhooks.testing.make import SIGNING_KEY

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncConnection

    from logto_webhooks.app import LogtoWebhooks

ALL: Final = 1_000_000
FORESEEN: Final = (RetryLater, RowWaits, Discard)  # errors that `raise_errors` doesn't raise
_LONGEST_S: Final = 1e9
T = TypeVar("T")


class HandlerCall(Struct, frozen=True):
    """One call of a handler. `state` is the state of its job afterwards: done, waiting (for a
    retry), dead or discarded."""

    handler: str
    event: str
    subject: str
    state: str
    error: BaseException | None = None


class DeliveryResult(Struct, frozen=True):
    """The result of a delivery: the status of the answer, the outcome of the sync, and `runs`, the
    handler calls that followed.

    `outcome` is applied, stale, tombstoned, unchanged, asks, nothing, test, unknown, failed, dead
    or duplicate, or None if the delivery wasn't accepted.
    """

    status: int
    id: int | None = None
    outcome: str | None = None
    runs: tuple[HandlerCall, ...] = ()

    @property
    def ran(self) -> list[str]:
        """The names of the handlers that finished, in the order in which they ran."""
        return [call.handler for call in self.runs if call.state == "done"]


class App:
    """An application under test, on SQLite in memory. `testing.app` creates one with handlers."""

    def __init__(
        self,
        *,
        keys: Sequence[str] = (SIGNING_KEY,),
        clock: FrozenClock | None = None,
        async_app: AsyncApp | None = None,
    ) -> None:
        """`async_app` is the application to use without `await`."""
        clock = clock or FrozenClock()
        self._app = async_app or AsyncApp(MemoryBackend(), clock, keys, Handlers(), True)

    @property
    def connection(self) -> sa.Connection:
        """The connection that the application uses, for your own tables and queries."""
        return cast("sa.Connection", self._app.connection)

    @property
    def clock(self) -> FrozenClock:
        """The application's clock, which `tick` moves."""
        return self._app.clock

    @property
    def reports(self) -> list[TelemetryEvent]:
        """All telemetry events so far."""
        return self._app.reports

    def deliver(self, *deliveries: SignedRequest | Sequence[SignedRequest]) -> DeliveryResult:
        """Receive deliveries, apply what is due, and run the handlers. Returns the result of the
        last delivery.

        Raises the exception of a handler, unless `fail` caused it or `raise_errors` is off. Also
        raises SettingInvalid for anything that doesn't come from `testing.make`, and
        SchemaMismatch.
        """
        return _run(self._app.deliver(*deliveries))

    def work(self) -> list[HandlerCall]:
        """Apply everything that is due now, and run the handlers. Raises the same errors as
        `deliver`."""
        return _run(self._app.work())

    def tick(self, seconds: float | None = None) -> list[HandlerCall]:
        """Move the clock, by default to the next retry, and work. Raises the same errors as
        `deliver`."""
        return _run(self._app.tick(seconds))

    def fail(
        self,
        handler: Callable[..., Any] | str,
        error: BaseException | None = None,
        *,
        times: int = 1,
    ) -> None:
        """Make the next calls of a handler raise an error. The handler is a function or a name.

        Raises HandlerUnknown, SettingInvalid.
        """
        self._app.fail(handler, error, times=times)

    def status(self) -> Status:
        """Count deliveries, records and jobs."""
        return _run(self._app.status())

    def users(self, query: str = "") -> list[FoundRow]:
        """Find users, or list all of them."""
        return _run(self._app.users(query))

    def organizations(self, query: str = "") -> list[FoundRow]:
        """Find organizations, or list all of them."""
        return _run(self._app.organizations(query))

    def waiting(self) -> list[RefetchNeed]:
        """List the records that need a refetch."""
        return _run(self._app.waiting())

    def jobs(self) -> list[JobRow]:
        """List jobs, newest first."""
        return _run(self._app.jobs())


class AsyncApp:
    """An application under test with asynchronous methods. `testing.app` creates it."""

    def __init__(
        self,
        backend: Backend,
        clock: FrozenClock,
        keys: Sequence[str],
        handlers: Handlers,
        raise_errors: bool,
        mappings: Mappings | None = None,
    ) -> None:
        """Raises InvalidHandler for a handler that asks for a session that the backend lacks, and
        InvalidMapping for a mapping with which the application wouldn't start."""
        self.clock: FrozenClock = clock
        self.reports: list[TelemetryEvent] = []
        self.connection: sa.Connection | AsyncConnection = backend.connection
        self._backend = backend
        self._host = host = backend.host
        self._handlers = _copy_handlers(handlers, backend)
        self._mappings = mappings or Mappings()
        self._mappings.check_complete()
        host.project = self._mappings.write
        self._raise_errors = raise_errors
        self._failures: dict[str, list[BaseException]] = {}
        self._made_errors: list[BaseException] = []  # by `fail`
        self._receiver = Receiver(
            keys, self._store, clock, self.reports.append, offloader=_NoOffloader()
        )
        self.worker: DeliveryWorker = DeliveryWorker(
            host, clock, self.reports.append, jitter=_no_jitter, offloader=_NoOffloader()
        )
        self._caller = HandlerCaller(
            host.handle, host.read, clock, _no_jitter, self._handlers, _call, _NoOffloader()
        )

    async def deliver(self, *deliveries: SignedRequest | Sequence[SignedRequest]) -> DeliveryResult:
        """The same as `App.deliver`."""
        requests = _flatten(deliveries)
        await self._backend.check()
        answers = [await self._receive(request) for request in requests]
        calls = await self.work()
        last = answers[-1]
        if last.id is None:
            return last
        outcome = last.outcome or self._find_outcome(last.id)
        return DeliveryResult(last.status, last.id, outcome, tuple(calls))

    async def work(self) -> list[HandlerCall]:
        """The same as `App.work`."""
        await self._host.run(self._prepare)
        calls: list[HandlerCall] = []
        while True:
            while await self.worker.step():
                pass
            # Nobody else sees what a test registers.
            self._mappings.may_begin.update(own.name for own in self._mappings.registered)
            await apply_due(self._host, self._mappings)
            claimed = await self._host.run(self._claim)
            if not claimed:
                break
            calls += [call for job in claimed if (call := await self._run(job))]
        for error in (call.error for call in calls):
            is_foreseen = isinstance(error, FORESEEN) or error in self._made_errors
            if self._raise_errors and error is not None and not is_foreseen:
                raise error
        return calls

    async def tick(self, seconds: float | None = None) -> list[HandlerCall]:
        """The same as `App.tick`."""
        if seconds is None:
            milliseconds = await self._backend.until_due(list(self._handlers.by_name))
            seconds = max(milliseconds or 0, 0) / 1000
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not is_number or not 0 <= seconds <= _LONGEST_S:
            problem = f"pass seconds, a number from 0 to {_LONGEST_S:g}, not {seconds!r}"
            raise SettingInvalid(name="tick", problem=problem)
        self.clock.tick(seconds)
        await self._backend.advance(round(seconds * 1000))
        return await self.work()

    def fail(
        self,
        handler: Callable[..., Any] | str,
        error: BaseException | None = None,
        *,
        times: int = 1,
    ) -> None:
        """The same as `App.fail`."""
        error = RuntimeError("made to fail") if error is None else error
        if not isinstance(error, BaseException):
            problem = f"pass an exception, such as ConnectionError('away'), not {error!r}"
            raise SettingInvalid(name="error", problem=problem)
        if not isinstance(times, int) or isinstance(times, bool) or times < 1:
            problem = f"pass a positive whole number, not {times!r}"
            raise SettingInvalid(name="times", problem=problem)
        self._made_errors.append(error)
        self._failures.setdefault(self._find_name(handler), []).extend([error] * times)

    async def status(self) -> Status:
        """Count deliveries, records and jobs."""
        return await self._host.read(admin.status)

    async def users(self, query: str = "") -> list[FoundRow]:
        """Find users, or list all of them."""
        return await self._host.read(lambda store: store.find("user", query, ALL))

    async def organizations(self, query: str = "") -> list[FoundRow]:
        """Find organizations, or list all of them."""
        return await self._host.read(lambda store: store.find("organization", query, ALL))

    async def waiting(self) -> list[RefetchNeed]:
        """List the records that need a refetch."""
        return await self._host.read(lambda store: store.waiting(ALL))

    async def jobs(self) -> list[JobRow]:
        """List jobs, newest first."""
        return await self._host.read(lambda store: store.jobs.find(JobFilter(limit=ALL)))

    def _prepare(self, store: Store) -> None:
        store.jobs.register([handler.registered for handler in self._handlers])
        store.mappings.register(self._mappings.registered)
        # A test may date its deliveries at any time, so none is older than the installation.
        store.set_installed_at(0)

    def _claim(self, store: Store) -> list[ClaimedJob]:
        one_each = dict.fromkeys(self._handlers.by_name, 1)
        claimed = self._caller.claim(store, uuid.uuid4().hex, one_each)
        return sorted(claimed, key=lambda claim: claim.job.id)

    async def _run(self, claimed: ClaimedJob) -> HandlerCall | None:
        result = await self._caller.call(self._make_fail(claimed))
        outcome, report = result.outcome, result.report
        if outcome:
            await self._host.run(lambda store: store.jobs.finish(claimed.token, [outcome]))
        if report is None:
            return None
        self.reports.append(report)
        state = report.state if isinstance(report, HandlerFailed) else "done"
        return HandlerCall(report.handler, report.event, report.subject, state, result.error)

    def _make_fail(self, claimed: ClaimedJob) -> ClaimedJob:
        """Replace the handler if `fail` says so."""
        errors = self._failures.get(claimed.handler.name)
        if not errors:
            return claimed

        def fail(**arguments: Any) -> None:
            raise errors.pop(0)

        return replace(claimed, handler=replace(claimed.handler, function=fail))

    def _find_name(self, function_or_name: Callable[..., Any] | str) -> str:
        for handler in self._handlers:
            if function_or_name in (handler.name, handler.function):
                return handler.name
        raise HandlerUnknown(function_or_name, list(self._handlers.by_name))

    def _find_outcome(self, delivery_id: int) -> str | None:
        """Return the last outcome that was reported of a delivery."""
        for report in reversed(self.reports):
            if isinstance(report, DeliverySynced) and report.id == delivery_id:
                return report.outcome
            if isinstance(report, DeliveryFailed) and report.id == delivery_id:
                return "dead" if report.retry_in_s is None else "failed"
        return None

    async def _receive(self, request: SignedRequest) -> DeliveryResult:
        # The clock stands still, but the dates of deliveries go on.
        self.clock.ahead_ms = max(0, MOMENTS.now() - self.clock.now())
        signatures = [value.encode() for name, value in request.headers if name == HEADER]
        answer = await self._receiver.receive(signatures, request.body)
        if answer.status != 200:
            return DeliveryResult(answer.status)
        duplicate = answer.content["duplicate"]
        return DeliveryResult(200, int(answer.content["id"]), "duplicate" if duplicate else None)

    async def _store(
        self, delivery: NewDelivery, deadline: float | None, room: RequestBody | None
    ) -> StoreResult:
        [result] = await self._host.run(lambda store: store.add([delivery]))
        return result


@overload
def app(
    logto: LogtoWebhooks,
    connection: sa.Connection | None = None,
    *,
    keys: Sequence[str] = ...,
    clock: FrozenClock | None = ...,
    raise_errors: bool = ...,
) -> App: ...


@overload
def app(
    logto: LogtoWebhooks,
    connection: AsyncConnection,
    *,
    keys: Sequence[str] = ...,
    clock: FrozenClock | None = ...,
    raise_errors: bool = ...,
) -> AsyncApp: ...


def app(
    logto: LogtoWebhooks,
    connection: sa.Connection | AsyncConnection | None = None,
    *,
    keys: Sequence[str] = (SIGNING_KEY,),
    clock: FrozenClock | None = None,
    raise_errors: bool = True,
) -> App | AsyncApp:
    """Create an application under test with the handlers and the mapped tables of `logto`.

    Everything runs on your `connection`, in savepoints, so you can roll it back. The database must
    have the tables of this package. Without a connection, the application uses a SQLite database in
    memory with these tables; create your own tables on the `connection` of the returned
    application. Raises InvalidHandler, InvalidMapping, SettingInvalid.
    """
    backend = MemoryBackend() if connection is None else Backend(connection, logto.schema)
    async_app = AsyncApp(
        backend, clock or FrozenClock(), keys, logto.handlers, raise_errors, logto.mappings
    )
    is_sync = isinstance(backend.host, SavepointRunner)
    return App(async_app=async_app) if is_sync else async_app


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine, in a test with or without an event loop. With one, it must not wait."""
    if not is_loop_running():  # not in `except`: its error would be shown with each of `work`
        return asyncio.run(work)
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("a handler waits: in an asynchronous test, pass an AsyncConnection")


def _flatten(deliveries: Sequence[SignedRequest | Sequence[SignedRequest]]) -> list[SignedRequest]:
    requests: list[Any] = []
    for delivery in deliveries:
        requests += delivery if isinstance(delivery, Sequence) else [delivery]
    odd = [type(request).__name__ for request in requests if not isinstance(request, SignedRequest)]
    if odd or not requests:
        what = odd[0] if odd else "nothing"
        problem = (
            f"pass deliveries from testing.make, such as testing.make.user_created(), not {what}"
        )
        raise SettingInvalid(name="A delivery", problem=problem)
    return requests


def _copy_handlers(handlers: Handlers, backend: Backend) -> Handlers:
    try:
        return handlers.copy(backend.host.provides)
    except InvalidHandler as error:
        problem = error.problem
        if isinstance(backend.host, SavepointRunner):
            problem = (
                f"{problem}. If the handler is meant for an asynchronous engine, don't change it, "
                "but pass an AsyncConnection to testing.app"
            )
        raise InvalidHandler(name=error.name, problem=problem) from None


async def _call(handler: Handler, arguments: dict[str, Any]) -> None:
    if handler.is_async:
        await call_function(handler, arguments)
        return
    with hide_running_loop():
        call_function(handler, arguments)


class _NoOffloader(Offloader):
    """Calls functions directly, because nothing else runs on the event loop of a test."""

    async def run(self, function: Callable[[], T]) -> T:
        return function()

    async def give_way(self) -> None:
        pass


def _no_jitter() -> float:
    return 0.0
