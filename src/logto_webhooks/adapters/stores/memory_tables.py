"""What the store in memory holds."""

from __future__ import annotations

from msgspec import Struct, field

from logto_webhooks.adapters.stores.memory_job_tables import JobTables
from logto_webhooks.adapters.stores.memory_keys import KeyTables
from logto_webhooks.core.delivery import Delivery
from logto_webhooks.core.ending import Ending
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.ports import Progress
from logto_webhooks.core.record import Key, Record


class InboxRow(Struct, frozen=True):
    """A delivery in the inbox, and where it stands."""

    id: int
    delivery: Delivery
    due_at: int
    state: State = State.PENDING
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
