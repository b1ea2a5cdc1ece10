"""Apply deliveries again, and run their dead or discarded jobs again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.apply import batch
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import ClaimedDelivery, DeliveryState, StoredDelivery, identify
from logto_webhooks.errors import MalformedEvent, NotADelivery
from logto_webhooks.events.local import LOCAL
from logto_webhooks.handlers.enqueue import COMING, jobs_for_event, jobs_for_told, record_of
from logto_webhooks.jobs import JobFilter, JobMove, JobRow, NewJob
from logto_webhooks.records.changes import read
from logto_webhooks.records.drift import Drift, drifts_of
from logto_webhooks.records.record import Change, Key
from logto_webhooks.signing_keys import trust

AT_ONCE: Final = 1_000
REPLAYED_AT_ONCE: Final = 200
# Of bodies: accepting waits for the transaction on SQLite, and 16 KiB can name a thousand members.
REPLAYED_BYTES: Final = 16 * 2**10
MOST_DRIFTS: Final = 1_000  # differences that are listed


def iterate_jobs(store: Store, filter: JobFilter) -> Iterator[JobRow]:
    """Yield all jobs that match, whatever the filter's limit, newest first."""
    filter = replace(filter, limit=AT_ONCE)
    while page := store.jobs.find(filter):
        yield from page
        filter = replace(filter, after=page[-1].id)


def cut(ids: Iterable[int], sizes: Mapping[int, int]) -> Iterator[list[int]]:
    """Cut IDs into those that are replayed in one transaction, by number and by size."""
    page: list[int] = []
    for id in ids:
        if page and (
            len(page) == REPLAYED_AT_ONCE
            or sum(sizes[other] for other in page) + sizes[id] > REPLAYED_BYTES
        ):
            yield page
            page = []
        page.append(id)
    if page:
        yield page


class ReplayResult(Struct, frozen=True, kw_only=True):
    """The result of a replay: deliveries applied again, jobs to run again or for the first time,
    and differences. With `dry_run`, what they would be. Of several pages, the first 1,000
    differences are kept."""

    deliveries: int = 0
    jobs: int = 0
    drifts: list[Drift] = []

    def plus(self, other: ReplayResult) -> ReplayResult:
        """Return the sum of both."""
        return ReplayResult(
            deliveries=self.deliveries + other.deliveries,
            jobs=self.jobs + other.jobs,
            drifts=(self.drifts + other.drifts)[:MOST_DRIFTS],
        )


def replay(
    store: Store,
    deliveries: Sequence[StoredDelivery],
    lag_ms: int,
    *,
    handler: str | None = None,
    rerun: bool = False,
    sync_only: bool = False,
    dry_run: bool = False,
) -> ReplayResult:
    """Apply deliveries again, and run their dead or discarded jobs again. Handlers that were added
    since then get jobs, too.

    With `rerun`, jobs that are done also run again, unless their handler opted out. With a
    `handler`, only its jobs run, and only deliveries that were never applied are applied.
    `sync_only` applies in this transaction and runs no jobs. It leaves out pending deliveries: the
    worker that applies them makes the jobs of what they change. `dry_run` also applies in this
    transaction, to find the differences; the caller must roll it back.
    """
    if sync_only:
        deliveries = [
            delivery for delivery in deliveries if delivery.state is not DeliveryState.PENDING
        ]
    at_once = sync_only or dry_run
    applied = [
        delivery
        for delivery in deliveries
        if handler is None or sync_only or delivery.state is DeliveryState.DEAD
    ]
    drifts = _apply(store, applied, lag_ms) if at_once else []
    jobs = 0
    if not sync_only:
        store.inbox.make_pending([delivery.id for delivery in applied])
        job_replay = _JobReplay(store, lag_ms, handler, rerun)
        for delivery in deliveries:
            job_replay.collect(delivery)
        jobs = job_replay.run()
    return ReplayResult(deliveries=len(applied), jobs=jobs, drifts=drifts)


def _apply(store: Store, deliveries: Sequence[StoredDelivery], lag_ms: int) -> list[Drift]:
    all_changes = [_read_changes(delivery, lag_ms) for delivery in deliveries]
    # All records are locked first, in order, to avoid deadlocks with workers.
    batch.lock_records(store, [change for changes in all_changes for change in changes])
    pairs = [pair for changes in all_changes for pair in batch.apply_reads(store, changes, None)]
    return [drift for pair in pairs for drift in drifts_of(*pair)]


