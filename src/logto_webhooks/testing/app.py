"""`testing.app`: a receiver, a worker and a database for tests, without a server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from msgspec.structs import replace

from logto_webhooks.apply import DeliveryWorker
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery, Status, StoreResult
from logto_webhooks.errors import Discard, HandlerUnknown, InvalidHandler, RetryLater
from logto_webhooks.handlers import Handler, Handlers
from logto_webhooks.handlers.call import ClaimedJob, JobExecutor, call_function
from logto_webhooks.ingest import Receiver
from logto_webhooks.instrumentation import TelemetryEvent
from logto_webhooks.jobs import JobFilter, JobRow
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.signing_keys import HEADER, VerifiedBody
from logto_webhooks.testing import backend
from logto_webhooks.testing.backend import Backend, open_in_memory, open_on_connection
from logto_webhooks.testing.clock import FrozenClock
from logto_webhooks.testing.make import SIGNING_KEY
from logto_webhooks.testing.results import DeliveryResult, HandlerCall, to_handler_call, to_outcome
from logto_webhooks.testing.transactions import hide_running_loop

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncConnection

    from logto_webhooks.app import LogtoWebhooks

T = TypeVar("T")


class App:
    """An application under test, on SQLite in memory. `testing.app` creates one with handlers."""

    def __init__(
        self,
        *,
        keys: Sequence[str] = (SIGNING_KEY,),
        clock: FrozenClock | None = None,
        playing: AsyncApp | None = None,
    ) -> None:
        """`playing` is what it makes usable without `await`."""
        clock = clock or FrozenClock()
        self._app = playing or AsyncApp(open_in_memory(), clock, keys, Handlers(), True)

    @property
    def connection(self) -> sa.Connection:
        """The connection that it uses, for your own tables and queries."""
        connection: Any = self._app.connection
        return cast("sa.Connection", connection)

    @property
    def clock(self) -> FrozenClock:
        """Its clock, which `tick` moves."""
        return self._app.clock

    @property
    def reports(self) -> list[TelemetryEvent]:
        """Everything that was reported to observers."""
        return self._app.reports

    def deliver(self, *deliveries: SignedRequest | Sequence[SignedRequest]) -> DeliveryResult:
        """Receive deliveries, apply what is due, and run the handlers. Returns the result of the
        last delivery.

        Raises what a handler raised, unless `fail` made it fail or `raise_errors` is off;
        SettingInvalid for anything that `testing.make` didn't make; SchemaMismatch.
        """
        return _run(self._app.deliver(*deliveries))

    def work(self) -> list[HandlerCall]:
        """Apply everything that is due now, and run the handlers. Raises as `deliver`."""
        return _run(self._app.work())

    def tick(self, seconds: float | None = None) -> list[HandlerCall]:
        """Move the clock, by default to the next retry, and work. Raises as `deliver`."""
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
        """Count deliveries and records."""
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
    """Create an application under test with the handlers of `logto`.

    Everything happens on your `connection`, in savepoints, and you roll it back. Its database must
    have the tables of this package. Without a connection, it uses a SQLite database in memory,
    which has these tables: create yours on the `connection` of the returned application. Raises
    InvalidHandler, SettingInvalid.
    """
    clock = clock or FrozenClock()
    stage = open_in_memory() if connection is None else open_on_connection(connection, logto.schema)
    made = AsyncApp(stage, clock, keys, logto.handlers, raise_errors)
    is_awaited = hasattr(connection, "run_sync")
    return made if is_awaited else App(playing=made)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine, in a test with or without an event loop. With one it must not wait."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("a handler waits: in an asynchronous test give an AsyncConnection")


ALL = 1_000_000


class AsyncApp:
    """An application under test with asynchronous methods. `testing.app` creates one."""

    def __init__(
        self,
        stage: Backend,
        clock: FrozenClock,
        keys: Sequence[str],
        handlers: Handlers,
        raise_errors: bool,
    ) -> None:
        """Raises InvalidHandler for a handler that asks for what the stage hasn't got."""
        self.clock: FrozenClock = clock
        self.reports: list[TelemetryEvent] = []
        self.connection: sa.Connection | AsyncConnection = stage.connection
        self._stage = stage
        self._host = stage.host
        self._handlers = _fitted(handlers, stage)
        self._raise_errors = raise_errors
        self._failures: dict[str, list[BaseException]] = {}
        self._made: list[BaseException] = []  # errors, by `fail`
        self._receiver = Receiver(keys, self._store, clock, self.reports.append, _here)
        self.worker: DeliveryWorker = DeliveryWorker(
            stage.host, clock, self.reports.append, jitter=_no_jitter
        )
        self._attempts = JobExecutor(stage.host.handle, clock, _no_jitter, self._handlers, _call)

    async def deliver(self, *deliveries: SignedRequest | Sequence[SignedRequest]) -> DeliveryResult:
        """Receive deliveries, apply what is due, and run the handlers. Returns the result of the
        last delivery.

        Raises what a handler raised, unless `fail` made it fail or `raise_errors` is off;
        SettingInvalid for anything that `testing.make` didn't make; SchemaMismatch.
        """
        made = backend.check_deliveries(deliveries)
        await self._stage.check()
        answers = [await self._receive(each) for each in made]
        runs = await self.work()
        last = answers[-1]
        if last.id is None:
            return last
        outcome = last.outcome or to_outcome(last.id, self.reports)
        return DeliveryResult(last.status, last.id, outcome, tuple(runs))

    async def work(self) -> list[HandlerCall]:
        """Apply everything that is due now, and run the handlers. Raises as `deliver`."""
        await self._host.run(self._prepare)
        runs: list[HandlerCall] = []
        while True:
            while await self.worker.step():
                pass
            held = await self._host.run(self._claim)
            if not held:
                break
            runs += [run for each in held if (run := await self._run(each))]
        self._raise_unforeseen(runs)
        return runs

    async def tick(self, seconds: float | None = None) -> list[HandlerCall]:
        """Move the clock, by default to the next retry, and work. Raises as `deliver`."""
        if seconds is None:
            names = [each.name for each in self._handlers]
            seconds = max(await self._stage.until_due(names) or 0, 0) / 1000
        self.clock.tick(backend.check_seconds(seconds))
        await self._stage.elapse(round(seconds * 1000))
        return await self.work()

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
        error = backend.check_error(error)
        self._made.append(error)
        self._failures.setdefault(self._name(handler), []).extend(
            [error] * backend.check_times(times)
        )

    async def status(self) -> Status:
        """Count deliveries and records."""
        return await self._host.read(lambda store: store.status())

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
        store.jobs.register([each.registered for each in self._handlers])
        # No delivery is older than the installation: it may be of any time that a test likes.
        store.set_installed_at(0)

    def _claim(self, store: Store) -> list[ClaimedJob]:
        one_each = dict.fromkeys((each.name for each in self._handlers), 1)
        held = self._attempts.claim(store, uuid.uuid4().hex, one_each)
        return sorted(held, key=lambda each: each.job.id)

    async def _run(self, held: ClaimedJob) -> HandlerCall | None:
        attempted = await self._attempts.make(self._failing(held))
        outcome = attempted.outcome
        if outcome:
            await self._host.run(lambda store: store.jobs.finish(held.token, [outcome]))
        if attempted.report is None:
            return None
        self.reports.append(attempted.report)
        return to_handler_call(attempted.report, attempted.error)

    def _raise_unforeseen(self, runs: Sequence[HandlerCall]) -> None:
        for error in (each.error for each in runs):
            if error is None or isinstance(error, RetryLater | Discard) or error in self._made:
                continue
            if self._raise_errors:
                raise error

    def _failing(self, held: ClaimedJob) -> ClaimedJob:
        """The same, unless its handler was made to fail."""
        failures = self._failures.get(held.handler.name)
        if not failures:
            return held

        def fail(**arguments: Any) -> None:
            raise failures.pop(0)

        return replace(held, handler=replace(held.handler, function=fail))

    def _name(self, handler: Callable[..., Any] | str) -> str:
        for each in self._handlers:
            if handler in (each.name, each.function):
                return each.name
        raise HandlerUnknown(handler, [each.name for each in self._handlers])

    async def _receive(self, delivery: SignedRequest) -> DeliveryResult:
        signatures = [value.encode() for name, value in delivery.headers if name == HEADER]
        answer = await self._receiver.receive(signatures, delivery.body)
        if answer.status != 200:
            return DeliveryResult(answer.status)
        duplicate = answer.content["duplicate"]
        return DeliveryResult(200, int(answer.content["id"]), "duplicate" if duplicate else None)

    async def _store(self, delivery: NewDelivery, deadline: float | None) -> StoreResult:
        [accepted] = await self._host.run(lambda store: store.add([delivery]))
        return accepted


def _fitted(handlers: Handlers, stage: Backend) -> Handlers:
    try:
        return handlers.copy(stage.host.provides)
    except InvalidHandler as error:
        problem = f"{error.problem}. {stage.more}".rstrip()
        raise InvalidHandler(name=error.name, problem=problem) from None


async def _call(handler: Handler, arguments: dict[str, Any]) -> None:
    if handler.is_async:
        await call_function(handler, arguments)
        return
    with hide_running_loop():
        call_function(handler, arguments)


async def _here(
    identify: Callable[[VerifiedBody, int], NewDelivery], body: VerifiedBody, at: int
) -> NewDelivery:
    return identify(body, at)


def _no_jitter() -> float:
    return 0.0
