"""An in-memory store for tests."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct, field
from msgspec.structs import asdict, replace

from logto_webhooks.checkpoints import RECONCILE, RECOVER, SILENT
from logto_webhooks.clock_offset import Clocks, Dated
from logto_webhooks.deliveries import (
    DELETIONS,
    MEMBERSHIP_EVENTS,
    ClaimedDelivery,
    DeliveryFilter,
    DeliveryOutcome,
    NewDelivery,
    ReceivedBody,
    StoredDelivery,
    StoreResult,
    sent_at_of,
)
from logto_webhooks.errors import ClaimLost
from logto_webhooks.interfaces import (
    Clock,
    DatabaseClock,
    FoundRow,
    Progress,
    RefetchNeed,
    Status,
    Store,
)
from logto_webhooks.jobs import (
    Job,
    JobCount,
    JobFilter,
    JobOutcome,
    JobRow,
    NewJob,
    RegisteredHandler,
)
from logto_webhooks.records.ending import Ending
from logto_webhooks.records.merge import merge
from logto_webhooks.records.projection import child_rows, project
from logto_webhooks.records.record import NEVER, Key, Kind, Record, Tombstone
from logto_webhooks.signing_keys import (
    BOUNDS,
    OVERLAP_MS,
    QuarantineLimits,
    RejectedRequest,
    WebhookKey,
    fingerprint,
    is_key,
)
from logto_webhooks.states import JOB_MOVES, DeliveryState, JobMove, JobState

Line = tuple[str, str]  # handler, line


class KeptJob(Struct, frozen=True):
    """A job, and where it stands."""

    id: int
    job: NewJob
    occurred_at: int
    state: JobState = JobState.WAITING
    attempts: int = 0
    failures: int = 0
    runs: int = 0
    finished_at: int | None = None
    error: str | None = None

    @property
    def is_begun(self) -> bool:
        """By who holds its line, or lost it."""
        return self.attempts > self.failures


class KeptLine(Struct, frozen=True):
    """A line in which jobs wait."""

    id: int
    due_at: int
    token: str | None = None


class JobTables(Struct):
    """All that is held of jobs."""

    handlers: dict[str, RegisteredHandler] = {}
    jobs: dict[int, KeptJob] = {}
    ids: dict[tuple[str, str], int] = {}
    lines: dict[Line, KeptLine] = {}
    lines_made: int = 0

    def copy(self) -> JobTables:
        """Copy the tables; rows are frozen."""
        return JobTables(
            dict(self.handlers), dict(self.jobs), dict(self.ids), dict(self.lines), self.lines_made
        )


def ended(job: KeptJob, outcome: JobOutcome, now: int) -> KeptJob:
    """A job after an attempt."""
    is_over = outcome.state is not JobState.WAITING
    return replace(
        job,
        state=outcome.state,
        error=outcome.error,
        failures=job.failures + outcome.failed,
        attempts=job.attempts - (not outcome.counts),
        finished_at=now if is_over else None,
    )


def moved(job: KeptJob, move: JobMove, now: int) -> KeptJob:
    """A job that was repeated or discarded by hand."""
    if move is JobMove.DISCARD:
        return replace(job, state=JobState.DISCARDED, finished_at=now)
    afresh = replace(job, attempts=0, failures=0)
    if job.state is JobState.WAITING:
        return afresh
    return replace(
        afresh, state=JobState.WAITING, occurred_at=now, runs=job.runs + 1, finished_at=None
    )


class KeyTables(Struct):
    """All that is held of keys."""

    learnt: dict[str, WebhookKey] = {}
    used: dict[str, int] = {}
    strangers: dict[int, RejectedRequest] = {}
    made: int = 0

    def copy(self) -> KeyTables:
        """Copy the tables; rows are frozen."""
        return KeyTables(dict(self.learnt), dict(self.used), dict(self.strangers), self.made)


class MemoryKeys:
    """The signing keys of the in-memory store."""

    def __init__(self, tables: KeyTables, clock: Clock) -> None:
        self._tables = tables
        self._clock = clock

    def learnt(self) -> list[WebhookKey]:
        """The keys that Logto told."""
        learnt = [each for each in self._tables.learnt.values() if is_key(each.key)]
        return sorted(learnt, key=lambda each: each.learnt_at)

    def learn(self, new: Sequence[WebhookKey]) -> None:
        """Keep keys; the others of the same hooks end after the overlap, unless they do before.
        What can't be a key isn't kept."""
        for each in filter(lambda told: is_key(told.key), new):
            for known, other in self._tables.learnt.items():
                if other.hook == each.hook and other.key != each.key and other.until is None:
                    ends = each.learnt_at + OVERLAP_MS
                    self._tables.learnt[known] = replace(other, until=ends)
            self._tables.learnt[fingerprint(each.key)] = each

    def used(self, marks: dict[str, int]) -> dict[str, int]:
        """Note when keys were last used (ms), by their fingerprints; return that of all."""
        self._tables.used |= marks
        return dict(self._tables.used)

    def set_aside(self, strangers: Sequence[RejectedRequest]) -> None:
        """Keep requests, and of all that are kept what is within the bounds."""
        for each in strangers:
            self._tables.made += 1
            self._tables.strangers[self._tables.made] = replace(each, id=self._tables.made)
        for known, bounds in BOUNDS.items():
            self._prune(known, bounds)

    def strangers(self, after: int, limit: int) -> list[RejectedRequest]:
        """List what is set aside, the oldest first."""
        return [each for id, each in sorted(self._tables.strangers.items()) if id > after][:limit]

    def release(self, ids: Sequence[int]) -> None:
        """Forget what was set aside."""
        for each in ids:
            self._tables.strangers.pop(each, None)

    def aside(self, since: int = 0, *, known: bool = False) -> int:
        """Count what is set aside, received after a moment (ms); of `known` hooks, or of any."""
        later = (each for each in self._tables.strangers.values() if each.received_at > since)
        return sum(each.known or not known for each in later)

    def _prune(self, known: bool, bounds: QuarantineLimits) -> None:
        total = place = 0
        oldest = self._clock.now() - bounds.age_ms
        for each in sorted(self._tables.strangers.values(), key=lambda each: -each.id):
            if each.known is not known:
                continue
            place, total = place + 1, total + len(each.body)
            if place > bounds.rows or total > bounds.bytes or each.received_at < oldest:
                del self._tables.strangers[each.id]


class InboxRow(Struct, frozen=True):
    """A delivery in the inbox, and where it stands."""

    id: int
    delivery: NewDelivery
    due_at: int
    state: DeliveryState = DeliveryState.PENDING
    result: str | None = None
    attempts: int = 0
    last_error: str | None = None
    token: str | None = None


class Tables(Struct):
    """All that the store holds; `copy` is a snapshot to roll back to."""

    inbox: dict[int, InboxRow] = {}
    ids: dict[bytes, int] = {}
    records: dict[Key, Record] = {}
    since: dict[Key, int] = {}
    progress: dict[str, Progress] = {}
    endings: dict[Key, Ending] = {}
    jobs: JobTables = field(default_factory=JobTables)
    keys: KeyTables = field(default_factory=KeyTables)

    def copy(self) -> Tables:
        """Copy the tables; rows are frozen."""
        return Tables(
            dict(self.inbox),
            dict(self.ids),
            dict(self.records),
            dict(self.since),
            dict(self.progress),
            dict(self.endings),
            self.jobs.copy(),
            self.keys.copy(),
        )


class MemoryJobs:
    """The Jobs of a MemoryStore; `delivery` gives a delivery of the inbox."""

    def __init__(
        self, tables: JobTables, clock: Clock, delivery: Callable[[int], NewDelivery]
    ) -> None:
        self._tables = tables
        self._clock = clock
        self._delivery = delivery

    def handlers(self) -> list[RegisteredHandler]:
        """All that are registered, whichever process has their code."""
        return [each for _, each in sorted(self._tables.handlers.items())]

    def register(self, new: Sequence[RegisteredHandler]) -> None:
        """Make them known, or known as they are now."""
        self._tables.handlers |= {each.name: each for each in new}

    def forget(self, name: str) -> int:
        """Take a handler out with what waits for it; return how many jobs that were."""
        self._tables.handlers.pop(name, None)
        waiting = [
            each
            for each in self._tables.jobs.values()
            if each.job.handler == name and each.state is JobState.WAITING
        ]
        for each in waiting:
            self._put(replace(each, state=JobState.DISCARDED, finished_at=self._clock.now()))
        for line in [line for line in self._tables.lines if line[0] == name]:
            del self._tables.lines[line]
        return len(waiting)

    def add(self, new: Sequence[NewJob]) -> None:
        """Make jobs, each once for its handler and key, and see that their lines are due."""
        tables = self._tables
        for job in new:
            if (job.handler, job.key) not in tables.ids:
                number = len(tables.jobs) + 1
                tables.ids[job.handler, job.key] = number
                at = self._clock.now() if job.occurred_at is None else job.occurred_at
                self._put(KeptJob(number, job, at))
            self._touch((job.handler, job.line))

    def claim(
        self,
        token: str,
        room: Mapping[str, int],
        lease_s: float,
        *,
        lost: bool = True,
        skip_locked: bool = False,
    ) -> list[Job]:
        """Take the first job of each due line, of so many of each handler; nobody else gets a
        line during the lease.

        Of lines whose lease ran out it takes one, or none unless `lost`.
        To `skip_locked` is to take no job whose row another transaction holds.
        """
        now = self._clock.now()
        lines = sorted(self._tables.lines.items(), key=lambda each: each[1].due_at)
        due = []
        for name, most in room.items():
            its = [each for each in lines if each[0][0] == name and each[1].due_at <= now]
            due += [each for each in its if lost or each[1].token is None][:most]
        first_lost = [each for each in due if each[1].token is not None][:1]
        claimed = []
        for line, kept in [each for each in due if each[1].token is None] + first_lost:
            first = self._first(line)
            if first is None:
                del self._tables.lines[line]
                continue
            lease = now + int(lease_s * 1000)
            self._tables.lines[line] = replace(kept, token=token, due_at=lease)
            self._put(replace(first, attempts=first.attempts + 1))
            claimed.append(self._held(first, kept.id))
        return claimed

    def lock(self, line_ids: Sequence[int]) -> None:
        """Nobody else is here."""

    def held_elsewhere(
        self, line_ids: Sequence[int], job_ids: Sequence[int]
    ) -> tuple[set[int], set[int]]:
        """Hold lines and jobs without waiting; return those that another transaction holds."""
        return set(), set()

    def renew(self, token: str, line_ids: Sequence[int], lease_s: float) -> None:
        """Hold lines longer."""
        for line, kept in self._tables.lines.items():
            if kept.id in line_ids and kept.token == token:
                lease = self._clock.now() + int(lease_s * 1000)
                self._tables.lines[line] = replace(kept, due_at=lease)

    def finish(self, token: str, outcomes: Sequence[JobOutcome]) -> list[int]:
        """Write outcomes, and let the lines go on; return the ids of jobs no longer held by
        `token`, or discarded meanwhile, of which nothing was written."""
        lost = []
        for each in outcomes:
            job = self._tables.jobs[each.id]
            line = (job.job.handler, job.job.line)
            kept = self._tables.lines.get(line)
            if kept is None or kept.id != each.line_id or kept.token != token:
                lost.append(each.id)
                continue
            due = self._clock.now()
            if job.state is JobState.WAITING and job.is_begun:
                self._put(ended(job, each, due))
                due += int(each.after_s * 1000)
            else:
                lost.append(each.id)
            self._tables.lines[line] = replace(kept, token=None, due_at=due)
            if self._first(line) is None:
                del self._tables.lines[line]
        return lost

    def counts(self) -> list[JobCount]:
        """Count jobs by handler and state; the oldest of each, too."""
        groups: dict[tuple[str, str], list[int]] = {}
        for each in self._tables.jobs.values():
            groups.setdefault((each.job.handler, each.state.value), []).append(each.occurred_at)
        now = self._clock.now()
        return [
            JobCount(
                handler=handler,
                state=state,
                count=len(moments),
                oldest_s=max(0, now - min(moments)) / 1000,
            )
            for (handler, state), moments in sorted(groups.items())
        ]

    def find(self, wanted: JobFilter) -> list[JobRow]:
        """List jobs, the newest first."""
        names = ("id", "handler", "state", "subject", "event", "delivery_id")
        ids = wanted.ids
        asked = {name: getattr(wanted, name) for name in names}
        found = [
            row
            for row in self._rows(sorted(self._tables.jobs.values(), key=lambda job: -job.id))
            if wanted.after is None or row.id < wanted.after
            if ids is None or row.id in ids
            if all(value is None or getattr(row, name) == value for name, value in asked.items())
        ]
        return found[: wanted.limit]

    def move(self, ids: Sequence[int], move: JobMove) -> list[int]:
        """Repeat or discard jobs by hand, where that can be; return the ids of those."""
        known = [self._tables.jobs[each] for each in set(ids) if each in self._tables.jobs]
        movable = [each for each in known if (each.state, move) in JOB_MOVES]
        for each in movable:
            if JobState.WAITING in (each.state, JOB_MOVES[each.state, move]):
                self._wake((each.job.handler, each.job.line))
        if move is JobMove.REPEAT:
            movable = [each for each in movable if not self._is_run(each)]
        for each in movable:
            self._put(moved(each, move, self._clock.now()))
        return sorted(each.id for each in movable)

    def mend(self) -> int:
        """Make the lines that are missing where jobs wait; return how many."""
        before = len(self._tables.lines)
        for each in self._tables.jobs.values():
            if each.state is JobState.WAITING:
                self._touch((each.job.handler, each.job.line))
        return len(self._tables.lines) - before

    def _put(self, job: KeptJob) -> None:
        self._tables.jobs[job.id] = job

    def _touch(self, line: Line) -> None:
        if line not in self._tables.lines:
            self._tables.lines_made += 1
            self._tables.lines[line] = KeptLine(self._tables.lines_made, self._clock.now())

    def _wake(self, line: Line) -> None:
        """Let it be due, unless somebody holds it."""
        self._touch(line)
        if self._tables.lines[line].token is None:
            self._tables.lines[line] = replace(self._tables.lines[line], due_at=self._clock.now())

    def _is_run(self, job: KeptJob) -> bool:
        line = self._tables.lines.get((job.job.handler, job.job.line))
        is_held = line and line.token is not None and line.due_at > self._clock.now()
        return job.state is JobState.WAITING and job.is_begun and bool(is_held)

    def _first(self, line: Line) -> KeptJob | None:
        waiting = [each for each in self._of(line) if each.state is JobState.WAITING]
        return min(waiting, key=lambda each: (each.occurred_at, each.id), default=None)

    def _of(self, line: Line) -> Iterable[KeptJob]:
        jobs = self._tables.jobs.values()
        return (each for each in jobs if (each.job.handler, each.job.line) == line)

    def _held(self, kept: KeptJob, line_id: int) -> Job:
        job = kept.job
        delivery = None if job.delivery_id is None else self._delivery(job.delivery_id)
        newest = max(
            (
                each.occurred_at
                for each in self._of((job.handler, job.line))
                if each.state is JobState.DONE
            ),
            default=kept.occurred_at,
        )
        return Job(
            id=kept.id,
            line_id=line_id,
            handler=job.handler,
            key=job.key,
            event=job.event,
            subject=job.subject,
            occurred_at=kept.occurred_at,
            attempts=kept.attempts,
            failures=kept.failures,
            runs=kept.runs,
            late=newest > kept.occurred_at,
            delivery_id=job.delivery_id,
            received_at=None if delivery is None else delivery.received_at,
            origin=None if delivery is None else delivery.origin,
            payload=job.payload or (delivery.body if delivery else b""),
        )

    def _rows(self, jobs: Iterable[KeptJob]) -> Iterable[JobRow]:
        for each in jobs:
            own = asdict(each)
            job = own.pop("job")
            names = {name: getattr(job, name) for name in ("handler", "event", "subject")}
            yield JobRow(**own | names | {"delivery_id": job.delivery_id})


if TYPE_CHECKING:
    pass


class MemoryInbox:
    """An Inbox over Tables."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def search(self, sought: DeliveryFilter) -> list[StoredDelivery]:
        """List deliveries."""
        every = sorted(self._tables.inbox.values(), key=lambda row: row.id)
        if not sought.oldest_first:
            every.reverse()
        return [_kept(row) for row in every if _is_sought(row, sought)][: sought.limit]

    def get(self, delivery_id: int) -> StoredDelivery | None:
        """Return one delivery; None if there is no such id."""
        row = self._tables.inbox.get(delivery_id)
        return None if row is None else _kept(row)

    def again(self, ids: Sequence[int]) -> int:
        """Make deliveries pending again, but those that are; return how many."""
        over = [
            row
            for row in map(self._tables.inbox.get, ids)
            if row is not None and row.state is not DeliveryState.PENDING
        ]
        for row in over:
            fresh = replace(row, state=DeliveryState.PENDING, due_at=0, attempts=0, token=None)
            self._tables.inbox[row.id] = fresh
        return len(over)

    def about(
        self, key: Key, others: Sequence[Key], after: int, limit: int
    ) -> list[StoredDelivery]:
        """List what may tell of a user or an organization, or of its memberships, by id; of the
        `others`, at the other ends of these, only their deletions."""
        deleted = {f"{each.kind}:{each.id}" for each in others}
        rows = sorted(self._tables.inbox.values(), key=lambda row: row.id)
        found = [row for row in rows if _concerns(row, key) or _deletes(row, deleted)]
        return [_kept(row) for row in found if row.id > after][:limit]

    def known(self, key: Key) -> dict[Key, Record]:
        """Return a record, if there is one, and those of all its memberships."""
        return {
            each: record
            for each, record in sorted(self._tables.records.items())
            if each == key or (each.kind == "membership" and key in each.organization_and_user)
        }