def _read_changes(delivery: StoredDelivery, lag_ms: int) -> Sequence[Change]:
    try:
        return read(trust(delivery.body), delivery.occurred_at, lag_ms)[1]
    except MalformedEvent:
        return []


class _JobReplay:
    """Runs jobs of deliveries again, and creates missing ones."""

    def __init__(self, store: Store, lag_ms: int, handler: str | None, rerun: bool) -> None:
        registered = store.jobs.handlers()
        self._store = store
        self._lag_ms = lag_ms
        self._handler = handler
        self._reruns = {
            registration.name for registration in registered if rerun and registration.rerun
        }
        self._handlers = [
            registration for registration in registered if handler in (None, registration.name)
        ]
        self._since = store.installed_at()
        self._is_local_wanted = any(
            registration.wants(name) for registration in self._handlers for name in LOCAL
        )
        self._again: list[int] = []
        self._new: list[NewJob] = []
        self._missing = 0
        self._told: dict[tuple[str, str], NewJob] = {}  # by handler and key
        self._came: set[Key] = set()

    def collect(self, delivery: StoredDelivery) -> None:
        """Find the jobs of a delivery, and make the missing ones, whatever its age. For a dead
        delivery, the worker that applies it makes them.

        Which local events a delivery had is only known from the jobs that it had then.
        """
        existing: set[tuple[str, str, str]] = set()
        for row in iterate_jobs(
            self._store, JobFilter(delivery_id=delivery.id, handler=self._handler)
        ):
            existing.add((row.handler, row.event, row.subject))
            if row.state in ("dead", "discarded") or self._is_rerun(row):
                self._again.append(row.id)
        jobs = self._make_jobs(delivery)
        new = [job for job in jobs if (job.handler, job.event, job.subject) not in existing]
        self._missing += len(new)
        if delivery.state is not DeliveryState.DEAD:
            self._new += new
        if self._is_local_wanted:
            self._collect_told(delivery)

    def _collect_told(self, delivery: StoredDelivery) -> None:
        for told in self._store.jobs.told_events(delivery.id):
            if told.event not in LOCAL:  # another release's
                continue
            event = msgspec.json.decode(told.payload, type=LOCAL[told.event])
            jobs = jobs_for_told(event, told, self._handlers)
            if jobs and isinstance(event, COMING):
                self._came.add(record_of(event))
            for job in jobs:
                self._told.setdefault((job.handler, job.key), job)

    def _find_untold(self) -> list[NewJob]:
        """Return the jobs of past local events that their handlers haven't had. A record that came
        is locked, so that no worker tells of it meanwhile."""
        for kind in ("organization", "user", "membership"):  # as workers do
            self._store.lock(sorted(key for key in self._came if key.kind == kind))
        keys: dict[str, list[str]] = {}
        for handler, key in self._told:
            keys.setdefault(handler, []).append(key)
        known = {name: self._store.jobs.known_keys(name, some) for name, some in keys.items()}
        return [job for (handler, key), job in self._told.items() if key not in known[handler]]

    def run(self) -> int:
        """Create and repeat the jobs of all deliveries at once, so that their queues are locked in
        order."""
        untold = self._find_untold()
        self._missing += len(untold)
        self._store.jobs.add([*self._new, *untold])
        return len(self._store.jobs.move(self._again, JobMove.REPEAT)) + self._missing

    def _is_rerun(self, row: JobRow) -> bool:
        return row.state == "done" and row.handler in self._reruns

    def _make_jobs(self, delivery: StoredDelivery) -> list[NewJob]:
        """Make the jobs that a delivery would have today. It has none before it is applied, or if
        it is older than the installation."""
        if delivery.state is DeliveryState.PENDING or delivery.occurred_at < self._since:
            return []
        body = trust(delivery.body)
        try:
            event, _ = read(body, delivery.occurred_at, self._lag_ms)
            digest = identify(body, delivery.received_at).digest
        except (MalformedEvent, NotADelivery):
            return []
        claimed = ClaimedDelivery(
            id=delivery.id,
            body=delivery.body,
            event=delivery.event,
            subject=delivery.subject,
            received_at=delivery.received_at,
            attempt=1,
            digest=digest,
            occurred_at=delivery.occurred_at,
            origin=delivery.origin,
        )
        return jobs_for_event(event, claimed, self._handlers)
