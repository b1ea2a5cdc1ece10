"""The worker: claim a batch, apply it, decide about what failed; over and over."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Final

from logto_webhooks.core.inbox import Claimed, Outcome
from logto_webhooks.core.lifecycle import MAX_ATTEMPTS, MOVES, Move, Retry, State, after_failure
from logto_webhooks.core.ports import Clock, Host, Observer, Store
from logto_webhooks.core.projection import LAG_MS
from logto_webhooks.core.reports import Failed, Report, Resumed, Stalled, Synced
from logto_webhooks.errors import ClaimLost, StoreUnavailable, described
from logto_webhooks.service import sync
from logto_webhooks.service.making import Planned
from logto_webhooks.service.sync import Unusable, Work

MAX_ROWS: Final = 512
MAX_BYTES: Final = 2 * 2**20
MAX_WEIGHT: Final = 5_000
FIRST_WEIGHT: Final = 32
LONGEST_S: Final = 1.0  # of a transaction, where it holds back only other workers
LEASE_S: Final = 10.0
POLL_S: Final = 1.0
LONGEST_STALL_S: Final = 5.0


class Worker:
    """Applies what is pending. Any number may run: each claim has its own token and lease."""

    def __init__(
        self,
        host: Host,
        clock: Clock,
        observe: Observer,
        jitter: Callable[[], float],
        *,
        lag_ms: int = LAG_MS,
        max_attempts: int = MAX_ATTEMPTS,
        budget_s: float = LONGEST_S,
        may_work: Callable[[], bool] = lambda: True,
    ) -> None:
        """`budget_s`: how long a transaction may hold back who accepts (SQLite: one writer).

        `may_work` is asked before each step; who may not is a spare, and waits.
        """
        self._host = host
        self._clock = clock
        self._observe = observe
        self._jitter = jitter
        self._lag_ms = lag_ms
        self._max_attempts = max_attempts
        self._pace = Pace(budget_s)
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
            done = await self.step() if self._may_work() else 0
        except Exception as error:
            self._stalls += 1
            wait = min(0.1 * 2.0 ** min(self._stalls, 10), LONGEST_STALL_S)
            self._observe(Stalled(described(error), wait))
            await self._sleep(wait)
            return 1
        if self._stalls:
            self._stalls = 0
            self._observe(Resumed())
        return done

    async def _pending(self) -> int:
        await self._sleep(0.1)
        try:
            status = await self._host.read(lambda store: store.status())
        except StoreUnavailable:
            return 1
        return status.deliveries[State.PENDING]

    async def step(self) -> int:
        """Claim a batch, apply as much as fits in a transaction; return how much it was.

        What is left, or what the database doesn't take now, is kept, and applied next time if
        still ours. Raises StoreUnavailable.
        """
        if not self._held:
            self._token = uuid.uuid4().hex
            claimed = await self._host.run(self._claim)
            self._claimed_at = time.monotonic()
            self._held = [sync.planned(each, self._lag_ms) for each in claimed]
        with contextlib.suppress(ClaimLost):
            if time.monotonic() - self._claimed_at > LEASE_S / 2:
                return await self._give_back()
            batch = self._pace.cut(self._held)
            await self._apply(batch)
        self._held = self._held[len(batch) :]
        return len(batch)

    def _claim(self, store: Store) -> list[Claimed]:
        return store.claim(self._token, MAX_ROWS, MAX_BYTES, LEASE_S)

    async def _give_back(self) -> int:
        """What may not be done within the lease would be done in vain."""
        held, self._held = self._held, []
        outcomes = [Outcome(id=each.claimed.id, state=State.PENDING) for each in held]
        await self._host.run(lambda store: store.finish(self._token, outcomes))
        return len(held)

    async def _apply(self, batch: Sequence[Work]) -> None:
        planned = [each for each in batch if isinstance(each, Planned)]
        await self._apply_planned(planned)
        for each in batch:
            if isinstance(each, Unusable):  # in a transaction of its own: it locks out of turn
                self._observe(await self._fail_alone(each.claimed, each.error))

    async def _apply_planned(self, batch: Sequence[Planned]) -> None:
        if not batch:
            return
        try:
            reports: Sequence[Report] = await self._host.run(lambda store: self._sync(store, batch))
        except ClaimLost:
            raise
        except StoreUnavailable:
            self._pace.failed()
            raise
        except Exception as error:
            if len(batch) > 1:
                # One bad row harms nobody else: halve until it is alone.
                await self._apply_planned(batch[: len(batch) // 2])
                await self._apply_planned(batch[len(batch) // 2 :])
                return
            reports = [await self._fail_alone(batch[0].claimed, error)]
        for report in reports:
            self._observe(report)

    async def _fail_alone(self, culprit: Claimed, error: Exception) -> Failed:
        try:
            return await self._host.run(lambda store: self._fail(store, culprit, error))
        except (StoreUnavailable, ClaimLost):
            raise
        except Exception:
            # What the database refuses may be its record: then that isn't marked either.
            return await self._host.run(lambda store: self._fail(store, culprit, error, mark=False))

    def _sync(self, store: Store, batch: Sequence[Planned]) -> list[Report]:
        started = time.perf_counter()
        outcomes, since = sync.apply(store, self._token, batch)
        self._pace.took(sum(each.weight for each in batch), time.perf_counter() - started)
        now = self._clock.now()
        return [
            Synced(
                each.claimed.id,
                each.claimed.event,
                each.claimed.subject,
                outcome.result or "",
                now - each.claimed.received_at,
                each.event.odd_fields,
                each.claimed.occurred_at < since,
            )
            for each, outcome in zip(batch, outcomes, strict=True)
        ]

    def _fail(self, store: Store, claimed: Claimed, error: Exception, mark: bool = True) -> Failed:
        decision = after_failure(error, claimed.attempt, self._jitter(), self._max_attempts)
        wait = decision.after_s if isinstance(decision, Retry) else None
        if wait is None and mark:
            sync.give_up(store, claimed)
        outcome = Outcome(
            id=claimed.id,
            state=MOVES[State.PENDING, Move.GIVE_UP if wait is None else Move.RETRY],
            error=described(error),
            retry_after_s=wait or 0,
        )
        store.finish(self._token, [outcome])
        return Failed(
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


class Pace:
    """How much fits into the time of a transaction; a delivery weighs what it changes."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s
        self.weight = FIRST_WEIGHT

    def cut(self, held: Sequence[Work]) -> Sequence[Work]:
        """Return as many as fit, at least one."""
        weight = fitting = 0
        for each in held:
            weight += each.weight
            if fitting and weight > self.weight:
                break
            fitting += 1
        return held[:fitting]

    def took(self, weight: int, seconds: float) -> None:
        """Learn from a batch; at most double."""
        fitting = int(weight * self._budget_s / max(seconds, 1e-6))
        self.weight = max(1, min(fitting, self.weight * 2, MAX_WEIGHT))

    def failed(self) -> None:
        """What was too much for the database is less next time."""
        self.weight = max(1, self.weight // 2)