def _concerns(row: InboxRow, key: Key) -> bool:
    if row.delivery.subject == f"{key.kind}:{key.id}":
        return True
    of_members = key.kind == "user" and row.delivery.event in MEMBERSHIP_EVENTS
    return of_members and key.id.encode() in row.delivery.body


def _deletes(row: InboxRow, subjects: Collection[str]) -> bool:
    return row.delivery.event in DELETIONS and row.delivery.subject in subjects


def _is_sought(row: InboxRow, sought: DeliveryFilter) -> bool:
    delivery, number = row.delivery, row.id
    further = sought.after is None or (
        number > sought.after if sought.oldest_first else number < sought.after
    )
    return (
        further
        and sought.event in (None, delivery.event)
        and sought.state in (None, row.state)
        and sought.subject in (None, delivery.subject)
        and (sought.since is None or delivery.received_at >= sought.since)
        and (sought.until is None or delivery.received_at < sought.until)
        and (sought.text or "").encode() in delivery.body
    )


def _kept(row: InboxRow) -> StoredDelivery:
    return StoredDelivery(
        id=row.id,
        event=row.delivery.event,
        subject=row.delivery.subject,
        occurred_at=row.delivery.occurred_at,
        received_at=row.delivery.received_at,
        origin=row.delivery.origin,
        state=row.state,
        result=row.result,
        attempts=row.attempts,
        error=row.last_error,
        body=row.delivery.body,
    )


