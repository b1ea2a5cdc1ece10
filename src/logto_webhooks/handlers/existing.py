"""Run a handler for the rows that exist already, such as those from before the handler."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from msgspec import Struct

from logto_webhooks.database.mirror import MirrorPage, RowFilter
from logto_webhooks.database.runner import TransactionRunner, await_open_transactions
from logto_webhooks.database.store import Store
from logto_webhooks.errors import (
    HandlerUnknown,
    NotForRows,
    SettingInvalid,
    StoreUnavailable,
    TimedOut,
)
from logto_webhooks.events.local import (
    LocalEvent,
    LocalMemberAdded,
    LocalOrganizationCreated,
    LocalUserCreated,
)
from logto_webhooks.handlers.enqueue import jobs_for_change
from logto_webhooks.jobs import RegisteredHandler
from logto_webhooks.records import local_events
from logto_webhooks.records.record import Key, Kind, Record

RATE: Final = 100.0  # jobs per second
LEAST_RATE: Final = 0.001
PAGE: Final = 200  # rows of one transaction
_TRIES: Final = 30  # for a page with a locked record; each waits for the lock
# In this order: a member's user and organization come first.
_KINDS: Final[dict[str, tuple[Kind, str]]] = {
    LocalUserCreated.name: ("user", "users"),
    LocalOrganizationCreated.name: ("organization", "organizations"),
    LocalMemberAdded.name: ("membership", "members"),
}
# What is listed, how many so far, and which fraction of all, from 0 to 1.
Progressed = Callable[[str, int, float], None]


class ExistingRows(Struct, kw_only=True):
    """For how many existing rows a handler gets an event: of the `rows` that were selected, so many
    new `jobs`. `skipped` are those for which it has had a job before, and those that have gone
    meanwhile."""

    event: str
    rows: int = 0
    jobs: int = 0
    skipped: int = 0


class Pacer:
    """Limits the rate of work."""

    def __init__(
        self,
        rate: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`rate` is per second. Raises SettingInvalid if it isn't a number that can be one."""
        if type(rate) not in (int, float) or not LEAST_RATE <= rate < math.inf:
            problem = f"{rate!r:.60} isn't a number of at least {LEAST_RATE:g}"
            raise SettingInvalid(name="the rate", problem=problem)
        self._rate = rate
        self._now = now
        self._sleep = sleep
        self._free_at = -math.inf
        self.at_once = max(1, min(PAGE, int(rate)))  # at most a second's work

    async def wait(self) -> None:
        """Wait until more work may be done."""
        await self._sleep(max(0.0, self._free_at - self._now()))

    def spend(self, count: int) -> None:
        """Note that so much work was done now."""
        self._free_at = max(self._free_at, self._now()) + count / self._rate


async def run_for_existing(
    host: TransactionRunner,
    handler: RegisteredHandler,
    wanted: RowFilter,
    pacer: Pacer,
    *,
    dry_run: bool,
    progressed: Progressed,
) -> list[ExistingRows]:
    """Make a handler's jobs for the rows that exist, each once, in short transactions. With
    `dry_run`, only count them.

    Raises NotForRows, SettingInvalid for a filter that selects no such rows, HandlerUnknown if the
    handler is forgotten meanwhile, StoreUnavailable.
    """
    events = _choose_events(handler, wanted)
    if not dry_run:  # the handler may have been registered just now
        await await_open_transactions(host)
    total: int | None = None
    with contextlib.suppress(StoreUnavailable):  # it may take too long; the share is then 0
        total = await host.read_long(partial(_count, events=events, wanted=wanted))
    results, done = [], 0
    for event in events:
        kind, title = _KINDS[event]
        result, after, is_last = ExistingRows(event=event), None, False
        progressed(title, 0, _find_share(done, total))
        while not is_last:
            await pacer.wait()
            work = _PageWork(handler, event, kind, wanted, after, pacer.at_once, dry_run)
            page, jobs = await _run_patiently(host, work)
            if not dry_run:
                pacer.spend(jobs)
            rows = len(page.keys)
            result.rows += rows
            result.jobs += jobs
            result.skipped += rows - jobs
            done += rows
            progressed(title, result.rows, _find_share(done, total))
            after, is_last = page.last, page.last is None
        results.append(result)
    return results


