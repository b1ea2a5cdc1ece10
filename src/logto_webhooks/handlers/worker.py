"""The worker: claim jobs, call their handlers, and write the outcomes."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from logto_webhooks.clock import Clock
from logto_webhooks.database.jobs import Queue
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.store import Store
from logto_webhooks.database.threads import MOST as MOST_ABANDONED
from logto_webhooks.database.threads import MOST_OF_ONE, AbandonedCalls
from logto_webhooks.deliveries import LARGE
from logto_webhooks.errors import StoreUnavailable, TimedOut, describe
from logto_webhooks.event_loop import wait_for_event
from logto_webhooks.handlers import Handler, Handlers
from logto_webhooks.handlers.call import LEASE_S, ClaimedJob, HandlerCaller, to_released
from logto_webhooks.handlers.watchdog import Watchdog
from logto_webhooks.instrumentation import CoroutineAbandoned, HandlerHeld, Observer, Stalled
from logto_webhooks.jobs import JobOutcome
from logto_webhooks.retries import MAX_LOSSES

POLL_S: Final = 1.0
LONGEST_STALL_S: Final = 5.0
MEND_S: Final = 300.0
MENDED_AT_ONCE: Final = 2_000  # waiting jobs
GRACE_S: Final = 5.0
CANCEL_S: Final = 1.0
TELL_S: Final = 60.0
CAREFUL_S: Final = 60.0
MOST: Final = 100  # claimed jobs of one handler
CLEARED_S: Final = 1.0  # a lost job that runs so long doesn't end its process right at the start
AHEAD_S: Final = 0.2  # jobs are claimed ahead if they can probably begin within this time


Outcome = tuple[str, JobOutcome]  # with the token of the claim
Turn = tuple[list[ClaimedJob], list[Outcome]]  # claimed jobs, and outcomes that weren't written


class ConcurrencyLimits:
    """Limits how many jobs of each handler a process runs at once, and how many it claims, so that
    no handler takes the places of another."""

    def __init__(
        self, handlers: Iterable[Handler], transactions: int, abandoned: AbandonedCalls
    ) -> None:
        """`transactions`: how many handlers may be in a transaction at once in total."""
        handlers = list(handlers)
        self._limits = {handler.name: _choose_limit(handler, transactions) for handler in handlers}
        self._places = {name: asyncio.Semaphore(limit) for name, limit in self._limits.items()}
        self._took_s: dict[str, float] = {}  # smoothed
        self._in_threads = {handler.name for handler in handlers if not handler.is_async}
        self._abandoned = abandoned

    def find_free(self, held: Mapping[str, int]) -> dict[str, int]:
        """Return how many more jobs of each handler to claim. Jobs of a fast handler are claimed
        ahead, many at a time. Those of a slow one are left to other processes."""
        blocked = self.find_blocked()
        free = {}
        for name, limit in self._limits.items():
            most = self._find_most(name)
            count = held.get(name, 0)
            if count < max(limit, most // 2) and name not in blocked:
                free[name] = most - count
        return free

    def find_surplus(self, held: Mapping[str, int]) -> dict[str, int]:
        """Return how many claimed jobs of each handler are for other processes, because the handler
        has become slow."""
        most = {name: self._find_most(name) for name in held}
        return {name: held[name] - most[name] for name in held if held[name] > 2 * most[name]}

    def _find_most(self, name: str) -> int:
        limit, took_s = self._limits[name], self._took_s.get(name, AHEAD_S)
        return max(limit, min(MOST, int(limit * AHEAD_S / max(took_s, 0.001))))

    def put_last(self, name: str) -> None:
        """Put a handler behind the others in the order of claims."""
        self._limits[name] = self._limits.pop(name)

    @contextlib.asynccontextmanager
    async def run(self, name: str) -> AsyncIterator[None]:
        """Wait until another job of a handler may run. It runs within the block."""
        async with self._places[name]:
            started = time.monotonic()
            yield  # if it wasn't called, or was cancelled, this raises
            took_s = time.monotonic() - started
            self._took_s[name] = 0.8 * self._took_s.get(name, took_s) + 0.2 * took_s

    def find_blocked(self) -> dict[str, int]:
        """Return the handlers that may not be called now, because they have too many abandoned
        calls, or all together too many abandoned threads, with their numbers of abandoned calls."""
        abandoned = self._abandoned.counts()
        blocked = {name: count for name, count in abandoned.items() if count >= MOST_OF_ONE}
        if sum(abandoned[name] for name in self._in_threads) >= MOST_ABANDONED:
            blocked |= {name: abandoned[name] for name in self._in_threads}
        return blocked


def _choose_limit(handler: Handler, transactions: int) -> int:
    if handler.options.concurrency:
        return handler.options.concurrency
    if handler.transaction is None:
        return MOST
    return max(1, transactions * 2 // 3)  # so a slow one leaves some to others


class JobWorker:
    """Runs the jobs of the handlers in this process. Any number of workers may run."""

    def __init__(
        self,
        host: HandlerRunner,
        clock: Clock,
        observe: Observer,
        jitter: Callable[[], float],
        handlers: Handlers,
        may_work: Callable[[], bool] = lambda: True,
    ) -> None:
        self._host = host
        self._observe = observe
        abandoned = self._abandoned = AbandonedCalls(
            lambda handler, stack: observe(CoroutineAbandoned(handler, stack))
        )
        self._caller = HandlerCaller(
            host.handle, host.read, clock, jitter, handlers, abandoned=abandoned
        )
        self._may_work = may_work
        self._is_spare = True  # until `may_work` returns True
        self._wake = asyncio.Event()
        self._stopping = False
        self._held: dict[int, ClaimedJob] = {}  # queue key -> its claimed job
        self._suspects: set[int] = set()  # queue keys of jobs that may end this process
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[int, asyncio.Task[None]] = {}  # queue key -> its task, not begun
        self._outcomes: list[Outcome] = []
        self._put_back: list[Outcome] = []  # outcomes to write later, because rows were locked
        self._put_back_until = 0.0
        self._careful_until = 0.0  # until then, don't wait for locks, because something is locked
        self._limits = ConcurrencyLimits(handlers, host.room, self._abandoned)
        self._transactions = asyncio.Semaphore(host.room)
        self._most = MOST  # jobs of a handler to claim; fewer after a turn that took too long
        self._renewed = time.monotonic()
        self._mend_at = self._renewed + MEND_S
        self._mended: Queue | None = None  # the last queue that was looked at
        self._reported: dict[str, float] = {}  # blocked handlers -> when that was reported
        self._watchdog = Watchdog(observe)
        self._coroutines = any(handler.is_async for handler in handlers)

    def wake(self) -> None:
        """Tell the worker that there may be jobs."""
        self._wake.set()

    def stop(self, wake: Callable[[], object] | None = None) -> None:
        """End `run` when the current jobs are done, or after some seconds. From another thread,
        pass a `wake` that wakes the worker's event loop."""
        self._stopping = True
        (wake or self.wake)()

    @property
    def woken(self) -> bool:
        """Whether `wake` was called since the last turn."""
        return self._wake.is_set()

    async def run(self) -> None:
        """Run jobs until stopped. If the database is unreachable, try again after a pause."""
        stalls = 0
        with self._watchdog.watching() if self._coroutines else contextlib.nullcontext():
            while not self._stopping:
                self._wake.clear()
                try:
                    self._is_spare = self._is_spare and not self._may_work()
                    claimed = 0 if self._is_spare else await self.turn()
                    stalls = 0
                except Exception as error:
                    stalls += 1
                    wait = min(0.1 * 2.0 ** min(stalls, 10), LONGEST_STALL_S)
                    self._observe(Stalled(describe(error), wait))
                    await asyncio.sleep(wait)
                    continue
                await asyncio.sleep(0)  # so that the next turn writes the outcomes of fast jobs
                if self._outcomes or (claimed and self._limits.find_free(self._count_held())):
                    continue
                await wait_for_event(self._wake, POLL_S)
            await self._end()

    async def drain(self) -> None:
        """Run until no job is due or running, or until stopped."""
        while not self._stopping:
            self._wake.clear()
            if not (await self.turn() or self._tasks or self._outcomes or self._put_back):
                return
            if self._tasks or self._put_back:
                await wait_for_event(self._wake, POLL_S)
        await self._end()

    async def turn(self) -> int:
        """Write the outcomes of jobs, and claim the next jobs. Return how many.

        Raises StoreUnavailable.
        """
        if time.monotonic() >= self._mend_at:
            await self._mend()
        self._release_surplus()
        token, done, held = uuid.uuid4().hex, self._outcomes, list(self._held.values())
        self._outcomes = []
        now = time.monotonic()
        if self._put_back and now >= self._put_back_until:
            done, self._put_back = self._put_back + done, []
        renewed = held if now - self._renewed > LEASE_S / 3 else []
        if blocked := self._limits.find_blocked():
            self._report_blocked(blocked)
        free = self._limits.find_free(self._count_held())
        room = {name: min(count, self._most) for name, count in free.items()}
        if not (done or renewed or room):
            return 0
        held_bytes: Counter[str] = Counter()
        for claimed in held:
            size = len(claimed.job.payload)
            held_bytes[claimed.handler.name] += size if size >= LARGE else 0
        step = partial(
            self._turn,
            token=token,
            done=done,
            renewed=renewed,
            room=room,
            most_losses=self._limit_losses(),
            held={claimed.job.queue_key_id: claimed.token for claimed in held},
            held_bytes=held_bytes,
        )
        try:
            result = await self._run_turn(partial(step, careful=now < self._careful_until), done)
        except TimedOut:
            self._outcomes = done + self._outcomes
            if now < self._careful_until:
                raise
            self._careful_until = time.monotonic() + CAREFUL_S
            return 0
        except BaseException:
            self._outcomes = done + self._outcomes
            self._most = max(1, min(self._most, max(room.values(), default=1)) // 2)
            raise
        self._most = min(MOST, 2 * self._most)
        if result is None:
            return 0
        new, locked = result
        if renewed:  # only after the commit, because otherwise the next turn must renew
            self._renewed = now
        self._try_again(locked)
        for claimed in new:
            self._held[claimed.job.queue_key_id] = claimed
            if claimed.job.losses:
                self._suspects.add(claimed.job.queue_key_id)
                self._limits.put_last(claimed.handler.name)
            task = asyncio.create_task(self._run_job(claimed))
            self._tasks.add(task)
            self._waiting[claimed.job.queue_key_id] = task
            task.add_done_callback(partial(self._forget, claimed))
        return len(new)

    def _turn(
        self,
        store: Store,
        *,
        token: str,
        done: list[Outcome],
        renewed: list[ClaimedJob],
        room: dict[str, int],
        most_losses: int,
        held: Mapping[int, str],
        held_bytes: Mapping[str, int],
        careful: bool,
    ) -> Turn:
        """Return the claimed jobs, and the outcomes that can't be written now."""
        locked = write_outcomes(store, done, renewed, careful=careful)
        new = self._caller.claim(
            store,
            token,
            room,
            most_losses=most_losses,
            skip_locked=careful,
            held=held,
            held_bytes=held_bytes,
        )
        return new, locked

    async def _mend(self) -> None:
        """Look for queues that are missing, at some waiting jobs in each turn, and insert them. The
        claim's transaction doesn't do it: accepting waits for that on SQLite.

        Raises StoreUnavailable. It is then done later.
        """
        self._mend_at = time.monotonic() + MEND_S
        find = partial(_find_missing_queues, after=self._mended)
        missing, self._mended = await self._host.read(find)
        if missing:
            await self._host.run(lambda store: store.jobs.add_queues(missing))
        if self._mended is not None:  # the next turn goes on
            self._mend_at = time.monotonic()

    async def _run_turn(self, step: Callable[[Store], Turn], done: list[Outcome]) -> Turn | None:
        """Run a step. Return None if only outcomes were written, because one of them can't be.

        Raises StoreUnavailable.
        """
        try:
            return await self._host.run(step)
        except StoreUnavailable:
            raise
        except Exception:
            if await self._write_apart(done):
                return None
            raise  # the cause is another

    async def _write_apart(self, done: list[Outcome]) -> bool:
        """Write outcomes, each time half as many at once, so that one that can't be written doesn't
        block others. The job of that one fails. Return whether there is one.

        Raises StoreUnavailable. Writing an outcome again does nothing.
        """
        if not done:
            return False
        try:
            write = partial(write_outcomes, done=done, careful=True)
            self._try_again(await self._host.run(write))
            return False
        except StoreUnavailable:
            raise
        except Exception as error:
            if len(done) == 1:
                await self._fail_unwritten(*done[0], error)
                return True
        half = len(done) // 2
        has_failed = await self._write_apart(done[:half])
        return await self._write_apart(done[half:]) or has_failed

    async def _fail_unwritten(self, token: str, outcome: JobOutcome, error: Exception) -> None:
        """Make a job fail because its outcome can't be written. Otherwise, its lease expires."""
        fail = partial(self._caller.fail_unwritten, token=token, outcome=outcome, error=error)
        try:
            report = await self._host.run(fail)
        except StoreUnavailable:
            raise
        except Exception as another:
            self._observe(Stalled(describe(another), LEASE_S))
        else:
            if report:
                self._observe(report)

    def _try_again(self, locked: list[Outcome]) -> None:
        """Write outcomes later whose rows are locked now."""
        if locked:
            self._put_back += locked
            self._put_back_until = time.monotonic() + POLL_S

    def _count_held(self) -> Counter[str]:
        return Counter(claimed.handler.name for claimed in self._held.values())

    def _report_blocked(self, blocked: dict[str, int]) -> None:
        """Report the handlers that are no longer called, each at most every TELL_S."""
        now = time.monotonic()
        for name, count in blocked.items():
            if now - self._reported.get(name, now - TELL_S) >= TELL_S:
                self._reported[name] = now
                self._observe(HandlerHeld(name, count, self._abandoned.counts().total()))

    async def _run_job(self, claimed: ClaimedJob) -> None:
        # Waiting for a place doesn't count toward the handler's time limit.
        turn = self._transactions if claimed.handler.transaction else contextlib.nullcontext()
        try:
            async with self._limits.run(claimed.handler.name), turn:
                if self._stopping or claimed.handler.name in self._limits.find_blocked():
                    raise asyncio.CancelledError  # it wasn't called yet
                self._waiting.pop(claimed.job.queue_key_id, None)
                with self._suspecting(claimed):
                    result = await self._caller.call(claimed)
            if self._stopping and type(result.error) is asyncio.CancelledError:
                # A thread goes on until this process ends, and so does an abandoned coroutine.
                goes_on = (
                    not claimed.handler.is_async or claimed.handler.name in self._abandoned.counts()
                )
                released = to_released(claimed, LEASE_S if goes_on else 0)
                self._outcomes.append((claimed.token, released))
                return
            if result.outcome:
                self._outcomes.append((claimed.token, result.outcome))
            if result.report:
                self._observe(result.report)
        except asyncio.CancelledError:
            self._outcomes.append((claimed.token, to_released(claimed)))
        finally:
            # Another job has the queue if this one's claim was lost.
            if self._held.get(claimed.job.queue_key_id) is claimed:
                del self._held[claimed.job.queue_key_id]
                self._clear(claimed)
            self._wake.set()

    def _release_surplus(self) -> None:
        """Release jobs that were claimed ahead, and can't begin soon any more."""
        for name, surplus in self._limits.find_surplus(self._count_held()).items():
            waiting = [
                key
                for key, claimed in self._held.items()
                if key in self._waiting and claimed.handler.name == name
            ]
            for key in waiting[-surplus:]:
                self._waiting[key].cancel()

    def _limit_losses(self) -> int:
        """Return how often a job may have been lost to be claimed now: jobs that may have ended a
        process run one at a time, so that none is lost with another. Beside a job that was lost
        twice, none loses its last attempt."""
        if self._suspects:
            return 0
        twice = any(claimed.job.losses > 1 for claimed in self._held.values())
        return 1 if twice else MAX_LOSSES

    @contextlib.contextmanager
    def _suspecting(self, claimed: ClaimedJob) -> Iterator[None]:
        """Keep a lost job suspect for CLEARED_S, ten times as long after each further loss."""
        if not claimed.job.losses:
            yield
            return
        seconds = CLEARED_S * 10 ** (min(claimed.job.losses, MAX_LOSSES) - 1)
        clearing = asyncio.get_running_loop().call_later(seconds, self._clear, claimed)
        try:
            yield
        finally:
            clearing.cancel()

    def _clear(self, claimed: ClaimedJob) -> None:
        if claimed.job.queue_key_id in self._suspects:
            self._suspects.remove(claimed.job.queue_key_id)
            self._wake.set()

    def _forget(self, claimed: ClaimedJob, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._waiting.get(claimed.job.queue_key_id) is task:
            del self._waiting[claimed.job.queue_key_id]
        if self._held.get(claimed.job.queue_key_id) is claimed:  # cancelled before `_run_job` began
            del self._held[claimed.job.queue_key_id]
            self._clear(claimed)
            self._outcomes.append((claimed.token, to_released(claimed)))
            self._wake.set()

    async def _end(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_S)
        for _ in range(2):  # tasks that still don't end are abandoned
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=CANCEL_S)
        self._abandoned.cancel()
        with contextlib.suppress(Exception):  # another process runs these jobs again
            async with asyncio.timeout(GRACE_S):
                await self._write_apart(self._put_back + self._outcomes)


def _find_missing_queues(store: Store, after: Queue | None) -> tuple[list[Queue], Queue | None]:
    return store.jobs.find_missing_queues(after, MENDED_AT_ONCE)


def write_outcomes(
    store: Store,
    done: list[Outcome],
    renewed: Sequence[ClaimedJob] = (),
    *,
    careful: bool = False,
) -> list[Outcome]:
    """Write outcomes, and renew the leases of running jobs. With `careful`, don't wait for locked
    queues or jobs, and return the outcomes that weren't written because of that."""
    locked: list[Outcome] = []
    if careful:
        queue_key_ids = [outcome.queue_key_id for _, outcome in done] + [
            claimed.job.queue_key_id for claimed in renewed
        ]
        busy, busy_jobs = store.jobs.find_locked(queue_key_ids, [outcome.id for _, outcome in done])
        for token, outcome in done:
            if outcome.queue_key_id in busy or outcome.id in busy_jobs:
                locked.append((token, outcome))
                if outcome.queue_key_id not in busy:  # or another process would claim it
                    store.jobs.renew(token, [outcome.queue_key_id], LEASE_S)
        done = [finished for finished in done if finished not in locked]
        renewed = [claimed for claimed in renewed if claimed.job.queue_key_id not in busy]
    by_token: dict[str, list[JobOutcome]] = {}
    for claimed_by, outcome in done:
        by_token.setdefault(claimed_by, []).append(outcome)
    if len(by_token) + len(renewed) > 1:
        finished = [outcome.queue_key_id for _, outcome in done]
        store.jobs.lock(finished + [claimed.job.queue_key_id for claimed in renewed])
    for claimed_by, outcomes in by_token.items():
        store.jobs.finish(claimed_by, outcomes)  # without those of lost jobs
    for held in renewed:
        store.jobs.renew(held.token, [held.job.queue_key_id], LEASE_S)
    return locked
