"""Apply deliveries: claim a batch, apply it, decide what follows a failure; over and over."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from msgspec.structs import replace

from logto_webhooks.apply.batch import (
    FIRST_WEIGHT,
    BatchSizer,
    InvalidDelivery,
    Work,
    apply_batch,
    apply_piece,
    mark_doubtful,
    parse_delivery,
    whole_outcome,
)
from logto_webhooks.apply.endings import Endings
from logto_webhooks.clock import Clock
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import LOCK_S, LONGEST_S, STATEMENT_S, Store
from logto_webhooks.deliveries import (
    DELIVERY_MOVES,
    ClaimedDelivery,
    DeliveryMove,
    DeliveryOutcome,
    DeliveryState,
)
from logto_webhooks.errors import ClaimLost, StoreUnavailable, TimedOut, describe
from logto_webhooks.handlers import enqueue
from logto_webhooks.handlers.enqueue import PlannedDelivery
from logto_webhooks.instrumentation import (
    ClockSetBack,
    DeliveryFailed,
    DeliverySynced,
    Observer,
    Resumed,
    Stalled,
    TelemetryEvent,
)
from logto_webhooks.jobs import NewJob
from logto_webhooks.records.changes import LAG_MS
from logto_webhooks.records.record import Key, Tombstone
from logto_webhooks.retries import MAX_ATTEMPTS, Retry, after_failure

MAX_ROWS: Final = 512
MAX_BYTES: Final = 2 * 2**20
MAX_PIECE: Final = 1_000  # of a delivery that changes more than fits into a transaction
LEASE_S: Final = 10.0
POLL_S: Final = 1.0
LONGEST_STALL_S: Final = 5.0
CULPRIT_LOCK_S: Final = 0.2  # that a batch waits, once it is known that something is locked
HALVING_S: Final = 3.0  # that halving may take while the others wait
PUT_BACK_S: Final = 1.0  # what wasn't halved any more
SUSPECT_S: Final = 60.0  # that what touches a locked record is applied apart from the others


class DeliveryWorker:
    """Applies what is pending. Any number may run: each claim has its own token and lease."""

    def __init__(
        self,
        host: TransactionRunner,
        clock: Clock,
        observe: Observer,
        jitter: Callable[[], float],
        *,
        lag_ms: int = LAG_MS,
        max_attempts: int = MAX_ATTEMPTS,
        replay_window_ms: int = 0,
        budget_s: float = LONGEST_S,
        may_work: Callable[[], bool] = lambda: True,
    ) -> None:
        """`budget_s`: how long a transaction may hold back who accepts (SQLite: one writer).

        What comes to the webhook later than `replay_window_ms` runs no handlers; 0 is no limit.
        `may_work` is asked before each step; who may not is a spare, and waits.
        """
        self._host = host
        self._clock = clock
        self._observe = observe
        self._jitter = jitter
        self._lag_ms = lag_ms
        self._max_attempts = max_attempts
        self._replay_window_ms = replay_window_ms
        self._pace = BatchSizer(budget_s)
        self._endings = Endings(host, budget_s)
        self._clock_watch = ClockWatch(host, observe)
        self._suspects: dict[Key, float] = {}  # records that were locked -> until when
        self._locked: set[str | None] = set()  # subjects that were locked in this step
        self._halve_until: float | None = None
        self._wake = asyncio.Event()
        self._may_work = may_work
        self._stopping = False
        self._stalls = 0
        self._held: Sequence[Work] = []
        self._claimed_at = 0.0
        self._token = ""

    @property
    def stopping(self) -> bool:
        """Whether it was told to end."""
        return self._stopping

    def wake(self) -> None:
        """Tell the worker that something is pending."""
        self._wake.set()

    def stop(self) -> None:
        """End `run` after the batch in hand."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Work until stopped. An unreachable database stalls it, and is tried again."""
        while not self._stopping:
            self._wake.clear()
            if not await self._turn():
                await self._sleep(POLL_S)

    async def drain(self) -> None:
        """Work until nothing is pending, what waits for its next attempt included."""
        while not self._stopping and (await self._turn() or await self._pending()):
            pass

    async def _turn(self) -> int:
        """Make a step; wait if that can't be done now. Return how much was done, or tried."""
        try:
            done = await self._watched_step() if self._may_work() else 0
        except Exception as error:
            self._stalls += 1
            wait = min(0.1 * 2.0 ** min(self._stalls, 10), LONGEST_STALL_S)
            self._observe(Stalled(describe(error), wait))
            await self._sleep(wait)
            return 1
        if self._stalls:
            self._stalls = 0
            self._observe(Resumed())
        return done

    async def _watched_step(self) -> int:
        await self._clock_watch.look()
        return await self.step()

    async def _pending(self) -> int:
        await self._sleep(0.1)
        try:
            status = await self._host.read(lambda store: store.status())
        except StoreUnavailable:
            return 1
        return status.deliveries[DeliveryState.PENDING] + status.memberships_to_end

    async def step(self) -> int:
        """Claim a batch, apply as much as fits in a transaction; return how much it was.

        What is left, or what the database doesn't take now, is kept, and applied next time if
        still ours. Then some memberships of who was deleted are ended, if any wait for that.
        Raises StoreUnavailable.
        """
        return await self._apply_some() + await self._endings.step()

    async def _apply_some(self) -> int:
        if not self._held:
            self._token = uuid.uuid4().hex
            claimed = await self._host.run(self._claim)
            self._claimed_at = time.monotonic()
            self._held = [parse_delivery(each, self._lag_ms) for each in claimed]
        batch: Sequence[Work] = self._held
        with contextlib.suppress(ClaimLost):
            if time.monotonic() - self._claimed_at > LEASE_S / 2:
                return await self._give_back()
            batch = self._pace.cut(self._held)
            await self._apply(batch)
        self._held = self._held[len(batch) :]
        return len(batch)

    def _claim(self, store: Store) -> list[ClaimedDelivery]:
        return store.claim(self._token, MAX_ROWS, MAX_BYTES, LEASE_S)

    async def _give_back(self) -> int:
        """What may not be done within the lease would be done in vain."""
        held, self._held = self._held, []
        outcomes = [
            DeliveryOutcome(id=each.claimed.id, state=DeliveryState.PENDING) for each in held
        ]
        await self._finish_if_free(outcomes)
        return len(held)

    async def _apply(self, batch: Sequence[Work]) -> None:
        planned = [each for each in batch if isinstance(each, PlannedDelivery)]
        suspects = self._suspected(planned)
        self._locked.clear()
        self._halve_until = None
        if suspects:
            await self._apply_planned([each for each in planned if each not in suspects])
            await self._apply_planned(suspects, CULPRIT_LOCK_S)
        else:
            await self._apply_planned(planned)
        for each in batch:
            if isinstance(
                each, InvalidDelivery
            ):  # in a transaction of its own: it locks out of turn
                with contextlib.suppress(TimedOut):  # its lease ends
                    self._observe(await self._fail_alone(each.claimed, each.error))

    def _suspected(self, planned: Sequence[PlannedDelivery]) -> list[PlannedDelivery]:
        """Those that touch what was locked lately: they aren't applied with the others."""
        if not self._suspects:
            return []
        now = time.monotonic()
        self._suspects = {key: until for key, until in self._suspects.items() if until > now}
        return [each for each in planned if not self._suspects.keys().isdisjoint(_touched(each))]

    async def _apply_planned(
        self, batch: Sequence[PlannedDelivery], lock_s: float = LOCK_S
    ) -> None:
        if not batch:
            return
        try:
            reports: Sequence[TelemetryEvent] = await self._apply_at_once(batch, lock_s)
        except ClaimLost:
            raise
        except TimedOut as error:
            # Something is locked by somebody else: halve until that is alone.
            self._pace.failed()
            await self._isolate(batch, error)
            return
        except StoreUnavailable:
            self._pace.failed()
            raise
        except Exception as error:
            if len(batch) > 1:
                # One bad row harms nobody else: halve until it is alone.
                await self._apply_planned(batch[: len(batch) // 2], lock_s)
                await self._apply_planned(batch[len(batch) // 2 :], lock_s)
                return
            reports = [await self._fail_alone(batch[0].claimed, error)]
        for report in reports:
            self._observe(report)

    async def _apply_at_once(
        self, batch: Sequence[PlannedDelivery], lock_s: float
    ) -> Sequence[TelemetryEvent]:
        """Apply a batch in a transaction, or in several what is too large for one."""
        if len(batch) == 1 and batch[0].weight > max(FIRST_WEIGHT, self._pace.weight):
            return [await self._apply_large(batch[0], lock_s)]
        return await self._host.run(lambda store: self._sync(store, batch, lock_s))

    async def _apply_large(self, planned: PlannedDelivery, lock_s: float) -> TelemetryEvent:
        """Apply a delivery in pieces; the last finishes it.

        Whoever is killed in between leaves it pending: to do a piece again changes nothing, and
        makes no job twice.
        """
        changes, results = planned.changes, []
        while changes:
            size = max(FIRST_WEIGHT, min(self._pace.weight, MAX_PIECE))
            piece, changes = replace(planned, changes=changes[:size]), changes[size:]
            results.append(await self._host.run(partial(self._sync_piece, piece, lock_s)))
        window_ms = self._replay_window_ms
        jobs = await self._host.read(lambda store: enqueue.own_jobs(store, planned, window_ms))
        while jobs:
            some, jobs = jobs[:MAX_PIECE], jobs[MAX_PIECE:]
            await self._host.run(partial(self._add_jobs, planned, some, lock_s))
        outcome = whole_outcome(planned, results)
        since = await self._host.run(partial(self._finish_large, outcome))
        return self._synced(planned, outcome, since)

    def _sync_piece(self, piece: PlannedDelivery, lock_s: float, store: Store) -> str:
        _limit(store, lock_s)
        store.renew(self._token, [piece.claimed.id], LEASE_S)
        started = time.perf_counter()
        result = apply_piece(store, piece, self._replay_window_ms)
        self._pace.took(piece.weight, time.perf_counter() - started)
        return result

    def _add_jobs(
        self, planned: PlannedDelivery, jobs: Sequence[NewJob], lock_s: float, store: Store
    ) -> None:
        _limit(store, lock_s)
        store.renew(self._token, [planned.claimed.id], LEASE_S)
        store.jobs.add(jobs)

    def _finish_large(self, outcome: DeliveryOutcome, store: Store) -> int:
        since = store.installed_at()
        store.finish(self._token, [outcome])
        return since

    async def _isolate(self, batch: Sequence[PlannedDelivery], error: TimedOut) -> None:
        now = time.monotonic()
        if self._halve_until is None:
            self._halve_until = now + HALVING_S
        if len(batch) == 1:
            await self._put_aside(batch[0], error)
            return
        if now > self._halve_until:  # too much is locked, a whole table maybe
            outcomes = [
                DeliveryOutcome(
                    id=each.claimed.id,
                    state=DeliveryState.PENDING,
                    error=describe(error),
                    retry_after_s=PUT_BACK_S,
                )
                for each in batch
            ]
            await self._finish_if_free(outcomes)
            return
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            known = [each for each in half if each.claimed.subject in self._locked]
            for each in known:  # locked as well: not to be waited for once more
                await self._put_aside(each, error)
            await self._apply_planned([each for each in half if each not in known], CULPRIT_LOCK_S)

    async def _put_aside(self, planned: PlannedDelivery, error: TimedOut) -> None:
        """Have it tried again later, and apart from the others."""
        until = time.monotonic() + SUSPECT_S
        self._suspects |= dict.fromkeys(_touched(planned), until)
        if planned.claimed.subject is not None:
            self._locked.add(planned.claimed.subject)
        with contextlib.suppress(TimedOut):
            self._observe(await self._fail_alone(planned.claimed, error))

    async def _finish_if_free(self, outcomes: Sequence[DeliveryOutcome]) -> None:
        """Where a delivery's own row is locked, its lease ends it: it is due again then."""
        with contextlib.suppress(TimedOut):
            await self._host.run(lambda store: store.finish(self._token, outcomes))

    async def _fail_alone(self, culprit: ClaimedDelivery, error: Exception) -> DeliveryFailed:
        try:
            return await self._host.run(lambda store: self._fail(store, culprit, error))
        except (StoreUnavailable, ClaimLost):
            raise
        except Exception:
            # What the database refuses may be its record: then that isn't marked either.
            return await self._host.run(lambda store: self._fail(store, culprit, error, mark=False))

    def _sync(
        self, store: Store, batch: Sequence[PlannedDelivery], lock_s: float
    ) -> list[TelemetryEvent]:
        _limit(store, lock_s)
        started = time.perf_counter()
        outcomes, since = apply_batch(store, self._token, batch, self._replay_window_ms)
        self._pace.took(sum(each.weight for each in batch), time.perf_counter() - started)
        if any(isinstance(change, Tombstone) for each in batch for change in each.changes):
            self._endings.wake()
        return [
            self._synced(each, outcome, since)
            for each, outcome in zip(batch, outcomes, strict=True)
        ]

    def _synced(
        self, planned: PlannedDelivery, outcome: DeliveryOutcome, since: int
    ) -> TelemetryEvent:
        claimed = planned.claimed
        return DeliverySynced(
            claimed.id,
            claimed.event,
            claimed.subject,
            outcome.result or "",
            self._clock.now() - claimed.received_at,
            planned.event.odd_fields,
            claimed.occurred_at < since,
            enqueue.is_late(claimed, self._replay_window_ms),
        )

    def _fail(
        self, store: Store, claimed: ClaimedDelivery, error: Exception, mark: bool = True
    ) -> DeliveryFailed:
        decision = after_failure(
            error, claimed.attempt, claimed.failures, self._jitter(), self._max_attempts
        )
        wait = decision.after_s if isinstance(decision, Retry) else None
        if wait is None and mark:
            mark_doubtful(store, claimed)
        outcome = DeliveryOutcome(
            id=claimed.id,
            state=DELIVERY_MOVES[
                DeliveryState.PENDING, DeliveryMove.GIVE_UP if wait is None else DeliveryMove.RETRY
            ],
            error=describe(error),
            retry_after_s=wait or 0,
            failed=not isinstance(error, TimedOut),
        )
        store.finish(self._token, [outcome])
        return DeliveryFailed(
            claimed.id,
            claimed.event,
            claimed.subject,
            outcome.error or "",
            claimed.attempt,
            wait,
        )

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)


def _limit(store: Store, lock_s: float) -> None:
    if lock_s != LOCK_S:  # as the host set it already
        store.limit_waits(lock_s, STATEMENT_S)


def _touched(planned: PlannedDelivery) -> set[Key]:
    """The records that are locked to apply a delivery."""
    keys = {change.key for change in planned.changes}
    return keys.union(*(key.organization_and_user for key in keys if key.kind == "membership"))


LOOK_S: Final = 2.0
SLACK_MS: Final = 1_000  # what clocks of several servers, or a small correction, may differ
NOTE_MS: Final = 60_000


class ClockWatch:
    """Looks at the database's clock."""

    def __init__(self, host: TransactionRunner, observe: Observer) -> None:
        self._host = host
        self._observe = observe
        self._looked_at: float | None = None  # monotonic
        self._seen = 0  # what the database's clock said then
        self._moved = 0  # by how much due times had been moved by then, by whomever

    async def look(self) -> None:
        """Compare, if that is due; mend what must be. Raises StoreUnavailable."""
        asked_at = time.monotonic()
        if self._looked_at is not None and asked_at - self._looked_at < LOOK_S:
            return
        told = await self._host.read(lambda store: store.clock())
        # From the end of one look to the beginning of the next: so much passed at least, however
        # long each of them waited for its answer.
        passed_ms = 0 if self._looked_at is None else int((asked_at - self._looked_at) * 1000)
        moved_ms = max(0, told.moved - self._moved)  # by somebody else, since the last look
        expected = self._seen + passed_ms - moved_ms if self._seen else 0
        expected = max(expected, told.noted, told.installed)
        self._looked_at, self._seen, self._moved = time.monotonic(), told.now, told.moved
        back_ms = expected - told.now
        try:
            if back_ms > SLACK_MS:
                await self._host.run(lambda store: store.set_clock_back(back_ms, told.moved))
                self._moved += back_ms
                self._observe(ClockSetBack(back_ms / 1000))
            elif told.due_too_late or told.now - told.noted >= NOTE_MS:
                await self._host.run(lambda store: store.set_clock_back(0, told.moved))
        except TimedOut:  # something is locked: found again by the next look
            self._seen = expected
