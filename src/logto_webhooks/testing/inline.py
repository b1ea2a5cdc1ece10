"""The whole way of a delivery, up to its handlers, within a test: no server and no thread."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from msgspec.structs import replace

from logto_webhooks.adapters.hosts.beside import beside_the_loop
from logto_webhooks.core.delivery import Delivery
from logto_webhooks.core.inbox import Accepted
from logto_webhooks.core.jobs import JobFilter, JobRow
from logto_webhooks.core.log import INSTALLED
from logto_webhooks.core.ports import Found, Progress, Status, Store, Waiting
from logto_webhooks.core.reports import Report
from logto_webhooks.core.signature import HEADER, VerifiedBody
from logto_webhooks.errors import Discard, HandlerRefused, HandlerUnknown, RetryLater
from logto_webhooks.samples.signed import Signed
from logto_webhooks.service.attempt import Attempts, Held
from logto_webhooks.service.call import called
from logto_webhooks.service.handlers import Handler, Handlers
from logto_webhooks.service.receive import Receiver
from logto_webhooks.service.work import Worker
from logto_webhooks.testing import given
from logto_webhooks.testing.clock import FrozenClock
from logto_webhooks.testing.outcomes import Delivered, Run, outcome_of, run_of
from logto_webhooks.testing.stage import Stage

T = TypeVar("T")
ALL = 1_000_000


class AsyncApp:
    """An application under test, of which everything is awaited. `testing.app` makes one."""

    def __init__(
        self,
        stage: Stage,
        clock: FrozenClock,
        keys: Sequence[str],
        handlers: Handlers,
        raise_errors: bool,
    ) -> None:
        """Raises HandlerRefused for a handler that asks for what the stage hasn't got."""
        self.clock: FrozenClock = clock
        self.reports: list[Report] = []
        self._stage = stage
        self._host = stage.host
        self._handlers = _fitted(handlers, stage)
        self._raise_errors = raise_errors
        self._failures: dict[str, list[BaseException]] = {}
        self._made: list[BaseException] = []  # errors, by `fail`
        self._receiver = Receiver(keys, self._store, clock, self.reports.append, _here)
        self.worker: Worker = Worker(stage.host, clock, self.reports.append, jitter=_no_jitter)
        self._attempts = Attempts(stage.host.handle, clock, _no_jitter, self._handlers, _call)

    async def deliver(self, *deliveries: Signed | Sequence[Signed]) -> Delivered:
        """Receive deliveries, apply what is due, run the handlers; tell what became of the last.

        Raises what a handler raised that wasn't made to fail, unless `raise_errors` is off;
        SettingInvalid for what `testing.make` didn't make; SchemaMismatch.
        """
        made = given.deliveries(deliveries)
        await self._stage.check()
        answers = [await self._receive(each) for each in made]
        runs = await self.work()
        last = answers[-1]
        if last.id is None:
            return last
        outcome = last.outcome or outcome_of(last.id, self.reports)
        return Delivered(last.status, last.id, outcome, tuple(runs))

    async def work(self) -> list[Run]:
        """Apply all that is due now, and run the handlers of what that brings. Raises as above."""
        await self._host.run(self._prepare)
        runs: list[Run] = []
        while True:
            while await self.worker.step():
                pass
            held = await self._host.run(self._claim)
            if not held:
                break
            runs += [run for each in held if (run := await self._run(each))]
        self._raise_unforeseen(runs)
        return runs

    async def tick(self, seconds: float | None = None) -> list[Run]:
        """Let time pass, by default until the next retry is due, and work. Raises as above."""
        if seconds is None:
            names = [each.name for each in self._handlers]
            seconds = max(await self._stage.until_due(names) or 0, 0) / 1000
        self.clock.tick(given.seconds(seconds))
        await self._stage.elapse(round(seconds * 1000))
        return await self.work()

    def fail(
        self,
        handler: Callable[..., Any] | str,
        error: BaseException | None = None,
        *,
        times: int = 1,
    ) -> None:
        """Let the next calls of a handler, or of that name, raise instead.

        Raises HandlerUnknown, SettingInvalid.
        """
        error = given.error(error)
        self._made.append(error)
        self._failures.setdefault(self._name(handler), []).extend([error] * given.times(times))

    async def status(self) -> Status:
        """Count deliveries and records."""
        return await self._host.read(lambda store: store.status())

    async def users(self, query: str = "") -> list[Found]:
        """Find users; all of them if nothing is asked for."""
        return await self._host.read(lambda store: store.find("user", query, ALL))

    async def organizations(self, query: str = "") -> list[Found]:
        """Find organizations; all of them if nothing is asked for."""
        return await self._host.read(lambda store: store.find("organization", query, ALL))

    async def waiting(self) -> list[Waiting]:
        """List the records that only Logto can settle."""
        return await self._host.read(lambda store: store.waiting(ALL))

    async def jobs(self) -> list[JobRow]:
        """List the jobs of handlers, the newest first."""
        return await self._host.read(lambda store: store.jobs.find(JobFilter(limit=ALL)))

    def _prepare(self, store: Store) -> None:
        store.jobs.register([each.registered for each in self._handlers])
        # No delivery is older than the installation: it may be of any time that a test likes.
        store.progress(INSTALLED, Progress(0, 0))

    def _claim(self, store: Store) -> list[Held]:
        one_each = dict.fromkeys((each.name for each in self._handlers), 1)
        held = self._attempts.claim(store, uuid.uuid4().hex, one_each)
        return sorted(held, key=lambda each: each.job.id)

    async def _run(self, held: Held) -> Run | None:
        attempted = await self._attempts.make(self._failing(held))
        outcome = attempted.outcome
        if outcome:
            await self._host.run(lambda store: store.jobs.finish(held.token, [outcome]))
        if attempted.report is None:
            return None
        self.reports.append(attempted.report)
        return run_of(attempted.report, attempted.error)

    def _raise_unforeseen(self, runs: Sequence[Run]) -> None:
        for error in (each.error for each in runs):
            if error is None or isinstance(error, RetryLater | Discard) or error in self._made:
                continue
            if self._raise_errors:
                raise error

    def _failing(self, held: Held) -> Held:
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

    async def _receive(self, delivery: Signed) -> Delivered:
        signatures = [value.encode() for name, value in delivery.headers if name == HEADER]
        answer = await self._receiver.receive(signatures, delivery.body)
        if answer.status != 200:
            return Delivered(answer.status)
        duplicate = answer.content["duplicate"]
        return Delivered(200, int(answer.content["id"]), "duplicate" if duplicate else None)

    async def _store(self, delivery: Delivery, deadline: float | None) -> Accepted:
        [accepted] = await self._host.run(lambda store: store.add([delivery]))
        return accepted


def _fitted(handlers: Handlers, stage: Stage) -> Handlers:
    try:
        return handlers.copy(stage.host.provides)
    except HandlerRefused as error:
        problem = f"{error.problem}. {stage.more}".rstrip()
        raise HandlerRefused(name=error.name, problem=problem) from None


async def _call(handler: Handler, arguments: dict[str, Any]) -> None:
    if handler.is_async:
        await called(handler, arguments)
        return
    with beside_the_loop():
        called(handler, arguments)


async def _here(
    identify: Callable[[VerifiedBody, int], Delivery], body: VerifiedBody, at: int
) -> Delivery:
    return identify(body, at)


def _no_jitter() -> float:
    return 0.0
