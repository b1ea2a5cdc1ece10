"""Group commit: store all waiting deliveries in one transaction, and retry until they are stored.

A request is always answered by its deadline. But its delivery was verified, and Logto won't send it
again. So it is spooled, or else stored late, however long that takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.batch_sizes import count_fitting
from logto_webhooks.clock import Clock
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Checkpoint, Store
from logto_webhooks.deliveries import NewDelivery, StoreResult
from logto_webhooks.errors import (
    LogtoWebhooksError,
    NoAnswer,
    RowRejected,
    StoreUnavailable,
    TimedOut,
    describe,
)
from logto_webhooks.event_loop import run_in_thread
from logto_webhooks.ingest.body import RequestBody
from logto_webhooks.ingest.spool import SpoolDirectory
from logto_webhooks.instrumentation import (
    DeliveriesLost,
    NotStored,
    Observer,
    Retrying,
    Spooled,
    StoredLate,
)

MAX_ROWS: Final = 512
MAX_BYTES: Final = 16 * 2**20
LONGEST_WAIT_S: Final = 8.0  # from the request's head: Logto waits 10 s, and sends once
TRY_S: Final = 2.5
LATE_TRY_S: Final = 10.0  # if nobody waits
FIRST_PAUSE_S: Final = 0.02
LONGEST_PAUSE_S: Final = 0.5
FINISH_S: Final = 2.0
SPOOL_BEFORE_S: Final = 0.5  # how long before the deadline a delivery is spooled
LONGEST_SPOOL_S: Final = 1.5
STOPPED: Final = "the service stopped"
TOO_LATE: Final = f"it took longer than {LONGEST_WAIT_S:.0f} s"


class _Waiting(Struct, eq=False):
    """A delivery that waits to be stored. It is answered by `deadline` (the event loop's clock)."""

    delivery: NewDelivery
    answer: asyncio.Future[StoreResult | None]
    deadline: float
    tried: bool = False
    is_late: bool = False  # answered 503, or being spooled
    is_over: bool = False  # stored, spooled or refused for good
    room: RequestBody | None = None  # whose room is held

    def detach(self, room: RequestBody | None) -> None:
        """Go on without the request, which is over."""
        self.answer = self.answer.get_loop().create_future()  # the old one keeps its error
        self.answer.cancel()
        self.room = room
        if room is not None:
            room.hold()

    def end(self, result: StoreResult | StoreUnavailable | None) -> bool:
        """Answer, and return the room that is held. Return False if nobody waits any more."""
        self.is_over = True
        if self.room is not None:
            self.room.close()
        return self.reply(result)

    def reply(self, result: StoreResult | StoreUnavailable | None) -> bool:
        """Answer. Return False if nobody waits any more."""
        if self.answer.done():
            return False
        if isinstance(result, StoreUnavailable):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)
        return True


def _take_fitting(requests: list[_Waiting], most: int) -> list[_Waiting]:
    """Return as many of the first requests as fit into a batch."""
    first = requests[:most]
    return first[: count_fitting((len(request.delivery.body) for request in first), MAX_BYTES)]


def retrieve_error(answer: asyncio.Future[Any]) -> None:
    """Retrieve the error of a future that nobody awaits, or asyncio would log it."""
    if not answer.cancelled():
        answer.exception()