# What a query names exactly, and of what it may be a part.
_NAMES: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "user": (
        ("logto_user_id", "id", "email", "phone", "username"),
        ("email", "username", "name", "phone"),
    ),
    "organization": (("logto_organization_id", "id", "name"), ("name",)),
}


class MemoryStore:
    """A Store over Tables."""

    def __init__(self, tables: Tables, clock: Clock) -> None:
        self.tables = tables
        self._clock = clock

    @property
    def inbox(self) -> MemoryInbox:
        """The inbox to look at."""
        return MemoryInbox(self.tables)

    def add(self, new: Sequence[NewDelivery], tried: Collection[bytes] = ()) -> list[StoreResult]:
        """Put deliveries into the inbox; one answer each, in order."""
        return [self._add(delivery) for delivery in new]

    def limit_waits(self, lock_s: float, statement_s: float) -> None:
        """Nobody waits for anybody here."""

    def claim(
        self, token: str, limit: int, max_bytes: int, lease_s: float
    ) -> list[ClaimedDelivery]:
        """Take due deliveries, the longest due first; nobody else gets them during the lease."""
        now = self._clock.now()
        due = [
            row
            for row in self.tables.inbox.values()
            if row.state is DeliveryState.PENDING and row.due_at <= now
        ]
        claimed: list[ClaimedDelivery] = []
        total = 0
        for row in sorted(due, key=lambda row: (row.due_at, row.id))[:limit]:
            total += len(row.delivery.body)
            if claimed and total > max_bytes:
                break
            until, attempts = now + int(lease_s * 1000), row.attempts + 1
            held = replace(row, token=token, due_at=until, attempts=attempts)
            self.tables.inbox[row.id] = held
            claimed.append(_claimed(held))
        return sorted(claimed, key=lambda each: each.id)

    def renew(self, token: str, ids: Sequence[int], lease_s: float) -> None:
        """Hold claimed deliveries longer. Raises ClaimLost when any is no longer held."""
        lost = [number for number in ids if self.tables.inbox[number].token != token]
        if lost:
            raise ClaimLost(count=len(lost))
        until = self._clock.now() + int(lease_s * 1000)
        for number in ids:
            self.tables.inbox[number] = replace(self.tables.inbox[number], due_at=until)

    def finish(self, token: str, outcomes: Sequence[DeliveryOutcome]) -> None:
        """Write outcomes. Raises ClaimLost when any of them is no longer held by `token`."""
        rows = [self.tables.inbox[outcome.id] for outcome in outcomes]
        lost = [row for row in rows if row.token != token or row.state is not DeliveryState.PENDING]
        if lost:
            raise ClaimLost(count=len(lost))
        for row, outcome in zip(rows, outcomes, strict=True):
            self.tables.inbox[row.id] = replace(
                row,
                token=None,
                state=outcome.state,
                result=outcome.result,
                last_error=outcome.error,
                due_at=self._clock.now() + int(outcome.retry_after_s * 1000),
            )

    def lock(
        self, keys: Sequence[Key], *, share: bool = False, ends: Sequence[Key] = ()
    ) -> dict[Key, Record]:
        """Return records; of unknown ones there are empty stubs."""
        return {key: self.tables.records.get(key) or Record(key) for key in keys}

    @property
    def jobs(self) -> MemoryJobs:
        """The handlers and their jobs."""
        inbox = self.tables.inbox
        return MemoryJobs(self.tables.jobs, self._clock, lambda number: inbox[number].delivery)

    @property
    def keys_of_hooks(self) -> MemoryKeys:
        """Keys of hooks, and what no key signed."""
        return MemoryKeys(self.tables.keys, self._clock)

    def save(self, changed: Sequence[Record]) -> list[Record]:
        """Write records; rows are made when they are asked for."""
        for record in changed:
            kept = record if record.kept else replace(record, local_id=str(uuid.uuid4()))
            self.tables.records[record.key] = kept
            if record.waiting_for is None:
                self.tables.since.pop(record.key, None)
            else:
                self.tables.since.setdefault(record.key, self._clock.now())
        return [self.tables.records[record.key] for record in changed]

    def with_few_memberships(self, ends: Sequence[Key], most: int) -> list[Key]:
        """List those users and organizations that have no more than `most` memberships in all,
        ended ones included."""
        few = []
        for end in ends:
            count = len(self._memberships_of(end))
            if count <= most:
                most -= count
                few.append(end)
        return few

    def note_ending(self, ending: Ending) -> None:
        """Keep that memberships are to be ended step by step."""
        known = self.tables.endings.get(ending.key)
        if known is not None:
            ending = replace(
                ending,
                ended_at=max(known.ended_at, ending.ended_at),
                source=ending.source or known.source,
                delivery_id=ending.delivery_id or known.delivery_id,
            )
        self.tables.endings[ending.key] = ending

    def endings(self) -> list[Ending]:
        """List whose memberships are to be ended, the oldest first."""
        return list(self.tables.endings.values())

    def memberships_to_end(self, ending: Ending, limit: int) -> list[Key]:
        """List memberships that are still to be ended."""
        left = [
            key
            for key in self._memberships_of(ending.key)
            if self.tables.records[key].gone_at < ending.ended_at
        ]
        return sorted(left)[:limit]

    def finish_ending(self, ending: Ending) -> None:
        """Note that all memberships have ended."""
        if self.tables.endings.get(ending.key) == ending:
            del self.tables.endings[ending.key]

    def drop_memberships(self, ends: Sequence[Record]) -> list[Key]:
        """End the memberships that are no newer than the end of their user or organization; return
        those that were present."""
        return [
            key
            for end in ends
            for key in self.end_memberships(end, self._memberships_of(end.key))[0]
        ]

    def newest_membership(self, end: Key) -> int:
        """Return the greatest stamp at which a membership of a user or an organization was told
        of; NEVER if there is none."""
        return self._newest(self._memberships_of(end))

    def end_memberships(self, end: Record, pairs: Sequence[Key]) -> tuple[list[Key], int]:
        """Do both of the above for some memberships of a user or an organization."""
        present = []
        for key in pairs:
            known = self.tables.records[key]
            over = merge(known, Tombstone(key, end.ended_at))
            if project(known) and not project(over):
                present.append(key)
            self.save([over])
        return present, self._newest(pairs)

    def _newest(self, pairs: Sequence[Key]) -> int:
        return max((self.tables.records[key].told_stamp for key in pairs), default=NEVER)

    def recent(self, limit: int) -> list[ReceivedBody]:
        """Return the newest deliveries, the newest first."""
        newest = sorted(self.tables.inbox, reverse=True)[:limit]
        found = [self.tables.inbox[number].delivery for number in newest]
        return [ReceivedBody(each.body, each.occurred_at, each.received_at) for each in found]

    def clocks(self, limit: int) -> Clocks:
        """Return the database's clock, and how the newest deliveries are dated."""
        newest = sorted(self.tables.inbox, reverse=True)[:limit]
        found = [self.tables.inbox[number].delivery for number in newest]
        dated = [
            Dated(sent_at_of(each.digest), each.occurred_at, each.received_at, each.origin)
            for each in found
        ]
        return Clocks(self._clock.now(), dated)

    def progress(self, name: str, reached: Progress | None = None) -> Progress | None:
        """Return how far the work of that name has come; keep `reached` before, if given."""
        if reached:
            self.tables.progress[name] = reached
        return self.tables.progress.get(name)

    def status(self) -> Status:
        """Count."""
        counts = dict.fromkeys((state.value for state in DeliveryState), 0)
        rows = self.tables.inbox.values()
        for row in rows:
            counts[row.state.value] += 1
        received = [row.delivery.received_at for row in rows if row.state is DeliveryState.PENDING]
        names = (RECOVER, RECONCILE, SILENT)
        recovered, reconciled, silent = map(self.tables.progress.get, names)
        oldest = max(0, self._clock.now() - min(received)) / 1000 if received else None
        return Status(
            deliveries=counts,
            doubtful=sum(bool(record.doubts) for record in self.tables.records.values()),
            refetch=len(self.tables.since),
            oldest_pending_s=oldest,
            recovered=recovered.count if recovered else 0,
            complete_up_to=recovered.at if recovered else None,
            reconciled_at=reconciled.at if reconciled else None,
            silent_since=silent.at if silent and silent.count else None,
            memberships_to_end=sum(
                project(self.tables.records[key]) is not None
                for end in self.tables.endings
                for key in self._memberships_of(end)
            ),
        )

    def clock(self) -> DatabaseClock:
        """Look at the clock; it is the test's."""
        at = self._clock.now()
        return DatabaseClock(now=at, noted=at, installed=0, moved=0, due_too_late=False)

    def set_clock_back(self, by_ms: int, moved: int) -> None:
        """Nothing here outlives a test."""

    def waiting(self, limit: int) -> list[RefetchNeed]:
        """List the records about which Logto must be asked, the longest waiting first."""
        keys = sorted(self.tables.since, key=lambda key: (self.tables.since[key], key))
        known = [self.tables.records[key] for key in keys[:limit]]
        return [
            RefetchNeed(key=each.key, reason=each.waiting_for or "", doubtful=bool(each.doubts))
            for each in known
        ]

    def find(self, kind: Kind, query: str, limit: int) -> list[FoundRow]:
        """Find users or organizations by Logto id, local id or what else names them (an email, a
        phone, a name); else by a part of that."""
        return self._find(kind, query, limit, *_NAMES[kind])

    def keys(
        self,
        kind: Kind,
        limit: int,
        *,
        after: str = "",
        of: Key | None = None,
        unread_since: int | None = None,
        with_roles: bool = False,
    ) -> list[Key]:
        """List known records that aren't deleted, by id, from `after` on."""
        found = [
            key
            for key, record in sorted(self.tables.records.items())
            if key.kind == kind and key.id > after
            if kind == "membership" or record.deleted_at is None or record.doubts
            if of is None or of in key.organization_and_user
            if not with_roles or child_rows(record).get("roles")
            if unread_since is None or _read_at(record, with_roles) < unread_since
        ]
        return found[:limit]

    def _memberships_of(self, end: Key) -> list[Key]:
        known = [key for key in self.tables.records if key.kind == "membership"]
        return [key for key in known if end in key.organization_and_user]

    def _add(self, delivery: NewDelivery) -> StoreResult:
        known = self.tables.ids.get(delivery.digest)
        if known is not None:
            return StoreResult(known, True)
        new = len(self.tables.inbox) + 1
        self.tables.ids[delivery.digest] = new
        self.tables.inbox[new] = InboxRow(new, delivery, self._clock.now())
        return StoreResult(new, False)

    def _find(
        self, kind: str, query: str, limit: int, exact: tuple[str, ...], parts: tuple[str, ...]
    ) -> list[FoundRow]:
        rows = {
            record.key: row | {"id": record.local_id}
            for record in self.tables.records.values()
            if record.key.kind == kind and (row := project(record))
        }
        text = query.lower()

        def lower(key: Key, columns: tuple[str, ...]) -> list[str]:
            return [(rows[key][column] or "").lower() for column in columns]

        same = [key for key in rows if text and text in lower(key, exact)]
        alike = [key for key in rows if any(text in value for value in lower(key, parts))]
        found = sorted(same or alike, key=lambda key: rows[key]["deleted_at"] is not None)
        return [self._found(key, rows[key]) for key in found[:limit]]

    def _found(self, key: Key, row: dict[str, Any]) -> FoundRow:
        memberships = {
            other.id: self.tables.records[each]
            for each in self._memberships_of(key)
            for other in each.organization_and_user
            if other != key
        }
        return FoundRow(
            row=row,
            waiting_for=self.tables.records[key].waiting_for,
            memberships=sorted(name for name, each in memberships.items() if project(each)),
            memberships_in_doubt=sorted(name for name, each in memberships.items() if each.doubts),
            roles=_roles(self.tables.records[key]),
        )


