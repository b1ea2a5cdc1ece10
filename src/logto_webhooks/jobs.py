"""Jobs: one call of one handler, and what a handler may be told of its delivery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from msgspec import Struct

from logto_webhooks.states import JobMove, JobState

Tests = Literal["no", "too", "only"]


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


class NewJob(Struct, frozen=True, kw_only=True):
    """A job to be made; `key` is unique for its handler.

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
    """What became of a held job; `after_s` only when it is to be tried again, `counts=False` when
    it was given back, as if never begun."""

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
    """What a handler can ask about the delivery that it handles.

    `id` is the id in the inbox, or None for a local event without a delivery. `late`: something
    newer of this subject was handled before. `replayed`: the job was repeated on request.
    `idempotency_key` is the same in all attempts and replays: pass it to services that must act
    only once. Times are in milliseconds since the epoch.
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


class Jobs(Protocol):
    """Handlers and their jobs, within one transaction."""

    def handlers(self) -> list[RegisteredHandler]:
        """All that are registered, whichever process has their code."""

    def register(self, handlers: Sequence[RegisteredHandler]) -> None:
        """Make them known, or known as they are now."""

    def forget(self, name: str) -> int:
        """Take a handler out with what waits for it; return how many jobs that were."""

    def add(self, new: Sequence[NewJob]) -> None:
        """Make jobs, each once for its handler and key, and see that their queues are due."""

    def claim(
        self,
        token: str,
        room: Mapping[str, int],
        lease_s: float,
        *,
        lost: bool = True,
        skip_locked: bool = False,
    ) -> list[Job]:
        """Take the first job of each due queue, of so many of each handler; nobody else gets a
        queue during the lease.

        Of queues whose lease ran out it takes one, or none unless `lost`.
        To `skip_locked` is to take no job whose row another transaction holds.
        """

    def lock(self, queue_key_ids: Sequence[int]) -> None:
        """Let nobody change queues until the transaction ends; all lock them in the same order."""

    def held_elsewhere(
        self, queue_key_ids: Sequence[int], job_ids: Sequence[int]
    ) -> tuple[set[int], set[int]]:
        """Hold queues and jobs without waiting; return those that another transaction holds."""

    def renew(self, token: str, queue_key_ids: Sequence[int], lease_s: float) -> None:
        """Hold queues longer."""

    def finish(self, token: str, outcomes: Sequence[JobOutcome]) -> list[int]:
        """Write outcomes, and let the queues go on; return the ids of jobs no longer held by
        `token`, or discarded meanwhile, of which nothing was written."""

    def counts(self) -> list[JobCount]:
        """Count jobs by handler and state; the oldest that waits, too."""

    def find(self, wanted: JobFilter) -> list[JobRow]:
        """List jobs, the newest first."""

    def move(self, ids: Sequence[int], move: JobMove) -> list[int]:
        """Repeat or discard jobs by hand, where that can be; return the ids of those.

        A repeated one goes to the end of its queue; one that waits has its next attempt now, but
        for one that is run just now. Their queues are due, unless somebody holds them.
        """

    def mend(self) -> int:
        """Make the queue keys that are missing where jobs wait; return how many."""
