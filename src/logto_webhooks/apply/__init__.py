"""Apply deliveries: claim a batch, apply it, and decide what to do after a failure."""

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
    InvalidDelivery,
    Work,
    apply_batch,
    combine_outcomes,
    mark_doubtful,
    parse_delivery,
)
from logto_webhooks.apply.membership_steps import MembershipAnnouncer, MembershipEnder
from logto_webhooks.batch_sizes import FIRST_WEIGHT, BatchSizer
from logto_webhooks.clock import Clock
from logto_webhooks.database.deliveries import may_be_apart
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import LOCK_S, STATEMENT_S, WORKER_S, Store
from logto_webhooks.deliveries import LARGE, ClaimedDelivery, DeliveryOutcome, DeliveryState
from logto_webhooks.errors import ClaimLost, NoAnswer, StoreUnavailable, TimedOut, describe
from logto_webhooks.event_loop import Offloader, wait_for_event
from logto_webhooks.handlers.enqueue import PlannedDelivery, own_jobs
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
from logto_webhooks.retries import LONGEST_WAIT_S, MAX_ATTEMPTS, Retry, after_failure

MAX_ROWS: Final = 512
MAX_BYTES: Final = 2 * 2**20
MAX_PIECE: Final = 1_000  # changes per transaction of a delivery that is too large for one
LEASE_S: Final = 10.0
POLL_S: Final = 1.0
LONGEST_STALL_S: Final = 5.0
STALLS_WITH_ROWS: Final = 3
SEARCH_LOCK_S: Final = 0.2  # how long a batch waits for locks while a locked record is searched
SEARCH_S: Final = 3.0  # how long that search may take, because other deliveries wait
RELEASED_S: Final = 1.0  # until deliveries that weren't searched are claimed again
SUSPECT_S: Final = 60.0  # how long deliveries that touch a locked record are applied separately
LONGEST_SUSPECT_S: Final = 2 * LONGEST_WAIT_S  # the same for what got no answer
CLOCK_S: Final = 2.0  # how often the database's clock is checked
SLACK_MS: Final = 1_000  # differences between servers' clocks, or small corrections, are ignored
NOTE_MS: Final = 60_000
# Deliveries that wait for longer are a backlog. Many small transactions take several times as long
# as few large ones, so these get larger, and accepting waits a little longer for each.
BEHIND_MS: Final = 1_000
BEHIND_S: Final = 0.05


