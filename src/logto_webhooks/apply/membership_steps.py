"""End the memberships of a deleted user or organization, or announce those of one that came, in
steps: they can be too many for one transaction."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Final

from logto_webhooks.apply import batch
from logto_webhooks.apply.batch import BatchSizer
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import STATEMENT_S, Store
from logto_webhooks.errors import RowRejected, TimedOut
from logto_webhooks.handlers.enqueue import (
    WrittenRecords,
    enqueue_for_announced,
    enqueue_for_ended,
)
from logto_webhooks.records.merge import merge
from logto_webhooks.records.record import Arrival, Ending, Key, Named

LISTED: Final = 50_000  # memberships per lookup
LEAST: Final = 600  # memberships per step: tens of ms on SQLite
MOST: Final = 5_000
LONGEST_S: Final = 0.3  # for a step, because deliveries are applied between steps
LOOK_S: Final = 1.0
LOCKED_S: Final = 5.0  # until a locked record is tried again
LOCK_S: Final = 0.2


class MembershipEnder:
    """Ends memberships in steps. Any number of workers may do so, because each step locks the
    deleted record."""

    def __init__(self, host: TransactionRunner, budget_s: float) -> None:
        self._host = host
        self._sizer = BatchSizer(min(budget_s, LONGEST_S), MOST, LEAST)
        self._ending: Ending | None = None
        self._left: list[Key] = []
        self._ended = 0  # of those that were listed
        self._look_at = 0.0
        self._locked: dict[Key, float] = {}  # the deleted record -> when it is tried again
        self._holds_end = False

    def wake(self) -> None:
        """Look for memberships to end at the next step."""
        self._look_at = 0.0

    async def step(self) -> int:
        """End some memberships. Return how many. Raises StoreUnavailable."""
        if not self._left and not await self._list():
            return 0
        assert self._ending is not None
        ending, pairs = self._ending, self._left[: self._sizer.weight]
        self._holds_end = False
        try:
            await self._host.run(lambda store: self._end(store, ending, pairs))
        except (RowRejected, TimedOut):
            self._put_off(ending, pairs)
            return 0
        self._left = self._left[len(pairs) :]
        self._ended += len(pairs)
        return len(pairs)

    async def _list(self) -> bool:
        """Find memberships to end. Return whether there are any."""
        now = time.monotonic()
        if now < self._look_at:
            return False
        if self._ending is not None and not self._ended:  # all remaining ones are locked
            self._locked[self._ending.key] = now + LOCKED_S
        self._ending, self._ended = None, 0
        self._locked = {key: until for key, until in self._locked.items() if until > now}
        try:
            endings = await self._host.read(Store.endings)
            for ending in endings:
                if ending.key in self._locked:
                    continue
                self._left = await self._host.read(
                    partial(Store.memberships_to_end, ending=ending, limit=LISTED)
                )
                if self._left:
                    # Then a step changes few rows of each page: on PostgreSQL, their new versions
                    # find room there, and no index is written.
                    random.shuffle(self._left)
                    self._ending = ending
                    return True
                newest = await self._host.read(partial(Store.newest_membership, end=ending.key))
                await self._host.run(partial(_finish, ending=ending, newest=newest))
        except (RowRejected, TimedOut):
            pass
        self._look_at = now + LOOK_S
        return False

    def _put_off(self, ending: Ending, pairs: list[Key]) -> None:
        if not self._holds_end:  # the deleted record itself is locked
            self._locked[ending.key] = time.monotonic() + LOCKED_S
            self._ending, self._left = None, []
        elif len(pairs) == 1:  # it is locked, and is listed again later
            self._left = self._left[1:]
        else:
            self._sizer.weight = max(1, len(pairs) // 2)

    def _end(self, store: Store, ending: Ending, pairs: list[Key]) -> None:
        store.limit_waits(LOCK_S, STATEMENT_S)
        end = store.lock([ending.key])[ending.key]
        self._holds_end = True
        started = time.perf_counter()
        present, newest = store.end_memberships(end, pairs)
        named = merge(end, Named(end.key, newest))
        if named is not end:  # a newer membership is evidence that the record exists
            store.save([named])
        enqueue_for_ended(store, present, ending)
        self._sizer.adjust(len(pairs), time.perf_counter() - started)


class MembershipAnnouncer:
    """Announces the memberships of a user or an organization that came, in steps."""

    def __init__(self, host: TransactionRunner) -> None:
        self._host = host
        self._arrival: Arrival | None = None
        self._after = ""
        self._look_at = 0.0

    async def step(self) -> int:
        """Announce some memberships. Return how many were compared. Raises StoreUnavailable."""
        if self._arrival is None:
            if time.monotonic() < self._look_at:
                return 0
            self._look_at = time.monotonic() + LOOK_S
            arrivals = await self._host.read(Store.arrivals)
            if not arrivals:
                return 0
            self._arrival, self._after = random.choice(arrivals), ""
        arrival, after = self._arrival, self._after
        try:
            pairs = await self._host.read(
                lambda store: store.unannounced(arrival.key, after, LEAST)
            )
            if pairs:
                await self._host.run(partial(_announce, pairs=pairs, arrival=arrival))
                self._after = pairs[-1].id
            else:
                await self._host.run(partial(Store.finish_arrival, arrival=arrival))
                self._arrival = None
        except (RowRejected, TimedOut):  # something is locked: begin again later
            self._arrival = None
            return 0
        return len(pairs)


def _announce(store: Store, pairs: list[Key], arrival: Arrival) -> None:
    store.limit_waits(LOCK_S, STATEMENT_S)
    ends: batch.Ends = {}
    members = batch.announce(store, store.lock(pairs), ends)
    written = WrittenRecords([], [], members, ends=ends)
    enqueue_for_announced(store, written, arrival)


def _finish(store: Store, ending: Ending, newest: int) -> None:
    """Finish an ending. `newest` includes memberships that the deletion of their other end ended,
    which no step saw."""
    store.limit_waits(LOCK_S, STATEMENT_S)
    end = store.lock([ending.key])[ending.key]
    named = merge(end, Named(end.key, newest))
    if named is not end:
        store.save([named])
    store.finish_ending(ending)
