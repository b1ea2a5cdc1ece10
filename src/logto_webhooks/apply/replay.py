"""Apply deliveries again, and run their dead or discarded jobs again."""

from __future__ import annotations

from collections import deque
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
from logto_webhooks.handlers.enqueue import (
    COMING,
    jobs_for_event,
    jobs_for_told,
    name_coming,
    record_of,
)
from logto_webhooks.jobs import JobMove, JobOfDelivery, KnownJob, NewJob, RegisteredHandler
from logto_webhooks.records.changes import read
from logto_webhooks.records.drift import Drift, drifts_of
from logto_webhooks.records.record import Change, Key
from logto_webhooks.signing_keys import trust

HandlerAndKey = tuple[str, str]
AT_ONCE: Final = 1_000  # jobs
REPLAYED_AT_ONCE: Final = 200
# Of bodies: accepting waits for the transaction on SQLite, and 16 KiB can name a thousand members.
REPLAYED_BYTES: Final = 16 * 2**10
MOST_DRIFTS: Final = 1_000  # differences that are listed


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
    sync_only: bool = False,
    dry_run: bool = False,
) -> ReplayResult:
    """Apply deliveries again, and make jobs for the handlers that their events lack. `replay_jobs`
    does the rest.

    With a `handler`, only its jobs run, and only deliveries that were never applied are applied.
    `sync_only` applies in this transaction and runs no jobs. It leaves out pending deliveries: the
    worker that applies them makes the jobs of what they change. `dry_run` also applies in this
    transaction, to find the differences; the caller must roll it back.
    """
    if sync_only:
        deliveries = [
            delivery for delivery in deliveries if delivery.state is not DeliveryState.PENDING
        ]
    applied = [
        delivery
        for delivery in deliveries
        if handler is None or sync_only or delivery.state is DeliveryState.DEAD
    ]
    drifts = _apply(store, applied, lag_ms) if sync_only or dry_run else []
    jobs = 0
    if not sync_only:
        store.inbox.make_pending([delivery.id for delivery in applied])
        jobs = _add_missing_jobs(store, deliveries, lag_ms, _find_handlers(store, handler))
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


def _find_handlers(store: Store, name: str | None) -> list[RegisteredHandler]:
    return [handler for handler in store.jobs.handlers() if name in (None, handler.name)]


def _add_missing_jobs(
    store: Store,
    deliveries: Sequence[StoredDelivery],
    lag_ms: int,
    handlers: Sequence[RegisteredHandler],
) -> int:
    """Add the jobs that deliveries would have today, whatever their age, and don't have. Return how
    many. Those of a dead delivery are made by the worker that applies it."""
    since = store.installed_at()
    made = [
        (job, delivery.state)
        for delivery in deliveries
        for job in _make_jobs(delivery, lag_ms, handlers, since)
    ]
    known = _find_known(store, [(job.handler, job.key) for job, _ in made])
    missing = [(job, state) for job, state in made if (job.handler, job.key) not in known]
    store.jobs.add([job for job, state in missing if state is not DeliveryState.DEAD])
    return len(missing)


def _find_known(store: Store, wanted: Iterable[HandlerAndKey]) -> dict[HandlerAndKey, KnownJob]:
    """Return those of the jobs that their handlers had."""
    keys: dict[str, set[str]] = {}
    for handler, key in wanted:
        keys.setdefault(handler, set()).add(key)
    return {
        (handler, key): job
        for handler, some in keys.items()
        for key, job in store.jobs.find_known(handler, some).items()
    }


def _make_jobs(
    delivery: StoredDelivery, lag_ms: int, handlers: Sequence[RegisteredHandler], since: int
) -> list[NewJob]:
    """Make the jobs that a delivery would have today. It has none before it is applied, or if it is
    older than the installation."""
    if delivery.state is DeliveryState.PENDING or delivery.occurred_at < since:
        return []
    body = trust(delivery.body)
    try:
        event, _ = read(body, delivery.occurred_at, lag_ms)
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
    return jobs_for_event(event, claimed, handlers)


