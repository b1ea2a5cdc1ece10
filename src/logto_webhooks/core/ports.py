"""What the service needs from the outside: a store, a host to run it, a clock, an observer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from msgspec import Struct

from logto_webhooks.core.delivery import Delivery
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.record import Key, Record
from logto_webhooks.core.reports import Report

T = TypeVar("T")


class Accepted(Struct, frozen=True):
    """Where a delivery stands in the inbox; a duplicate has the id of the first."""

    id: int
    duplicate: bool


class Claimed(Struct, frozen=True, kw_only=True):
    """A delivery that a worker holds; `attempt` counts this one."""

    id: int
    body: bytes
    event: str
    subject: str | None
    received_at: int
    attempt: int


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of a claimed delivery; `retry_after_s` only when it is pending again."""

    id: int
    state: State
    result: str | None = None
    error: str | None = None
    retry_after_s: float = 0


class Status(Struct, frozen=True, kw_only=True):
    """Counts of the inbox and the records; `oldest_pending_s` is None when nothing is pending."""

    deliveries: dict[str, int]
    doubtful: int
    refetch: int
    oldest_pending_s: float | None


class Waiting(Struct, frozen=True, kw_only=True):
    """A record that only Logto can settle, and why."""

    key: Key
    reason: str
    doubtful: bool


class Found(Struct, frozen=True, kw_only=True):
    """A row of the mirror, why Logto must be asked about it, the other ends of its memberships,
    and those of memberships in doubt, present or not."""

    row: dict[str, Any]
    waiting_for: str | None
    memberships: list[str]
    memberships_in_doubt: list[str]


class Store(Protocol):
    """The database within one transaction."""

    def add(self, deliveries: Sequence[Delivery]) -> list[Accepted]:
        """Put deliveries into the inbox; one answer each, in order."""

    def claim(self, token: str, limit: int, max_bytes: int, lease_s: float) -> list[Claimed]:
        """Take due deliveries, the longest due first; nobody else gets them during the lease."""

    def finish(self, token: str, outcomes: Sequence[Outcome]) -> None:
        """Write outcomes. Raises ClaimLost when any of them is no longer held by `token`."""

    def lock(self, keys: Sequence[Key], *, share: bool = False) -> dict[Key, Record]:
        """Hold records until the transaction ends; of unknown ones there are empty stubs.

        Who only reads them may share them with others who do.
        """

    def save(self, records: Sequence[Record]) -> None:
        """Write locked records, and the rows of the mirror that follow from them."""

    def drop_memberships(self, ends: Sequence[Record]) -> None:
        """End all memberships of deleted users and organizations, at the time of deletion."""

    def status(self) -> Status:
        """Count."""

    def waiting(self, limit: int) -> list[Waiting]:
        """List the records about which Logto must be asked, the longest waiting first."""

    def users(self, query: str, limit: int) -> list[Found]:
        """Find users by Logto id, local id, email, phone or username; else by a part of them."""

    def organizations(self, query: str, limit: int) -> list[Found]:
        """Find organizations by Logto id, local id or name; else by a part of it."""


class Host(Protocol):
    """Runs functions of a Store, each in one transaction."""

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for what the database says."""

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing, and without waiting for who writes."""

    async def close(self) -> None:
        """Give back threads and connections."""


class Clock(Protocol):
    """Tells the time."""

    def now(self) -> int:
        """Milliseconds since the epoch."""


# Told of everything that happens; must not raise, nor take long.
Observer = Callable[[Report], None]
