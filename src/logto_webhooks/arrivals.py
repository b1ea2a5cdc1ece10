"""Follow deliveries as they arrive, and notice when they stop, or are all refused."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection
from functools import partial
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.clock import Clock
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Gap, RecordedFlow, Store
from logto_webhooks.deliveries import RECENT, DeliveryFilter, StoredDelivery, estimate_ahead
from logto_webhooks.event_loop import forever
from logto_webhooks.instrumentation import FlowResumed, FlowStopped, Observer, Why

DAY_MS: Final = 86_400_000
REMEMBERED_DAYS: Final = 14  # the longest gap of each is kept
LEARNT_MS: Final = 8 * DAY_MS  # includes a weekend
LEAST_MS: Final = 3_600_000
GAP_FACTOR: Final = 2  # silence lasts longer than this many times the longest gap
REJECTED: Final = 5


class Flow(Struct, frozen=True, kw_only=True):
    """The flow of deliveries; times in milliseconds, None before the first delivery.

    `gaps` are the longest of each day. `rejected` counts requests since the `last` delivery that no
    known key signed.
    """

    began: int | None = None
    last: int | None = None
    gaps: tuple[int, ...] = ()
    rejected: int = 0


class Silence(Struct, frozen=True, kw_only=True):
    """Deliveries stopped at `since` (ms). `usual_ms` is the longest usual gap."""

    why: Why
    since: int
    usual_ms: int | None = None


def find_silence(flow: Flow, now: int, after_ms: int | None = None) -> Silence | None:
    """Decide whether deliveries stopped. Without `after_ms`, the usual gaps decide what is too
    long."""
    since = flow.last or 0
    if flow.rejected >= REJECTED:
        return Silence(why="rejected", since=since)
    if flow.last is None or flow.began is None:
        return None
    usual = max(flow.gaps, default=0)
    if after_ms is None:
        if flow.last - flow.began < LEARNT_MS:
            return None
        after_ms = max(LEAST_MS, GAP_FACTOR * usual)
    if now - flow.last <= after_ms:
        return None
    return Silence(why="silent", since=since, usual_ms=usual)


LOOK_S: Final = 60.0
_RECENT: Final = 20  # deliveries that are searched for one that wasn't recovered


class FlowMonitor:
    """Looks for silence every minute; `silence` is the last result."""

    def __init__(
        self, host: TransactionRunner, clock: Clock, observe: Observer, after_s: float | None
    ) -> None:
        """Deliveries stopped if none arrives for `after_s`. If this is None, the usual gaps decide;
        0 disables the check."""
        self._host = host
        self._clock = clock
        self._observe = observe
        self._after_ms = None if after_s is None else round(after_s * 1000)
        self.silence: Silence | None = None

    async def keep(self) -> None:
        """Look every minute until cancelled."""
        if self._after_ms != 0:
            await forever(self.look, LOOK_S)

    async def look(self) -> None:
        """Record the newest delivery, and report when the flow stops or resumes. Raises
        StoreUnavailable."""
        before, now = self.silence, self._clock.now()
        self.silence = silence = await self._host.run(lambda store: self._judge(store, now))
        if silence and (before is None or before.why != silence.why):
            usual_s = None if silence.usual_ms is None else silence.usual_ms // 1000
            self._observe(FlowStopped(silence.why, (now - silence.since) // 1000, usual_s))
        elif before and not silence:
            self._observe(FlowResumed((now - before.since) // 1000))

    def _judge(self, store: Store, now: int) -> Silence | None:
        silence = find_silence(record_flow(store, now), now, self._after_ms)
        since, recorded = silence.since if silence else None, store.flow()
        if recorded.silent_since != since:
            store.save_flow(replace(recorded, silent_since=since))
        return silence


def record_flow(store: Store, now: int) -> Flow:
    """Record the newest delivery and the gap before it; return the flow. What was recorded by a
    clock that was ahead, and so is later than `now`, gives way."""
    newest, recorded = _find_newest(store), store.flow()
    last = recorded.last
    if newest is not None and (last is None or newest > last or last > now):
        if last is not None and newest > last:
            _note_gap(store, recorded, Gap(newest, newest - last))
        began = newest if recorded.began is None else recorded.began
        store.save_flow(replace(recorded, began=began, last=newest))
        recorded = store.flow()
    last, remembered_ms = recorded.last or 0, REMEMBERED_DAYS * DAY_MS
    return Flow(
        began=recorded.began,
        last=recorded.last,
        gaps=tuple(gap.length for gap in recorded.gaps if gap.ended_at > last - remembered_ms),
        rejected=store.webhook_keys.count_rejected(last, known=recorded.last is not None),
    )


def _find_newest(store: Store) -> int | None:
    recent = store.clocks(_RECENT).recent
    return next((delivery.received_at for delivery in recent if delivery.origin == "webhook"), None)


def _note_gap(store: Store, recorded: RecordedFlow, gap: Gap) -> None:
    """Record a gap, if it is the longest of its day."""
    day = gap.ended_at // DAY_MS
    if all(gap.length > other.length for other in recorded.gaps if other.ended_at // DAY_MS == day):
        store.save_gap(day % REMEMBERED_DAYS, gap)


POLL_S: Final = 1.0
_PAGE: Final = 500
# A delivery may be committed so long after one with a greater ID, if they are no further apart.
_LATE_S: Final = 10.0
_OVERLAP: Final = 2_000


async def follow(
    host: TransactionRunner, filter: DeliveryFilter, poll_s: float = POLL_S
) -> AsyncGenerator[StoredDelivery, None]:
    """Yield each delivery after the id `filter.after` as it arrives. Raises StoreUnavailable."""
    complete = newest = filter.after or 0  # all up to the first of these IDs have come
    seen: set[int] = set()  # greater IDs that have come
    looks: deque[tuple[float, int]] = deque()  # when each ended, and the newest ID by then
    while True:
        began, after = time.monotonic(), complete
        while True:
            next_page = replace(filter, after=after, oldest_first=True, limit=_PAGE)
            page = await host.read(partial(_search, next_page, seen))
            for delivery in page:
                after = delivery.id
                seen.add(after)
                yield delivery
            newest = max(newest, after)
            complete = max(complete, newest - _OVERLAP)
            seen = {each for each in seen if each > complete}
            if len(page) < _PAGE:
                break
        while looks and looks[0][0] <= began - _LATE_S:
            complete = max(complete, looks.popleft()[1])
        looks.append((time.monotonic(), newest))
        await asyncio.sleep(poll_s)


async def newest_id(host: TransactionRunner) -> int:
    """Return the id of the newest delivery; 0 if there is none. Raises StoreUnavailable."""
    page = await host.read(partial(_search, DeliveryFilter(limit=1), ()))
    return page[0].id if page else 0


def _search(filter: DeliveryFilter, seen: Collection[int], store: Store) -> list[StoredDelivery]:
    """List deliveries. The bodies of those that were seen aren't read again."""
    return store.inbox.search(filter, without=seen)


async def compare_clocks(host: TransactionRunner, clock: Clock) -> None:
    """Estimate now and every minute how far Logto's clock is ahead of ours. The estimate decides
    which dates are plausible. It doesn't change while the database can't be reached."""

    async def compare() -> None:
        clocks = await host.read(lambda store: store.clocks(RECENT))
        clock.ahead_ms = estimate_ahead(clock.now(), clocks)

    await forever(compare, 60.0)