def _roles(record: Record) -> list[str]:
    return sorted(row["name"] for row in child_rows(record).get("roles", ()))


def _read_at(record: Record, with_roles: bool) -> int:
    if with_roles:
        return min(int(row["read_at"]) for row in child_rows(record)["roles"])
    return NEVER if record.read_at is None else record.read_at


def _claimed(row: InboxRow) -> ClaimedDelivery:
    return ClaimedDelivery(
        id=row.id,
        body=row.delivery.body,
        event=row.delivery.event,
        subject=row.delivery.subject,
        received_at=row.delivery.received_at,
        digest=row.delivery.digest,
        occurred_at=row.delivery.occurred_at,
        origin=row.delivery.origin,
        attempt=row.attempts,
    )


T = TypeVar("T")


class MemoryHost:
    """Runs work at once, on the caller's thread."""

    def __init__(self, open_store: Callable[[], tuple[Store, Callable[[], None]]]) -> None:
        """`open_store` gives a store, and what undoes all that is done on it from now on."""
        self._open = open_store

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run; undo what was done if it raises."""
        store, undo = self._open()
        try:
            return work(store)
        except BaseException:
            undo()
            raise

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run."""
        return await self.run(work)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run."""
        store, _ = self._open()
        return work(store)

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """No kind of transaction: handlers that ask for one are refused."""
        return ()

    async def handle(
        self, wish: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with nothing to give, for none can be asked for."""
        raise LookupError(f"there is no {wish.__name__} in memory")

    async def close(self) -> None:
        """Nothing is held."""
