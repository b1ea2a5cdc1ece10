"""What is held of jobs in memory: rows, frozen, and what follows for one."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.core.jobs import JobOutcome, NewJob, Registered
from logto_webhooks.core.lifecycle import JobMove, JobState

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

    handlers: dict[str, Registered] = {}
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
