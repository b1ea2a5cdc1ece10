"""End the memberships of deleted users and organizations, or announce those of ones that came, in
steps: they can be too many for one transaction. Those of users and organizations with few
memberships are ended or announced together; those of others, one after the other."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from msgspec.structs import replace

from logto_webhooks.apply import batch
from logto_webhooks.batch_sizes import BatchSizer
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import STATEMENT_S, Store
from logto_webhooks.errors import WORTH_DIVIDING, NoAnswer, describe
from logto_webhooks.handlers.enqueue import (
    WrittenRecords,
    enqueue_for_announced,
    enqueue_for_ended,
)
from logto_webhooks.instrumentation import MembershipsDelayed, Observer
from logto_webhooks.records.local_events import is_here
from logto_webhooks.records.merge import merge
from logto_webhooks.records.record import NEVER, Arrival, Ending, Key, Named

LISTED: Final = 50_000  # memberships per lookup
FEW: Final = 600  # memberships of a user or an organization that shares a step with others
MOST: Final = 5_000
MOST_ENDS: Final = 100  # users and organizations per step
LONGEST_STEP_S: Final = 0.3  # for a step, because deliveries are applied between steps
SHORTEST_S: Final = 0.05  # because each step takes some time, however small it is
LOOK_S: Final = 1.0
LOCKED_S: Final = 5.0  # until a locked record is tried again
LOCK_S: Final = 0.2


class _PutOff:
    """The users and organizations that are tried again later, because something is locked or
    refused. Others go on meanwhile."""

    def __init__(self, observe: Observer) -> None:
        self._observe = observe
        self._until: dict[Key, float] = {}

    def add(self, end: Key, error: Exception | None = None) -> None:
        """Put one off, and report an error."""
        self._until[end] = time.monotonic() + LOCKED_S
        if error is not None:
            self._observe(MembershipsDelayed(f"{end.kind}:{end.id}", describe(error), LOCKED_S))

    def list(self) -> list[Key]:
        """List those that are put off now."""
        now = time.monotonic()
        self._until = {end: until for end, until in self._until.items() if until > now}
        return list(self._until)


class MembershipEnder:
    """Ends memberships in steps. Any number of workers may do so, because each step locks the
    deleted records."""

    def __init__(self, host: TransactionRunner, observe: Observer, budget_s: float) -> None:
        self._host = host
        step_s = max(SHORTEST_S, min(budget_s, LONGEST_STEP_S))
        self._ends = BatchSizer(step_s, MOST_ENDS)  # with few memberships
        self._sizer = BatchSizer(step_s, MOST)  # of memberships
        self._ending: Ending | None = None  # of one with many memberships
        self._left: list[Key] = []
        self._took_few = False
        self._ended = 0  # of those that were listed
        self._look_at = 0.0
        self._put_off = _PutOff(observe)
        self._holds_end = False

    def wake(self) -> None:
        """Look for memberships to end at the next step."""
        self._look_at = 0.0

    async def step(self) -> int:
        """End some memberships. Return how much was done or tried. Raises StoreUnavailable."""
        if self._ending is not None and self._left:
            return await self._end_some(self._ending)
        if time.monotonic() < self._look_at:
            return 0
        if self._ending is not None and not self._ended:  # all remaining ones are locked
            self._put_off.add(self._ending.key)
        self._ending, self._ended = None, 0
        find = partial(Store.endings, limit=self._ends.weight, without=self._put_off.list())
        endings = await self._host.read(find)
        if not endings:
            self._look_at = time.monotonic() + LOOK_S
            return 0
        keys = [ending.key for ending in endings]
        few = await self._host.read(partial(Store.with_few_memberships, ends=keys, most=FEW))
        self._took_few = _is_turn_of_few(few, keys[0], self._took_few)
        if self._took_few:
            work = partial(_end_all_of, ends=few)
            return await _work_together(self._host, work, few, self._ends, self._put_off)
        return await self._begin(endings[0])

    async def _begin(self, ending: Ending) -> int:
        """List memberships to end, and end some. If there are none, finish."""
        try:
            find = partial(Store.memberships_to_end, ending=ending, limit=LISTED)
            self._left = await self._host.read(find)
            if not self._left:
                newest = await self._find_newest(ending.key)
                await self._host.run(partial(_finish, ending=ending, newest=newest))
                return 1
        except WORTH_DIVIDING as error:
            self._put_off.add(ending.key, error)
            return 1
        # Then a step changes few rows of each page: on PostgreSQL, their new versions find room
        # there, and no index is written.
        random.shuffle(self._left)
        self._ending = ending
        return await self._end_some(ending)

    async def _find_newest(self, end: Key) -> int:
        newest = NEVER
        after: str | None = ""
        while after is not None:
            find = partial(Store.newest_membership, end=end, after=after)
            newest_of_page, after = await self._host.read(find)
            newest = max(newest, newest_of_page)
        return newest

    async def _end_some(self, ending: Ending) -> int:
        pairs = self._left[: self._sizer.weight]
        self._holds_end = False
        try:
            await self._host.run(lambda store: self._end(store, ending, pairs))
        except WORTH_DIVIDING as error:
            if isinstance(error, NoAnswer) and len(pairs) > 1:
                self._sizer.shrink()
            elif not self._holds_end:  # the deleted record itself is locked
                self._put_off.add(ending.key, error)
                self._ending, self._left = None, []
            elif len(pairs) == 1:  # it is locked, and is listed again later
                self._left = self._left[1:]
            else:
                self._sizer.weight = max(1, len(pairs) // 2)
        else:
            self._left = self._left[len(pairs) :]
            self._ended += len(pairs)
        return len(pairs)

    def _end(self, store: Store, ending: Ending, pairs: list[Key]) -> None:
        store.limit_waits(LOCK_S, STATEMENT_S)
        end = store.lock([ending.key])[ending.key]
        self._holds_end = True
        started = time.perf_counter()
        present, newest = store.end_memberships(end, pairs)
        named = merge(end, Named(end.key, newest))
        if named is not end:  # a newer membership is evidence that the record exists
            store.save([named])
        enqueue_for_ended(store, present, [ending])
        store.project_changes()  # which is part of the time that it takes
        self._sizer.adjust(len(pairs), time.perf_counter() - started)


class MembershipAnnouncer:
    """Announces the memberships of users and organizations that came, in steps."""

    def __init__(self, host: TransactionRunner, observe: Observer, budget_s: float) -> None:
        self._host = host
        step_s = max(SHORTEST_S, min(budget_s, LONGEST_STEP_S))
        self._ends = BatchSizer(step_s, MOST_ENDS)  # with few memberships
        self._sizer = BatchSizer(step_s, MOST)  # of memberships
        self._arrival: Arrival | None = None  # of one with many memberships
        self._after = ""
        self._took_few = False
        self._look_at = 0.0
        self._put_off = _PutOff(observe)

    async def step(self) -> int:
        """Announce some memberships. Return how much was done or tried. Raises StoreUnavailable."""
        if self._arrival is not None:
            return await self._announce_some(self._arrival)
        if time.monotonic() < self._look_at:
            return 0
        find = partial(Store.arrivals, limit=MOST_ENDS, without=self._put_off.list())
        arrivals = await self._host.read(find)
        if not arrivals:
            self._look_at = time.monotonic() + LOOK_S
            return 0
        random.shuffle(arrivals)  # other workers may announce, too
        arrivals = arrivals[: self._ends.weight]
        keys = [arrival.key for arrival in arrivals]
        few = await self._host.read(partial(Store.with_few_memberships, ends=keys, most=FEW))
        self._took_few = _is_turn_of_few(few, keys[0], self._took_few)
        if self._took_few:
            work = partial(_announce_all_of, arrivals=[one for one in arrivals if one.key in few])
            return await _work_together(self._host, work, few, self._ends, self._put_off)
        self._arrival, self._after = arrivals[0], ""
        return await self._announce_some(self._arrival)

    async def _announce_some(self, arrival: Arrival) -> int:
        pairs: Sequence[Key] = ()
        try:
            limit = self._sizer.weight
            find = partial(Store.unannounced, end=arrival.key, after=self._after, limit=limit)
            pairs = await self._host.read(find)
            if pairs:
                started = time.perf_counter()
                await self._host.run(partial(_announce, pairs=pairs, arrivals=[arrival]))
                self._sizer.adjust(len(pairs), time.perf_counter() - started)
                self._after = pairs[-1].id
            else:
                await self._host.run(partial(Store.finish_arrivals, arrivals=[arrival]))
                self._arrival = None
        except WORTH_DIVIDING as error:
            if isinstance(error, NoAnswer) and len(pairs) > 1:
                self._sizer.shrink()
            else:  # something is locked: begin again later
                self._put_off.add(arrival.key, error)
                self._arrival = None
        return 1


def _is_turn_of_few(few: Sequence[Key], first: Key, took_few: bool) -> bool:
    """Whether to take those with few memberships now: in turn with the first one if that has many,
    so that it doesn't wait as long as others come."""
    return bool(few) and (first in few or not took_few)