class JobReplay:
    """Runs the jobs of deliveries again, in short transactions: a deletion can have made hundreds
    of thousands. Handlers that were added since then get the local events that others were told of:
    which ones a delivery had is only known from the jobs that it had then."""

    def __init__(
        self, delivery_ids: Sequence[int], handler: str | None = None, rerun: bool = False
    ) -> None:
        """With `rerun`, jobs that are done also run again, unless their handler opted out. With a
        `handler`, only its jobs run."""
        self._left = deque(delivery_ids)
        self._handler = handler
        self._rerun = rerun
        self._after = 0  # the last job of the first delivery that was looked at
        self._made: dict[HandlerAndKey, KnownJob] = {}  # a dry run doesn't store them
        self.is_over = False

    def find_jobs(self, store: Store) -> list[JobOfDelivery]:
        """List the next jobs."""
        rows: list[JobOfDelivery] = []
        while self._left and len(rows) < AT_ONCE:
            page = store.jobs.list_of_delivery(self._left[0], self._after, AT_ONCE - len(rows))
            rows += page
            if len(rows) == AT_ONCE:
                self._after = page[-1].id
            else:
                self._left.popleft()
                self._after = 0
        self.is_over = not self._left
        return rows

    def run(self, store: Store, rows: Sequence[JobOfDelivery]) -> int:
        """Run those of the jobs again that are dead or discarded, or done if that is wanted, and
        make those of new handlers. Return how many."""
        registered = store.jobs.handlers()
        reruns = {handler.name for handler in registered if self._rerun and handler.rerun}
        again = [
            row.id
            for row in rows
            if self._handler in (None, row.handler)
            and (
                row.state in ("dead", "discarded")
                or (row.state == "done" and row.handler in reruns)
            )
        ]
        untold = self._find_untold(store, rows, _find_handlers(store, self._handler))
        # All at once, so that their queues are locked in order.
        store.jobs.add(untold)
        return len(store.jobs.move(again, JobMove.REPEAT)) + len(untold)

    def _find_untold(
        self, store: Store, rows: Sequence[JobOfDelivery], handlers: Sequence[RegisteredHandler]
    ) -> list[NewJob]:
        """Return the jobs of past local events that their handlers haven't had. A record that came
        is locked, so that no worker tells of it meanwhile."""
        first = {(row.delivery_id, row.key): row for row in reversed(rows) if row.event in LOCAL}
        wanted = [
            row.id
            for row in first.values()
            if any(handler.wants(row.event) for handler in handlers)
        ]
        came: set[Key] = set()
        jobs: list[_JobOfPast] = []
        for told in store.jobs.told_events(wanted) if wanted else ():
            event = msgspec.json.decode(told.payload, type=LOCAL[told.event])
            made = jobs_for_told(event, told, handlers)
            if made and isinstance(event, COMING):
                came.add(record_of(event))
            place = KnownJob(told.delivery_id, told.occurred_at)
            jobs += [_JobOfPast(job, place, name_coming(event)) for job in made]
        for kind in ("organization", "user", "membership"):  # as workers do
            store.lock(sorted(key for key in came if key.kind == kind))
        known = _find_known(store, {key for past in jobs for key in past.keys}) | self._made
        untold = []
        for past in jobs:
            key = past.choose_key(known)
            if key is not None:
                new = {(past.job.handler, key): past.event}
                known |= new
                self._made |= new
                untold.append(replace(past.job.with_key(key), key_again=None))
        return untold


class _JobOfPast(Struct, frozen=True):
    """A job of a past local event. `first_key` is the key of a handler's first job of COMING for
    the event's record."""

    job: NewJob
    event: KnownJob
    first_key: str

    @property
    def keys(self) -> set[HandlerAndKey]:
        """The keys of the jobs that `choose_key` looks for."""
        keys = (self.job.key, self.job.key_again, self.first_key)
        return {(self.job.handler, key) for key in keys if key is not None}

    def choose_key(self, known: Mapping[HandlerAndKey, KnownJob]) -> str | None:
        """Choose the job's key. None if the handler was told of the event, or has been told since
        of the record as it was then, such as by `handlers run`."""
        job, event = self.job, self.event
        key: str | None = job.key
        if first := known.get((job.handler, self.first_key)):
            if first.delivery_id is None and event.occurred_at <= first.occurred_at:
                return None
            if key == self.first_key:
                key = None if first.delivery_id == event.delivery_id else job.key_again
        is_told = any((job.handler, other) in known for other in (key, job.key_again))
        return None if is_told else key
