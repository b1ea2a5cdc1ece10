"""Handlers and jobs in memory: the same answers as the SQL store's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec.structs import asdict, replace

from logto_webhooks.adapters.stores.memory_job_tables import (
    JobTables,
    KeptJob,
    KeptLine,
    Line,
    ended,
    moved,
)
from logto_webhooks.core.delivery import Delivery
from logto_webhooks.core.jobs import (
    Job,
    JobCount,
    JobFilter,
    JobOutcome,
    JobRow,
    NewJob,
    Registered,
)
from logto_webhooks.core.lifecycle import JOB_MOVES, JobMove, JobState
from logto_webhooks.core.ports import Clock


class MemoryJobs:
    """The Jobs of a MemoryStore; `delivery` gives a delivery of the inbox."""

    def __init__(
        self, tables: JobTables, clock: Clock, delivery: Callable[[int], Delivery]
    ) -> None:
        self._tables = tables
        self._clock = clock
        self._delivery = delivery

    def handlers(self) -> list[Registered]:
        """All that are registered, whichever process has their code."""
        return [each for _, each in sorted(self._tables.handlers.items())]

    def register(self, new: Sequence[Registered]) -> None:
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
