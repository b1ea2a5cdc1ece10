"""What the database can't do."""

from __future__ import annotations

from collections.abc import Sequence

from logto_webhooks.errors.base import LogtoWebhooksError


class StoreUnavailable(LogtoWebhooksError):
    """The database can't be used now: {problem}."""

    problem: str


class TimedOut(StoreUnavailable):
    """The database didn't finish in time, most likely because another transaction holds a lock:
    {problem}."""


class RowRejected(LogtoWebhooksError):
    """The database refuses a row of this batch: {problem}."""

    problem: str


class ClaimLost(LogtoWebhooksError):
    """Another worker took over what this one had claimed ({count}): its lease had run out."""

    count: int


class SchemaMismatch(LogtoWebhooksError):
    """The database's schema is {state}, this release needs {needed}.
    Run: logto-webhooks migrate"""

    found: str | None
    needed: str

    def __init__(self, found: str | None, needed: str) -> None:
        state = f"at {found}" if found else "not there yet"
        super().__init__(found=found, needed=needed, state=state)


class DeliveryUnknown(LogtoWebhooksError):
    """No delivery has the id {listed}; nothing was done."""

    ids: tuple[int, ...]

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(ids=tuple(ids), listed=", ".join(map(str, ids)))


class JobUnknown(LogtoWebhooksError):
    """No job has the id {listed}; nothing was done."""

    ids: tuple[int, ...]

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(ids=tuple(ids), listed=", ".join(map(str, ids)))