def _find_share(done: int, total: int | None) -> float:
    return 0.0 if total is None else min(1.0, done / max(1, total))


def find_handler(store: Store, name: str) -> RegisteredHandler:
    """Return a registered handler. Raises HandlerUnknown, with the names of all."""
    handlers = {handler.name: handler for handler in store.jobs.handlers()}
    if name not in handlers:
        raise HandlerUnknown(name, list(handlers))
    return handlers[name]


def _choose_events(handler: RegisteredHandler, wanted: RowFilter) -> list[str]:
    """Return the events of existing rows that a handler gets."""
    events = [name for name in _KINDS if handler.tests != "only" and handler.wants(name)]
    if not events:
        raise NotForRows(name=handler.name, events=", ".join(handler.patterns))
    if wanted.is_of_users:
        events = [name for name in events if name != LocalOrganizationCreated.name]
    if not events:
        problem = (
            f"a user or an email selects no organizations, and the handler {handler.name} is only "
            "for LocalOrganizationCreated"
        )
        raise SettingInvalid(name="the selection of rows", problem=problem)
    return events


def _count(store: Store, events: Sequence[str], wanted: RowFilter) -> int:
    return sum(store.mirror.count(_KINDS[event][0], wanted) for event in events)


async def _run_patiently(host: TransactionRunner, work: _PageWork) -> tuple[MirrorPage, int]:
    """Make the jobs of a page. If another transaction has locked one of its records, try again."""
    if work.dry_run:
        return await host.read(work.make_jobs)
    for _ in range(_TRIES):
        try:
            return await host.run(work.make_jobs)
        except TimedOut:
            continue
    return await host.run(work.make_jobs)


class _PageWork(Struct, frozen=True):
    """The next rows of a kind, after a record."""

    handler: RegisteredHandler
    event: str
    kind: Kind
    wanted: RowFilter
    after: Key | None
    limit: int
    dry_run: bool

    def make_jobs(self, store: Store) -> tuple[MirrorPage, int]:
        """Make the jobs of rows for which the handler has had none. Return the page, and the number
        of these jobs."""
        handler = self.handler
        if not self.dry_run:  # it may have been forgotten meanwhile
            handler = find_handler(store, handler.name)
        page = store.mirror.list_page(self.kind, self.wanted, self.after, self.limit)
        jobs = [
            job
            for event in self._find_events(store, page.keys)
            for job in jobs_for_change(event, [handler], None)
        ]
        known = store.jobs.find_known(handler.name, [job.key for job in jobs])
        new = [job for job in jobs if job.key not in known]
        if not self.dry_run:
            store.jobs.add(new)
        return page, len(new)

    def _find_events(self, store: Store, keys: Sequence[Key]) -> list[LocalEvent]:
        """Return the events of records that are here. They are locked, so that no change of one is
        told before it."""
        in_order = sorted(keys)
        records = store.read_unlocked(in_order) if self.dry_run else store.lock(in_order)
        here = [records[key] for key in keys if local_events.is_here(records[key])]
        if self.kind == "membership":
            here = _without_others_work(store, here)
        return [local_events.existing(record) for record in here]


def _without_others_work(store: Store, members: Sequence[Record]) -> list[Record]:
    """Leave out members whose user or organization isn't here, and those that a worker has yet to
    announce to handlers: it is telling of a user's or an organization's members step by step."""
    ends = {end for record in members for end in record.key.organization_and_user}
    here = {key for key, end in store.read_heads(ends).items() if local_events.is_here(end)}
    announced_later = store.arriving(ends)
    return [
        record
        for record in members
        if here.issuperset(record.key.organization_and_user)
        and (record.announced or announced_later.isdisjoint(record.key.organization_and_user))
    ]