class DeliveryWorker:
    """Applies pending deliveries. Any number may run: each claim has its own token and lease."""

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
        budget_s: float = WORKER_S,
        may_work: Callable[[], bool] = lambda: True,
        offloader: Offloader | None = None,
    ) -> None:
        """`budget_s` limits a transaction, because accepting waits for it on SQLite.

        A delivery that arrives at the webhook later than `replay_window_ms` after it was sent runs
        no handlers; 0 is no limit. Until `may_work` returns True, the worker is a spare, and waits.
        """
        self._host = host
        self._clock = clock
        self._observe = observe
        self._jitter = jitter
        self._offloader = offloader or Offloader()
        self._lag_ms = lag_ms
        self._max_attempts = max_attempts
        self._replay_window_ms = replay_window_ms
        self._budget_s = budget_s
        self._sizer = BatchSizer(budget_s)
        self._membership_ender = MembershipEnder(host, observe, budget_s)
        self._membership_announcer = MembershipAnnouncer(host, observe, budget_s)
        self._clock_watch = ClockWatch(host, observe)
        self._suspects: dict[Key, float] = {}  # records that were locked -> until when
        self._locked: set[str | None] = set()  # subjects that were locked in this step
        self._search_until: float | None = None
        self._wake = asyncio.Event()
        self._may_work = may_work
        self._is_spare = True  # until `may_work` returns True
        self.stopping = False  # whether `stop` was called
        self._stalls = 0
        self._unapplied: Sequence[Work] = []
        self._claimed_at = 0.0
        self._claims_quick = False  # in turn with slow ones, so that others don't wait for many
        self._token = ""

    def wake(self) -> None:
        """Tell the worker that deliveries are pending."""
        self._wake.set()

    def stop(self) -> None:
        """End `run` after the current batch."""
        self.stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Work until stopped. If the database is unreachable, try again after a pause."""
        while not self.stopping:
            self._wake.clear()
            if not await self._step_or_wait():
                await wait_for_event(self._wake, POLL_S)
        if self._unapplied:
            with contextlib.suppress(ClaimLost, StoreUnavailable):  # others wait for the lease
                await self._release([work.claimed for work in self._unapplied])

    async def drain(self) -> None:
        """Work until nothing is pending, including deliveries that wait for a retry."""
        while not self.stopping and (await self._step_or_wait() or await self._count_pending()):
            pass

    async def _step_or_wait(self) -> int:
        """Make a step. If it fails, wait. Return how much was done or tried."""
        try:
            self._is_spare = self._is_spare and not self._may_work()
            if self._is_spare:
                return 0
            await self._clock_watch.look()
            done = await self.step()
        except Exception as error:
            self._stalls += 1
            wait = min(0.1 * 2.0 ** min(self._stalls, 10), LONGEST_STALL_S)
            self._observe(Stalled(describe(error), wait))
            await wait_for_event(self._wake, wait)
            return 1
        if self._stalls:
            self._stalls = 0
            self._observe(Resumed())
        return done

    async def _count_pending(self) -> int:
        await wait_for_event(self._wake, 0.1)
        try:
            status = await self._host.read_long(Store.status)
        except StoreUnavailable:
            return 1
        return status.deliveries[DeliveryState.PENDING] + status.memberships_to_end

    async def step(self) -> int:
        """Claim a batch, and apply as much of it as fits into a transaction. Then end or announce
        some memberships, if there are any. Return how much was done.

        The next step applies the rest, and what the database couldn't store, if the lease allows
        it. Raises StoreUnavailable.
        """
        if not self._unapplied:
            self._token = uuid.uuid4().hex
            claimed = await self._host.run(self._claim)
            were_apart = bool(claimed) and all(map(may_be_apart, claimed))
            self._claims_quick = were_apart and not self._claims_quick
            self._claimed_at = time.monotonic()
            is_behind = any(self._clock.now() - d.received_at > BEHIND_MS for d in claimed)
            self._sizer.budget_s = max(self._budget_s, BEHIND_S) if is_behind else self._budget_s
            with contextlib.suppress(ClaimLost):
                self._unapplied = await self._parse(claimed)
        batch: Sequence[Work] = self._unapplied
        with contextlib.suppress(ClaimLost):
            if time.monotonic() - self._claimed_at > LEASE_S / 2:
                # Work that isn't finished within the lease would be lost.
                await self._release([work.claimed for work in self._unapplied])
            else:
                batch = self._sizer.cut(self._unapplied)
                await self._apply(batch)
        self._unapplied = self._unapplied[len(batch) :]
        ended = await self._membership_ender.step()
        return len(batch) + ended + await self._membership_announcer.step()

    def _claim(self, store: Store) -> list[ClaimedDelivery]:
        return store.claim(self._token, MAX_ROWS, MAX_BYTES, LEASE_S, quick=self._claims_quick)

    async def _parse(self, claimed: Sequence[ClaimedDelivery]) -> list[Work]:
        """Parse claimed deliveries without blocking the event loop for long."""
        parsed: list[Work] = []
        size = 0
        for delivery in claimed:
            parse = partial(parse_delivery, delivery, self._lag_ms, self._replay_window_ms)
            size += len(delivery.body)
            if len(delivery.body) >= LARGE:
                parsed.append(await self._parse_large(parse, claimed))
                continue
            if size >= LARGE:
                size = 0
                await self._offloader.give_way()
            parsed.append(parse())
        return parsed

    async def _parse_large(
        self, parse: Callable[[], Work], claimed: Sequence[ClaimedDelivery]
    ) -> Work:
        """Parse a delivery in a thread, and renew the claim meanwhile: on a slow machine, this can
        take longer than the lease. Raises ClaimLost."""
        ids = [delivery.id for delivery in claimed]
        parsing = asyncio.ensure_future(self._offloader.run(parse))
        try:
            while True:
                renew_at = self._claimed_at + LEASE_S / 4
                timeout_s = max(0.0, renew_at - time.monotonic())
                done, _ = await asyncio.wait({parsing}, timeout=timeout_s)
                if done:
                    return parsing.result()
                await self._host.run(lambda store: store.renew(self._token, ids, LEASE_S))
                self._claimed_at = time.monotonic()
        finally:
            parsing.cancel()

    async def _apply(self, batch: Sequence[Work]) -> None:
        planned = [work for work in batch if isinstance(work, PlannedDelivery)]
        self._locked.clear()
        self._search_until = None
        suspects = self._find_suspects(planned) if self._suspects else []
        if suspects:
            planned = [delivery for delivery in planned if delivery not in suspects]
        await self._apply_planned(planned)
        await self._apply_planned(suspects, SEARCH_LOCK_S)
        for work in batch:
            # In its own transaction, because it locks a record out of order.
            if isinstance(work, InvalidDelivery):
                with contextlib.suppress(TimedOut):  # it is claimed again when its lease ends
                    self._observe(await self._fail_alone(work.claimed, work.error))

    def _find_suspects(self, planned: Sequence[PlannedDelivery]) -> list[PlannedDelivery]:
        """Find deliveries that touch recently locked records, to apply them separately."""
        now = time.monotonic()
        self._suspects = {key: until for key, until in self._suspects.items() if until > now}
        return [
            delivery
            for delivery in planned
            if not self._suspects.keys().isdisjoint(_list_touched_records(delivery))
        ]

    async def _apply_planned(
        self, batch: Sequence[PlannedDelivery], lock_s: float = LOCK_S
    ) -> None:
        """Apply a batch in one transaction, or in several if it is too large or fails."""
        if not batch:
            return
        try:
            if len(batch) == 1 and batch[0].weight > max(FIRST_WEIGHT, self._sizer.weight):
                reports: Sequence[TelemetryEvent] = [await self._apply_large(batch[0], lock_s)]
            else:
                is_large = any(len(planned.claimed.body) >= LARGE for planned in batch)
                run = self._host.run_large if is_large else self._host.run
                reports = await run(partial(self._sync, batch=batch, lock_s=lock_s))
        except ClaimLost:
            raise
        except TimedOut as error:
            # Another transaction has locked something: halve the batch until that is found.
            self._sizer.halve()
            await self._find_locked(batch, error)
            return
        except NoAnswer as error:  # it may be the fault of one delivery, which takes too long
            self._sizer.shrink()
            if len(batch) > 1:
                raise
            await self._retry_separately(batch[0], error)  # or raise, if nobody gets an answer
            return
        except StoreUnavailable:
            self._sizer.halve()
            raise
        except Exception as error:
            if len(batch) > 1:
                # One bad row must not harm others: halve the batch until it is alone.
                await self._apply_planned(batch[: len(batch) // 2], lock_s)
                await self._apply_planned(batch[len(batch) // 2 :], lock_s)
                return
            reports = [await self._fail_alone(batch[0].claimed, error)]
        for report in reports:
            self._observe(report)

    async def _apply_large(self, planned: PlannedDelivery, lock_s: float) -> TelemetryEvent:
        """Apply a delivery in pieces. The last one finishes it.

        If the process ends in between, the delivery stays pending. Applying a piece again changes
        nothing, and creates no job twice.
        """
        changes, results = planned.changes, []
        while changes:
            size = max(FIRST_WEIGHT, min(self._sizer.weight, MAX_PIECE))
            piece, changes = replace(planned, changes=changes[:size]), changes[size:]
            results.append(await self._host.run(partial(self._sync_piece, piece, lock_s)))
        jobs, since = await self._host.read(partial(_make_own_jobs, planned=planned))
        while jobs:
            piece_of_jobs, jobs = jobs[:MAX_PIECE], jobs[MAX_PIECE:]
            await self._host.run(partial(self._add_jobs, planned, piece_of_jobs, lock_s))
        outcome = combine_outcomes(planned, results)
        await self._host.run(lambda store: store.finish(self._token, [outcome]))
        return self._to_report(planned, outcome, since)

    def _sync_piece(self, piece: PlannedDelivery, lock_s: float, store: Store) -> str:
        self._renew(store, piece, lock_s)
        self._owe_rows_if_stalled(store)
        started = time.perf_counter()
        [outcome], _ = apply_batch(store, [piece], own_jobs=False)
        store.project_changes()  # which is part of the time that it takes
        self._sizer.adjust(piece.weight, time.perf_counter() - started)
        return outcome.result or "nothing"

    def _owe_rows_if_stalled(self, store: Store) -> None:
        """Leave out the application's rows if transactions fail again and again: writing one of
        them may be what ends the session, or the server."""
        if self._stalls >= STALLS_WITH_ROWS:
            store.owe_rows()

    def _add_jobs(
        self, planned: PlannedDelivery, jobs: Sequence[NewJob], lock_s: float, store: Store
    ) -> None:
        self._renew(store, planned, lock_s)
        store.jobs.add(jobs)

    def _renew(self, store: Store, planned: PlannedDelivery, lock_s: float) -> None:
        store.limit_waits(lock_s, STATEMENT_S)
        store.renew(self._token, [planned.claimed.id], LEASE_S)

    async def _find_locked(self, batch: Sequence[PlannedDelivery], error: TimedOut) -> None:
        now = time.monotonic()
        if self._search_until is None:
            self._search_until = now + SEARCH_S
        if len(batch) == 1:
            await self._retry_separately(batch[0], error)
            return
        if now > self._search_until:  # too much is locked, perhaps a whole table
            await self._release([delivery.claimed for delivery in batch], error)
            return
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            locked = [delivery for delivery in half if delivery.claimed.subject in self._locked]
            for delivery in locked:  # instead of waiting for the same lock again
                await self._retry_separately(delivery, error)
            not_locked = [delivery for delivery in half if delivery not in locked]
            await self._apply_planned(not_locked, SEARCH_LOCK_S)

    async def _retry_separately(self, planned: PlannedDelivery, error: TimedOut | NoAnswer) -> None:
        """Retry a delivery later, and separately from others."""
        is_locked = isinstance(error, TimedOut)
        until = time.monotonic() + (SUSPECT_S if is_locked else LONGEST_SUSPECT_S)
        self._suspects |= dict.fromkeys(_list_touched_records(planned), until)
        if planned.claimed.subject is not None:
            self._locked.add(planned.claimed.subject)
        with contextlib.suppress(TimedOut):
            self._observe(await self._fail_alone(planned.claimed, error))

    async def _release(
        self, claimed: Sequence[ClaimedDelivery], error: TimedOut | None = None
    ) -> None:
        """Release deliveries, so that any worker can claim them, after a pause if something is
        locked. A delivery whose own row is locked is due again when its lease ends."""
        outcomes = [
            DeliveryOutcome(
                id=delivery.id,
                state=DeliveryState.PENDING,
                error=describe(error) if error else None,
                retry_after_s=RELEASED_S if error else 0,
                released=True,
            )
            for delivery in claimed
        ]
        with contextlib.suppress(TimedOut):
            await self._host.run(lambda store: store.finish(self._token, outcomes))

    async def _fail_alone(self, failed: ClaimedDelivery, error: Exception) -> DeliveryFailed:
        try:
            return await self._host.run(lambda store: self._fail(store, failed, error))
        except (StoreUnavailable, ClaimLost):
            raise
        except Exception:
            # The database may refuse its record, so try it without marking that.
            return await self._host.run(lambda store: self._fail(store, failed, error, mark=False))

    def _sync(
        self, store: Store, batch: Sequence[PlannedDelivery], lock_s: float
    ) -> list[TelemetryEvent]:
        if lock_s != LOCK_S:  # the default of each transaction
            store.limit_waits(lock_s, STATEMENT_S)
        self._owe_rows_if_stalled(store)
        started = time.perf_counter()
        outcomes, since = apply_batch(store, batch)
        store.finish(self._token, outcomes)
        store.project_changes()  # which is part of the time that it takes
        weight = sum(delivery.weight for delivery in batch)
        self._sizer.adjust(weight, time.perf_counter() - started)
        if any(isinstance(change, Tombstone) for delivery in batch for change in delivery.changes):
            self._membership_ender.wake()
        return [
            self._to_report(delivery, outcome, since)
            for delivery, outcome in zip(batch, outcomes, strict=True)
        ]

    def _to_report(
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
            planned.is_late,
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
            state=DeliveryState.DEAD if wait is None else DeliveryState.PENDING,
            error=describe(error),
            retry_after_s=wait or 0,
            failed=not isinstance(error, TimedOut | NoAnswer),
        )
        store.finish(self._token, [outcome])
        return DeliveryFailed(
            claimed.id, claimed.event, claimed.subject, outcome.error or "", claimed.attempt, wait
        )


def _make_own_jobs(store: Store, planned: PlannedDelivery) -> tuple[list[NewJob], int]:
    since = store.installed_at()
    return own_jobs([planned], store.jobs.handlers(), since), since


def _list_touched_records(planned: PlannedDelivery) -> set[Key]:
    """Return the keys of the records that applying a delivery locks."""
    keys = {change.key for change in planned.changes}
    return keys.union(*(key.organization_and_user for key in keys if key.kind == "membership"))


class ClockWatch:
    """Notices when the database's clock was set back, and moves due times with it."""

    def __init__(self, host: TransactionRunner, observe: Observer) -> None:
        self._host = host
        self._observe = observe
        self._looked_at: float | None = None  # monotonic
        self._seen = 0  # the database's time at that moment
        self._moved = 0  # by how much any process had moved due times by then (ms)

    async def look(self) -> None:
        """Compare the clocks every CLOCK_S, and move due times if necessary. Raises
        StoreUnavailable."""
        asked_at = time.monotonic()
        if self._looked_at is not None and asked_at - self._looked_at < CLOCK_S:
            return
        clock = await self._host.read(Store.clock)
        # From the end of one read to the beginning of the next: at least this much time has passed,
        # however long each read took.
        passed_ms = 0 if self._looked_at is None else int((asked_at - self._looked_at) * 1000)
        moved_ms = max(0, clock.moved - self._moved)  # by other processes since the last read
        expected = self._seen + passed_ms - moved_ms if self._seen else 0
        expected = max(expected, clock.noted, clock.installed)
        self._looked_at, self._seen, self._moved = time.monotonic(), clock.now, clock.moved
        back_ms = expected - clock.now
        try:
            if back_ms > SLACK_MS:
                await self._host.run(lambda store: store.set_clock_back(back_ms, clock.moved))
                self._moved += back_ms
                self._observe(ClockSetBack(back_ms / 1000))
            elif clock.due_too_late or clock.now - clock.noted >= NOTE_MS:
                await self._host.run(lambda store: store.set_clock_back(0, clock.moved))
        except StoreUnavailable as error:  # the next read finds it again
            self._seen = expected
            if not isinstance(error, TimedOut):  # or something is locked
                raise
