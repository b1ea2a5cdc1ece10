"""Jobs made, claimed and finished by hand, in any store."""

from __future__ import annotations

from logto_webhooks.jobs import Job, JobOutcome, JobState, NewJob, RegisteredHandler
from tests.integration.conftest import Run

ONE = RegisteredHandler(name="one", patterns=("User.*",))
TWO = RegisteredHandler(name="two", patterns=("*",), ordered=False)


def job(key: str, queue_key: str = "user:ana", at: int | None = 1, handler: str = "one") -> NewJob:
    return NewJob(
        handler=handler,
        key=key,
        event="LocalUserUpdated",
        subject="user:ana",
        queue_key=queue_key,
        occurred_at=at,
        payload=b"{}",
    )


def add(run: Run, *jobs: NewJob) -> None:
    run(lambda store: store.jobs.add(jobs))


def claim(run: Run, token: str = "t", names: tuple[str, ...] = ("one", "two")) -> list[Job]:
    return run(lambda store: store.jobs.claim(token, dict.fromkeys(names, 10), 60))


def finish(run: Run, held: Job, state: JobState, token: str = "t", after_s: float = 0) -> list[int]:
    failed = state in (JobState.WAITING, JobState.DEAD)
    outcome = JobOutcome(
        id=held.id, queue_key_id=held.queue_key_id, state=state, failed=failed, after_s=after_s
    )
    return run(lambda store: store.jobs.finish(token, [outcome]))
