"""Jobs, which are calls of handlers, and the delivery that a handler gets."""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.events import DERIVED
from logto_webhooks.events.local import LOCAL

Tests = Literal["no", "too", "only"]


class JobState(StrEnum):
    """The state of a job."""

    WAITING = "waiting"  # in its queue, to run now or when the queue is due
    DONE = "done"
    DEAD = "dead"  # failed and not retried
    DISCARDED = "discarded"  # by its handler, because of its age, or by a command


class JobMove(StrEnum):
    """What can happen to a job."""

    FINISH = "finish"
    RETRY = "retry"
    GIVE_UP = "give up"
    DISCARD = "discard"
    REPEAT = "repeat"  # by a command; a job that waits for its next attempt runs now


JOB_MOVES: Final[dict[tuple[JobState, JobMove], JobState]] = {
    (JobState.WAITING, JobMove.FINISH): JobState.DONE,
    (JobState.WAITING, JobMove.RETRY): JobState.WAITING,
    (JobState.WAITING, JobMove.GIVE_UP): JobState.DEAD,
    (JobState.WAITING, JobMove.DISCARD): JobState.DISCARDED,
    (JobState.WAITING, JobMove.REPEAT): JobState.WAITING,
    (JobState.DEAD, JobMove.DISCARD): JobState.DISCARDED,
    (JobState.DONE, JobMove.REPEAT): JobState.WAITING,
    (JobState.DEAD, JobMove.REPEAT): JobState.WAITING,
    (JobState.DISCARDED, JobMove.REPEAT): JobState.WAITING,
}


def job_targets(move: JobMove) -> dict[JobState, JobState]:
    """Return the states that allow a move, and the state after it; `waiting` first."""
    return {state: JOB_MOVES[state, move] for state in JobState if (state, move) in JOB_MOVES}


# This package makes these events, so `*` doesn't match them, but `Organization.User.*` does.
_NEED_OWN_PATTERN: Final = DERIVED | LOCAL.keys()


def matches(pattern: str, event_name: str) -> bool:
    """Whether a pattern matches an event. Derived and local events need their own pattern."""
    if event_name in _NEED_OWN_PATTERN and not pattern.startswith(("Organization.User.", "Local")):
        return False
    return fnmatchcase(event_name, pattern)


class RegisteredHandler(Struct, frozen=True, kw_only=True):
    """A handler as all processes know it, even those without its code.

    `patterns` are event names, or patterns such as `Organization.*`. An `ordered` handler gets the
    events of each subject in order. `tests` is whether it gets test payloads from Logto's console.
    With `rerun=False`, replaying a delivery doesn't run it again.
    """

    name: str
    patterns: tuple[str, ...]
    ordered: bool = True
    tests: Tests = "no"
    rerun: bool = True

    def wants(self, event_name: str) -> bool:
        """Whether the handler is for an event."""
        return any(matches(pattern, event_name) for pattern in self.patterns)


class NewJob(Struct, frozen=True, kw_only=True):
    """A new job. `key` is unique for its handler. If the handler has had a job with it, the key is
    `key_again` instead, if there is one.

    Jobs with the same `queue_key` run in the order of `occurred_at` (ms). None means now: such a
    job runs after all that are in the queue, or before them if it `is_first`. `payload` is a local
    event; a job of a delivery has none, because it uses the delivery's body.
    """

    handler: str
    key: str
    event: str
    subject: str
    queue_key: str
    occurred_at: int | None = None
    is_first: bool = False
    delivery_id: int | None = None
    payload: bytes | None = None
    key_again: str | None = None

    def with_key(self, key: str) -> NewJob:
        """Return the job with another key. A job that has its own queue gets another one."""
        queue_key = key if self.queue_key == self.key else self.queue_key
        return replace(self, key=key, queue_key=queue_key)


class JobOfDelivery(Struct, frozen=True, kw_only=True):
    """A job of a delivery, without what it does."""

    id: int
    delivery_id: int
    handler: str
    key: str
    event: str
    state: JobState


class KnownJob(Struct, frozen=True):
    """What is known of a job by its handler and key. `delivery_id` is None for a local event that
    no delivery caused."""

    delivery_id: int | None
    occurred_at: int


class ToldEvent(Struct, frozen=True, kw_only=True):
    """A local event of a delivery, as a handler's job has kept it. `key` is the key of that job."""

    key: str
    event: str
    payload: bytes
    occurred_at: int
    delivery_id: int


class Job(Struct, frozen=True, kw_only=True):
    """A job that a worker has claimed. Times are in milliseconds."""

    id: int
    queue_key_id: int
    handler: str
    key: str
    event: str
    subject: str
    occurred_at: int
    attempts: int
    failures: int
    runs: int
    late: bool
    delivery_id: int | None
    received_at: int | None
    origin: str | None
    payload: bytes

    @property
    def losses(self) -> int:
        """How many attempts had no outcome, because the process ended or hangs."""
        return self.attempts - self.failures


class JobOutcome(Struct, frozen=True, kw_only=True):
    """The outcome of a claimed job. `after_s` is set only for a retry. `counts=False` means that
    it was given back as if it hadn't been claimed."""

    id: int
    queue_key_id: int
    state: JobState
    error: str | None = None
    failed: bool = False
    counts: bool = True
    after_s: float = 0


class JobCount(Struct, frozen=True, kw_only=True):
    """How many jobs of a handler are in a state. `oldest_s` is the age of the oldest; of one that
    was repeated, since then."""

    handler: str
    state: str
    count: int
    oldest_s: float


class JobFilter(Struct, frozen=True, kw_only=True):
    """Which jobs to list. None matches any. The list continues below the id `after`."""

    id: int | None = None
    ids: tuple[int, ...] | None = None
    handler: str | None = None
    state: str | None = None
    subject: str | None = None
    event: str | None = None
    delivery_id: int | None = None
    after: int | None = None
    limit: int = 50


class JobRow(Struct, frozen=True, kw_only=True):
    """A job with its state. `error` is its last traceback. Times are in milliseconds.

    `due_at` is when the next attempt of a waiting job is due. It is None unless the job is the
    first of its queue.
    """

    id: int
    handler: str
    event: str
    subject: str
    state: str
    occurred_at: int
    attempts: int
    failures: int
    runs: int
    delivery_id: int | None
    finished_at: int | None
    due_at: int | None = None
    error: str | None


class Delivery(Struct, frozen=True, kw_only=True):
    """The delivery that a handler handles.

    `id` is the id in the inbox, or None for a local event without a delivery. `late` means that a
    newer event with the same subject was handled before. `replayed` means that the job was repeated
    on request. `idempotency_key` is the same in all attempts and replays: pass it to external
    services, so that they act only once. Times are in milliseconds since the epoch.
    """

    id: int | None
    event: str
    subject: str
    occurred_at: int
    received_at: int | None
    origin: str
    attempt: int
    late: bool
    replayed: bool
    idempotency_key: str