async def _work_together(
    host: TransactionRunner,
    work: Callable[[Store], None],
    ends: Sequence[Key],
    sizer: BatchSizer,
    put_off: _PutOff,
) -> int:
    """End or announce all memberships of some users and organizations in one transaction. Return
    how many were tried."""
    started = time.perf_counter()
    try:
        await host.run(work)
    except WORTH_DIVIDING as error:
        sizer.shrink() if isinstance(error, NoAnswer) else sizer.halve()
        if len(ends) == 1:
            put_off.add(ends[0], error)
    else:
        sizer.adjust(len(ends), time.perf_counter() - started)
    return len(ends)


def _end_all_of(store: Store, ends: Sequence[Key]) -> None:
    store.limit_waits(LOCK_S, STATEMENT_S)
    before = store.lock(sorted(ends))
    before |= store.lock_memberships(ends, "all")
    records = dict(before)
    batch.end_memberships(records)
    left = []
    for key, record in records.items():
        here = all(is_here(records[end]) for end in key.ends if end in records)
        if record.announced and not (here and is_here(record)):
            records[key] = replace(record, announced=False)
            left.append(key)
    store.save([record for key, record in records.items() if record is not before[key]])
    enqueue_for_ended(store, left, store.take_endings(ends))


def _announce_all_of(store: Store, arrivals: Sequence[Arrival]) -> None:
    store.limit_waits(LOCK_S, STATEMENT_S)
    pairs = store.lock_memberships([arrival.key for arrival in arrivals], "unannounced")
    _announce_locked(store, pairs, arrivals)
    store.finish_arrivals(arrivals)


def _announce(store: Store, pairs: Sequence[Key], arrivals: Sequence[Arrival]) -> None:
    store.limit_waits(LOCK_S, STATEMENT_S)
    _announce_locked(store, store.lock(pairs), arrivals)


def _announce_locked(store: Store, pairs: batch.Records, arrivals: Sequence[Arrival]) -> None:
    ends: batch.Ends = {}
    members = batch.announce(store, pairs, ends)
    enqueue_for_announced(store, WrittenRecords([], [], members, ends=ends), arrivals)


def _finish(store: Store, ending: Ending, newest: int) -> None:
    """Finish an ending. `newest` includes memberships that the deletion of their other end ended,
    which no step saw."""
    store.limit_waits(LOCK_S, STATEMENT_S)
    end = store.lock([ending.key])[ending.key]
    named = merge(end, Named(end.key, newest))
    if named is not end:
        store.save([named])
    store.finish_ending(ending)
