"""Running jobs: claim lines, call handlers, decide about what failed; over and over.

One transaction writes what has become of jobs and claims the next. A handler that asks for a
transaction gets one of its own, in which its job is done, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.core import local
from logto_webhooks.core.events.local import UserRow
from logto_webhooks.core.jobs import Job, JobOutcome
from logto_webhooks.core.lifecycle import (
    JOB_MOVES,
    MAX_LOSSES,
    Dead,
    Drop,
    JobMove,
    JobState,
    Retry,
    after_job_failure,
)
from logto_webhooks.core.ports import Clock, HandlerHost, Observer, Store
from logto_webhooks.core.record import Key
from logto_webhooks.core.reports import HandlerFailed, HandlerRan, Stalled
from logto_webhooks.errors import ClaimLost, Discard, JobLost, described
from logto_webhooks.service import call
from logto_webhooks.service.handlers import Handler, Handlers

SLOTS: Final = 100
LEASE_S: Final = 15.0
POLL_S: Final = 1.0
LONGEST_STALL_S: Final = 5.0
MEND_S: Final = 300.0
GRACE_S: Final = 5.0
_ERROR_CHARS: Final = 8_000


class Held(Struct, frozen=True):
    """A job in hand."""

    job: Job
    token: str
    user: UserRow | None
    started: float


class Runner:
    """Runs the jobs of the handlers whose code is here. Any number may run."""

    def __init__(
        self,
        host: HandlerHost,
        clock: Clock,
        observe: Observer,
        jitter: Callable[[], float],
        handlers: Handlers,
        may_work: Callable[[], bool] = lambda: True,
    ) -> None:
        self._host = host
        self._clock = clock
        self._observe = observe
        self._jitter = jitter
        self._handlers = handlers
        self._may_work = may_work
        self._wake = asyncio.Event()
        self._stopping = False
        self._held: dict[int, Held] = {}  # line -> its job
        self._tasks: set[asyncio.Task[None]] = set()
        self._outcomes: list[tuple[str, JobOutcome]] = []
        self._rooms = {
            each.name: asyncio.Semaphore(each.options.concurrency)
            for each in handlers
            if each.options.concurrency
        }
        self._transactions = asyncio.Semaphore(host.room)
        self._renewed = self._mended = time.monotonic()

    def wake(self) -> None:
        """Tell the runner that there may be jobs."""
        self._wake.set()

    def stop(self) -> None:
        """End `run`, once what is in hand is done, or after some seconds."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Run jobs until stopped. An unreachable database is tried again."""
        stalls = 0
        while not self._stopping:
            self._wake.clear()
            try:
                claimed = await self.turn() if self._may_work() else 0
                stalls = 0
            except Exception as error:
                stalls += 1
                wait = min(0.1 * 2.0 ** min(stalls, 10), LONGEST_STALL_S)
                self._observe(Stalled(described(error), wait))
                await asyncio.sleep(wait)
                continue
            if not claimed and not self._outcomes:
                await self._sleep(POLL_S)
        await self._end()

    async def drain(self) -> None:
        """Run until no job is due, and those in hand are done; or until stopped."""
        while not self._stopping:
            self._wake.clear()
            if not (await self.turn() or self._tasks or self._outcomes):
                return
            if self._tasks:
                await self._sleep(POLL_S)
        await self._end()

    async def turn(self) -> int:
        """Write what has become of jobs, and claim the next; return how many.

        Raises StoreUnavailable.
        """
        token, done, held = uuid.uuid4().hex, self._outcomes, list(self._held.values())
        self._outcomes = []
        try:
            new = await self._host.run(partial(self._turn, token=token, done=done, held=held))
        except BaseException:
            self._outcomes = done + self._outcomes
            raise
        for each in new:
            self._held[each.job.line_id] = each
            task = asyncio.create_task(self._do(each))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return len(new)

    def _turn(
        self, store: Store, *, token: str, done: list[tuple[str, JobOutcome]], held: list[Held]
    ) -> list[Held]:
        _finish(store, done)
        now = time.monotonic()
        if held and now - self._renewed > LEASE_S / 3:
            self._renewed = now
            for each in held:
                store.jobs.renew(each.token, [each.job.line_id], LEASE_S)
        if now - self._mended > MEND_S:
            self._mended = now
            store.jobs.mend()
        names = [each.name for each in self._handlers]
        room = SLOTS - len(held)
        if room <= 0 or not names:
            return []
        # Of those that may have ended a process, one at a time: it takes no other with it again.
        may_be_lost = not any(each.job.losses for each in held)
        claimed = store.jobs.claim(token, names, room, LEASE_S, lost=may_be_lost)
        return [Held(job, token, self._user(store, job), now) for job in claimed]

    def _user(self, store: Store, job: Job) -> UserRow | None:
        handler = self._handlers.get(job.handler)
        kind, _, logto_id = job.subject.partition(":")
        if handler is None or not handler.asks_for("user") or kind != "user":
            return None
        key = Key("user", logto_id)
        record = store.inbox.known(key).get(key)
        return None if record is None else local.user_row(record)

    async def _do(self, held: Held) -> None:
        handler = self._handlers.get(held.job.handler)
        assert handler is not None
        try:
            async with self._room(handler):
                written = await self._call(handler, held)
        except ClaimLost:
            written = True  # somebody else has it; nothing of ours was written
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and self._stopping:
                self._give_back(handler, held)
                raise
            self._failed(handler, held, error)
            written = False
        else:
            took = time.monotonic() - held.started
            self._observe(HandlerRan(*_names(held.job), round(took * 1000, 1)))
            if not written:
                self._outcomes.append((held.token, _outcome(held.job, JobMove.FINISH)))
        finally:
            self._held.pop(held.job.line_id, None)
            self._wake.set()

    @contextlib.asynccontextmanager
    async def _room(self, handler: Handler) -> AsyncIterator[None]:
        """Wait until there is room for one more; that is no time of the handler's."""
        async with contextlib.AsyncExitStack() as stack:
            if handler.name in self._rooms:
                await stack.enter_async_context(self._rooms[handler.name])
            if handler.transaction is not None:
                await stack.enter_async_context(self._transactions)
            yield

    async def _call(self, handler: Handler, held: Held) -> bool:
        """Call; return whether the job is written as done already."""
        job, age = held.job, handler.options.max_age_s
        if job.losses >= MAX_LOSSES:
            raise JobLost(times=job.losses)
        if age is not None and self._clock.now() - job.occurred_at > age * 1000:
            raise Discard(f"older than {age:g} s")
        arguments = call.filled(handler, job, held.user)
        wish = handler.transaction
        if wish is None:
            await call.call(handler, arguments)
            return False
        name = next(each.name for each in handler.wishes if each.kind == "transaction")

        def with_transaction(given: Any) -> Any:
            return handler.function(**arguments | {name: given})

        def finish(store: Store) -> None:
            if store.jobs.finish(held.token, [_outcome(job, JobMove.FINISH)]):
                raise ClaimLost(count=1)

        async with call.limit(handler):
            await self._host.handle(wish, with_transaction, finish)
        return True

    def _failed(self, handler: Handler, held: Held, error: BaseException) -> None:
        options, job = handler.options, held.job
        decision = after_job_failure(
            error, job.failures, self._jitter(), options.max_attempts, options.waits
        )
        text = "".join(traceback.format_exception(error))[-_ERROR_CHARS:]
        match decision:
            case Drop(why):
                outcome = _outcome(job, JobMove.DISCARD, error=why)
            case Dead():
                outcome = _outcome(job, JobMove.GIVE_UP, error=text, failed=True)
            case Retry(after):
                outcome = _outcome(job, JobMove.RETRY, error=text, failed=True, after_s=after)
        self._outcomes.append((held.token, outcome))
        wait = decision.after_s if isinstance(decision, Retry) else None
        state = outcome.state.value
        self._observe(HandlerFailed(*_names(job), type(error).__name__, state, wait))

    def _give_back(self, handler: Handler, held: Held) -> None:
        """Let somebody else do it; a thread isn't stopped, but ends with this process."""
        after = 0 if handler.is_async else LEASE_S
        outcome = _outcome(held.job, JobMove.RETRY, counts=False, after_s=after)
        self._outcomes.append((held.token, outcome))

    async def _end(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_S)
        for task in self._tasks:
            task.cancel()
        if self._tasks:  # who won't be cancelled is left behind
            await asyncio.wait(self._tasks, timeout=GRACE_S)
        with contextlib.suppress(Exception):  # they are done again by the next
            async with asyncio.timeout(GRACE_S):
                await self._host.run(partial(_finish, done=self._outcomes))

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)


def _finish(store: Store, done: list[tuple[str, JobOutcome]]) -> None:
    by_token: dict[str, list[JobOutcome]] = {}
    for claimed_by, outcome in done:
        by_token.setdefault(claimed_by, []).append(outcome)
    for claimed_by, outcomes in by_token.items():
        store.jobs.finish(claimed_by, outcomes)  # what was lost is somebody else's now


def _names(job: Job) -> tuple[int, str, str, str, int]:
    return job.id, job.handler, job.event, job.subject, job.attempts + 1


def _outcome(job: Job, move: JobMove, **more: Any) -> JobOutcome:
    state = JOB_MOVES[JobState.WAITING, move]
    return JobOutcome(id=job.id, line_id=job.line_id, state=state, **more)
