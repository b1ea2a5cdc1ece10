"""Jobs: one call of one handler, and what a handler may be told of its delivery."""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Final, Literal

from msgspec import Struct

from logto_webhooks.events import DERIVED
from logto_webhooks.events.local import LOCAL

Tests = Literal["no", "too", "only"]


class JobState(StrEnum):
    """The state of a job."""

    WAITING = "waiting"  # in its queue, to be run now or when the queue is due
    DONE = "done"
    DEAD = "dead"  # given up, with the traceback
    DISCARDED = "discarded"  # by its handler, by age, or by hand


class JobMove(StrEnum):
    """What can happen to a job."""

    FINISH = "finish"
    RETRY = "retry"
    GIVE_UP = "give up"
    DISCARD = "discard"
    REPEAT = "repeat"  # by hand; what waits for its next attempt has it now


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


# Made by this package: must be named, or meant by a pattern for such events alone.
_NEVER_BY_A_STAR: Final = DERIVED | LOCAL.keys()


def matches(pattern: str, event_name: str) -> bool:
    """Whether a pattern means an event; those that this package makes must be named."""
    if event_name in _NEVER_BY_A_STAR and not pattern.startswith(("Organization.User.", "Local")):
        return False
    return fnmatchcase(event_name, pattern)


class RegisteredHandler(Struct, frozen=True, kw_only=True):
    """A handler as it is known to all processes, whichever has its code.

    `patterns` are names of events, or patterns such as `Organization.*`; `ordered` ones keep the
    order of each subject; `tests` says whether what Logto's console sends as a test is for it, and
    `rerun=False` ones are left out when a delivery is replayed.
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
    """A new job; `key` is unique for its handler.

    `queue_key` names the queue in which it keeps its order; `occurred_at` (ms) is its place in it,
    None for now. `payload` is a record's own event; a delivery's is its body.
    """

    handler: str
    key: str
    event: str
    subject: str
    queue_key: str
    occurred_at: int | None = None
    delivery_id: int | None = None
    payload: bytes | None = None


class Job(Struct, frozen=True, kw_only=True):
    """A job that a worker holds; times in milliseconds."""

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
        """How often whoever held it said nothing more: its process ended, or is stuck."""
        return self.attempts - self.failures


class JobOutcome(Struct, frozen=True, kw_only=True):
    """The outcome of a claimed job; `after_s` only when it is to be tried again, `counts=False`
    if it was given back, as if never begun."""

    id: int
    queue_key_id: int
    state: JobState
    error: str | None = None
    failed: bool = False
    counts: bool = True
    after_s: float = 0


class JobCount(Struct, frozen=True, kw_only=True):
    """How many jobs of a handler are in a state; `oldest_s` is how long the first has waited."""

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
    """A job with its state. `error` is its last traceback. Times are in milliseconds."""

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