class GroupCommit:
    """Stores all waiting requests in one transaction per batch.

    A batch that fails for a reason that may pass is retried, on another connection, together with
    all that wait by then. Late deliveries are retried separately, so that they delay no others.
    """

    def __init__(
        self,
        host: TransactionRunner,
        observe: Observer,
        stored: Callable[[], None],
        spool: SpoolDirectory | None = None,
    ) -> None:
        """`stored` is called after every batch with new deliveries. `spool` takes deliveries that
        the database didn't store in time."""
        self._host = host
        self._observe = observe
        self._stored = stored
        self._spool = spool
        self._waiting: list[_Waiting] = []
        self._batch: list[_Waiting] = []
        self._late: list[_Waiting] = []
        self._committing: asyncio.Task[None] | None = None
        self._storing_late: asyncio.Task[None] | None = None
        self._spooling: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # when the timer fires, by the loop's clock
        self._latest = float("inf")  # no deadline is later
        self.error: Exception | None = None
        self.failed_at = self.stored_at = float("-inf")
        self.not_spooled: Exception | None = None  # why the last one couldn't be spooled
        self.not_spooled_at = float("-inf")

    async def add(
        self,
        delivery: NewDelivery,
        deadline: float | None = None,
        room: RequestBody | None = None,
    ) -> StoreResult | None:
        """Return once the delivery is committed; None if it was spooled instead.

        `deadline` is by the event loop's clock. After that, or if the caller is cancelled (by a
        time-out of the application, or at the end), the delivery is still stored, and its `room` is
        held until then. Raises StoreUnavailable.
        """
        loop = asyncio.get_running_loop()
        latest = min(loop.time() + LONGEST_WAIT_S, self._latest)
        deadline = latest if deadline is None else min(deadline, latest)
        waiting = _Waiting(delivery, loop.create_future(), deadline)
        self._waiting.append(waiting)
        if self._committing is None:
            self._committing = loop.create_task(self._commit_all())
        self._watch(loop, deadline)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if self._spool is not None and not (waiting.is_over or waiting.is_late):
                with suppress(OSError):  # it may still be stored
                    self._spool.write([delivery])
                    waiting.end(None)
            raise
        finally:
            if not waiting.is_over:
                waiting.detach(room)

    def hurry(self, latest: float) -> None:
        """Answer all requests by `latest`, by the event loop's clock."""
        self._latest = min(self._latest, latest)
        for request in (*self._batch, *self._waiting):
            request.deadline = min(request.deadline, self._latest)
        self._watch(asyncio.get_running_loop(), self._latest)

    async def finish(self) -> None:
        """At the end, store waiting deliveries within FINISH_S. Spool the rest, if possible."""
        tasks = {task for task in (self._committing, self._storing_late) if task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=FINISH_S)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        left = [each for each in (*self._waiting, *self._late) if not each.is_over]
        self._waiting, self._late = [], []
        if left and self._spool is not None:
            await self._spool_late(left, self._explain())
        lost = [each for each in left if not each.is_over]
        if lost:
            self._observe(DeliveriesLost(len(lost)))
        for request in lost:
            request.end(StoreUnavailable(problem=STOPPED))

    async def _commit_all(self) -> None:
        failures, most = 0, MAX_ROWS
        try:
            while True:
                # Let other requests join, such as those of clients that were just answered: a large
                # batch costs little more than a batch of one.
                for _ in range(2):
                    await asyncio.sleep(0)
                if not (batch := self._next_batch(most)):
                    return
                self._batch = batch
                try:
                    error = await self._commit(batch)
                finally:
                    self._batch = []
                    self._put_back([request for request in batch if not request.is_over])
                if error is None:
                    failures, most = 0, min(most * 2, MAX_ROWS)
                    continue
                if self.error is None:
                    self._observe(Retrying(len(batch), describe(error)))
                self.error, self.failed_at = error, asyncio.get_running_loop().time()
                if isinstance(error, NoAnswer):  # its size may be the cause
                    most = max(1, most // 2)
                await asyncio.sleep(min(FIRST_PAUSE_S * 2.0 ** min(failures, 10), LONGEST_PAUSE_S))
                failures += 1
        finally:
            self._committing = None

    async def _store_late(self) -> None:
        """Store late deliveries, separately from requests that still wait."""
        most = MAX_ROWS
        try:
            while self._late:
                await asyncio.sleep(LONGEST_PAUSE_S)
                self._late = [request for request in self._late if not request.is_over]
                while batch := _take_fitting(self._late, most):
                    error = await self._commit(batch, late=True)
                    self._late[: len(batch)] = []
                    self._late += [request for request in batch if not request.is_over]
                    if error is not None:
                        most = max(1, most // 2)  # one of them, or their size, may be the cause
                        break
                    most = MAX_ROWS
        finally:
            self._storing_late = None

    def _next_batch(self, most: int) -> list[_Waiting]:
        self._waiting = [each for each in self._waiting if not (each.is_over or each.is_late)]
        batch = _take_fitting(self._waiting, most)
        self._waiting = self._waiting[len(batch) :]
        return batch

    def _put_back(self, left: list[_Waiting]) -> None:
        """Retry deliveries that weren't stored: before others, or separately if they are late."""
        self._waiting[:0] = [request for request in left if not request.is_late]
        self._late += [request for request in left if request.is_late]
        if self._late and self._storing_late is None:
            self._storing_late = asyncio.get_running_loop().create_task(self._store_late())

    async def _commit(self, batch: list[_Waiting], *, late: bool = False) -> Exception | None:
        """Commit and answer. Return the error if some deliveries must be tried again."""
        # If the table is locked, trying the halves takes longer than requests wait.
        batch = [each for each in batch if not each.is_over and (late or not each.is_late)]
        if not batch:
            return None
        deliveries = [request.delivery for request in batch]
        tried = {request.delivery.digest for request in batch if request.tried}
        for request in batch:
            request.tried = True
        try:
            accepted = await self._host.accept(
                lambda store: store.add(deliveries, tried), LATE_TRY_S if late else TRY_S
            )
        except (RowRejected, TimedOut) as error:
            if len(batch) > 1:
                # A bad row must not harm others: halve the batch until it is alone.
                middle = len(batch) // 2
                first = await self._commit(batch[:middle], late=late)
                return await self._commit(batch[middle:], late=late) or first
            if late or isinstance(error, TimedOut):
                return error
            self.error, self.failed_at = error, asyncio.get_running_loop().time()
            await self._put_off(batch[0], error)
        except Exception as error:
            return error
        else:
            self.error, self.stored_at = None, asyncio.get_running_loop().time()
            answered = [
                request.end(answer) for request, answer in zip(batch, accepted, strict=True)
            ]
            if not all(answered):
                self._observe(StoredLate(answered.count(False)))
            if not all(answer.duplicate for answer in accepted):
                self._stored()
        return None

    async def _put_off(self, request: _Waiting, error: RowRejected) -> None:
        """Spool a delivery that the database refuses, or keep it for later: a trigger or a policy
        may be mended."""
        request.is_late = True
        if self._spool is not None:
            await self._spool_late([request], str(error))
        else:
            self._refuse([request], str(error))

    def _watch(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        """Make sure that a request is answered by its deadline. All share one timer: a timer for
        each would cost about as much as storing it."""
        due = deadline - (SPOOL_BEFORE_S if self._spool else 0)
        if self._timer is None or self._due > due:
            if self._timer is not None:
                self._timer.cancel()
            # The handle may not know when it is due: uvloop's doesn't for a time in the past.
            self._due = due
            self._timer = loop.call_at(due, self._give_up, loop)

    def _give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer the requests whose deadline has passed, or spool their deliveries."""
        self._timer = None
        latest = loop.time() + (SPOOL_BEFORE_S if self._spool else 0)
        waiting = [
            each for each in (*self._batch, *self._waiting) if not (each.is_over or each.is_late)
        ]
        late = [request for request in waiting if request.deadline <= latest]
        deadlines = [request.deadline for request in waiting if request.deadline > latest]
        for request in late:
            request.is_late = True
        before, self._waiting = self._waiting, []  # the next batch may not begin for a long time
        self._put_back([request for request in before if not request.is_over])
        if late and self._spool is None:
            self._refuse(late, self._explain())
        elif late:
            spooling = loop.create_task(self._spool_late(late, self._explain()))
            self._spooling.add(spooling)
            spooling.add_done_callback(self._spooling.discard)
        if deadlines:
            self._watch(loop, min(deadlines))

    async def _spool_late(self, late: list[_Waiting], problem: str) -> None:
        """Spool deliveries that the database refused, or didn't store in time."""
        assert self._spool is not None
        try:
            async with asyncio.timeout(LONGEST_SPOOL_S):
                deliveries = [request.delivery for request in late]
                await run_in_thread(self._spool.write, deliveries)
        except Exception as error:  # such as one of starting the thread
            self.not_spooled, self.not_spooled_at = error, asyncio.get_running_loop().time()
            self._refuse(late, f"{problem}; nor could it be spooled: {type(error).__name__}")
            return
        self.not_spooled = None
        self._observe(Spooled(len(late), problem))
        for request in late:
            request.end(None)

    def _explain(self) -> str:
        if self.error is not None:
            return describe(self.error)
        return str(StoreUnavailable(problem=TOO_LATE))

    def _refuse(self, batch: list[_Waiting], problem: str) -> None:
        self._observe(NotStored(len(batch), problem))
        for request in batch:
            request.reply(StoreUnavailable(problem=problem))


CHECK_EVERY_S: Final = 1.0
CHECK_S: Final = 3.0
# With a spool directory, deliveries don't depend on the database. So the answer must not take
# longer than what asks for it waits, even if the database doesn't answer.
CHECK_WITH_SPOOL_S: Final = 0.3
FAILURE_COUNTS_S: Final = 10.0


class Readiness:
    """Says whether a delivery that arrives now could be stored: checks the database, writes to it,
    and caches the result for a moment. If the database can't be used, the spool directory counts.

    A load balancer that gets a 503 stops sending deliveries, so these alone can't show that the
    database works again. A small write may succeed where a delivery fails, so a recent failure of a
    delivery counts, too.
    """

    def __init__(
        self,
        check_database: Callable[[], Awaitable[None]],
        host: TransactionRunner,
        clock: Clock,
        commits: GroupCommit,
        spool: SpoolDirectory | None = None,
    ) -> None:
        """`check_database` raises if something is wrong with the database, without writing."""
        self._check_database = check_database
        self._host = host
        self._clock = clock
        self._commits = commits
        self._spool = spool
        self._checked_at = self._spool_checked_at = float("-inf")
        self._error: LogtoWebhooksError | None = None
        self._spool_error: Exception | None = None

    async def check(self) -> str | None:
        """Return why deliveries are spooled; None if the database stores them.

        Raises StoreUnavailable or SchemaMismatch if nothing can be stored.
        """
        error = await self._check_store()
        if error is None:
            return None
        if self._spool is None:
            raise error
        if (problem := await self._check_spool(self._spool)) is not None:
            why = getattr(problem, "strerror", None) or type(problem).__name__
            raise StoreUnavailable(problem=f"{error}; nor can anything be spooled: {why}")
        return str(error)

    async def _check_store(self) -> LogtoWebhooksError | None:
        now = asyncio.get_running_loop().time()
        error = self._commits.error
        if error is not None and now - self._commits.failed_at < FAILURE_COUNTS_S:
            if isinstance(error, LogtoWebhooksError):
                return error
            return StoreUnavailable(problem=describe(error))
        if now - self._checked_at >= CHECK_EVERY_S:
            self._checked_at = now
            self._error = await self._try_to_write()
        if self._error is not None and self._commits.stored_at < self._checked_at:
            return self._error
        return None

    async def _check_spool(self, spool: SpoolDirectory) -> Exception | None:
        now = asyncio.get_running_loop().time()
        error = self._commits.not_spooled
        if error is not None and now - self._commits.not_spooled_at < FAILURE_COUNTS_S:
            return error
        if now - self._spool_checked_at >= CHECK_EVERY_S:
            self._spool_checked_at = now
            try:
                async with asyncio.timeout(LONGEST_SPOOL_S):
                    await run_in_thread(spool.try_write)
            except Exception as problem:  # such as one of starting the thread
                self._spool_error = problem
            else:
                self._spool_error = None
        return self._spool_error

    async def _try_to_write(self) -> LogtoWebhooksError | None:
        limit_s = CHECK_S if self._spool is None else CHECK_WITH_SPOOL_S
        try:
            check = self._check_database()
            await (check if self._spool is None else asyncio.wait_for(check, limit_s))
            await asyncio.wait_for(self._host.run(self._write), limit_s)
        except LogtoWebhooksError as error:
            return error
        except TimeoutError:
            return StoreUnavailable(problem=f"it did not write a row within {limit_s:g} s")
        return None

    def _write(self, store: Store) -> None:
        store.save_checkpoint("ready", Checkpoint(self._clock.now(), 0))
