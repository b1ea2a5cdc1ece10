"""The store: everything that a transaction can do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, Protocol, TypeVar

import sqlalchemy as sa

from logto_webhooks.database import checkpoints, clock, deliveries, records
from logto_webhooks.database.checkpoints import (
    RECONCILE,
    RECOVER,
    Checkpoint,
    Gap,
    ProcessLease,
    RecordedFlow,
)
from logto_webhooks.database.clock import DatabaseClock
from logto_webhooks.database.deliveries import DatabaseInbox
from logto_webhooks.database.jobs import DatabaseJobs
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.database.signing_keys import DatabaseKeyStore
from logto_webhooks.deliveries import (
    ClaimedDelivery,
    Clocks,
    DeliveryOutcome,
    NewDelivery,
    ReceivedBody,
    Status,
    StoreResult,
)
from logto_webhooks.records.record import Ending, Key, Kind, Record

LOCK_S: Final = 1.0  # that a transaction of ours waits for a lock
STATEMENT_S: Final = 5.0  # that one of its statements may take
LONGEST_S: Final = 1.0  # a transaction of the worker, where it holds up only other workers
T = TypeVar("T")


class Store:
    """What can be done in one transaction, which is the caller's to commit."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    @property
    def inbox(self) -> DatabaseInbox:
        """The inbox to look at."""
        return DatabaseInbox(self._connection)

    def add(self, new: Sequence[NewDelivery], tried: Collection[bytes] = ()) -> list[StoreResult]:
        """Put deliveries into the inbox; one answer each, in order.

        Those whose digests were `tried` before may be there already, with the same `received_at`:
        then they are no duplicates of others.
        """
        return deliveries.add_deliveries(self._connection, new, tried)

    def limit_waits(self, lock_s: float, statement_s: float) -> None:
        """Let this transaction wait no longer for a lock, or for a statement, where the database
        can limit that: TimedOut is raised then. A runner sets LOCK_S and STATEMENT_S."""
        if self._connection.dialect.name == "postgresql":
            limits = {"lock": f"{lock_s * 1000:.0f}", "statement": f"{statement_s * 1000:.0f}"}
            self._connection.execute(deliveries.LIMIT_WAITS, limits).close()

    def claim(
        self, token: str, limit: int, max_bytes: int, lease_s: float
    ) -> list[ClaimedDelivery]:
        """Take due deliveries, the longest due first; nobody else gets them during the lease."""
        return deliveries.claim_deliveries(self._connection, token, limit, max_bytes, lease_s)

    def renew(self, token: str, ids: Sequence[int], lease_s: float) -> None:
        """Hold claimed deliveries longer. Raises ClaimLost when any is no longer held."""
        deliveries.renew(self._connection, token, ids, lease_s)

    def finish(self, token: str, outcomes: Sequence[DeliveryOutcome]) -> None:
        """Write outcomes. Raises ClaimLost when any of them is no longer held by `token`."""
        deliveries.finish_deliveries(self._connection, token, outcomes)

    def lock(
        self, keys: Sequence[Key], *, share: bool = False, ends: Sequence[Key] = ()
    ) -> dict[Key, Record]:
        """Hold records until the transaction ends; of unknown ones there are empty stubs.

        Who only reads them may share them with others who do. All memberships of `ends` are held,
        too, but not returned: there can be many.
        """
        return records.lock_records(self._connection, keys, share, ends)

    @property
    def jobs(self) -> DatabaseJobs:
        """The handlers and their jobs, in the same transaction."""
        return DatabaseJobs(self._connection)

    @property
    def keys_of_hooks(self) -> DatabaseKeyStore:
        """Keys of hooks, and what no key signed."""
        return DatabaseKeyStore(self._connection)

    def save(self, changed: Sequence[Record]) -> list[Record]:
        """Write locked records, and the rows of the mirror that follow from them; return them
        as they are kept, with their local ids."""
        return records.save_records(self._connection, changed)

    def drop_memberships(self, ends: Sequence[Record]) -> list[Key]:
        """End the memberships that are no newer than the end of their user or organization; return
        those that were present."""
        return records.drop_memberships(self._connection, ends)

    def present_memberships(self, ends: Sequence[Key]) -> list[Key]:
        """List the present memberships of users and organizations."""
        return records.present_memberships(self._connection, ends)

    def find_here(self, keys: Sequence[Key]) -> set[Key]:
        """Find those users and organizations that have a row, and aren't deleted."""
        return records.find_here(self._connection, keys)

    def newest_membership(self, end: Key) -> int:
        """Return the greatest stamp at which a membership of a user or an organization was told
        of; NEVER if there is none."""
        return records.newest_membership(self._connection, end)

    def end_memberships(self, end: Record, pairs: Sequence[Key]) -> tuple[list[Key], int]:
        """Do both of the above for some memberships of a user or an organization."""
        return records.end_memberships(self._connection, end, pairs)

    def with_few_memberships(self, ends: Sequence[Key], most: int) -> list[Key]:
        """List those users and organizations that have no more than `most` memberships in all,
        ended ones included."""
        return records.with_few_memberships(self._connection, ends, most)

    def note_ending(self, ending: Ending) -> None:
        """Keep that memberships are to be ended step by step."""
        records.note_ending(self._connection, ending)

    def endings(self) -> list[Ending]:
        """List whose memberships are to be ended, the oldest first."""
        return records.list_endings(self._connection)

    def memberships_to_end(self, ending: Ending, limit: int) -> list[Key]:
        """List memberships that are still to be ended."""
        return records.to_end(self._connection, ending, limit)

    def finish_ending(self, ending: Ending) -> None:
        """Note that all memberships have ended."""
        records.finish_ending(self._connection, ending)

    def recent(self, limit: int) -> list[ReceivedBody]:
        """Return the newest deliveries, the newest first."""
        return deliveries.recent_deliveries(self._connection, limit)

    def clocks(self, limit: int) -> Clocks:
        """Return the database's clock, and how the newest deliveries are dated."""
        return deliveries.clocks(self._connection, limit)

    def checkpoint(self, name: str) -> Checkpoint | None:
        """Return how far the work of that name has come; None if it never began."""
        return checkpoints.read_checkpoint(self._connection, name)

    def save_checkpoint(self, name: str, reached: Checkpoint) -> None:
        """Keep how far the work of that name has come."""
        checkpoints.write_checkpoint(self._connection, name, reached)

    def lease(self, name: str) -> ProcessLease | None:
        """Return who holds what has that name, or held it last."""
        return checkpoints.read_lease(self._connection, name)

    def save_lease(self, name: str, lease: ProcessLease) -> None:
        """Keep who holds what has that name."""
        checkpoints.write_lease(self._connection, name, lease)

    def flow(self) -> RecordedFlow:
        """Return what is noted of the flow of deliveries."""
        return checkpoints.read_flow(self._connection)

    def save_flow(self, flow: RecordedFlow) -> None:
        """Note it, but for its gaps."""
        checkpoints.write_flow(self._connection, flow)

    def save_gap(self, place: int, gap: Gap) -> None:
        """Note a gap in the flow, instead of the one that has the same place."""
        checkpoints.write_gap(self._connection, place, gap)

    def installed_at(self) -> int:
        """Return since when this is installed (ms): what is older runs no handlers."""
        return checkpoints.read_installed_at(self._connection)

    def set_installed_at(self, moment: int) -> None:
        """Let it be installed since then."""
        checkpoints.write_installation(self._connection, moment)

    def clock(self) -> DatabaseClock:
        """Look at the database's clock."""
        return clock.read(self._connection)

    def set_clock_back(self, by_ms: int, moved: int) -> None:
        """Let all that is due later be due so much sooner, unless that was done since `moved` was
        read, and note what the clock says."""
        clock.set_back(self._connection, by_ms, moved)

    def waiting(self, limit: int) -> list[RefetchNeed]:
        """List the records about which Logto must be asked, the longest waiting first."""
        return records.list_refetches(self._connection, limit)

    def status(self) -> Status:
        """Count."""
        recovered, reconciled = map(self.checkpoint, (RECOVER, RECONCILE))
        return Status(
            deliveries=deliveries.count_deliveries(self._connection),
            doubtful=records.count_doubtful(self._connection),
            refetch=records.count_refetches(self._connection),
            oldest_pending_s=deliveries.oldest_pending_s(self._connection),
            recovered=recovered.count if recovered else 0,
            complete_up_to=recovered.at if recovered else None,
            reconciled_at=reconciled.at if reconciled else None,
            silent_since=self.flow().silent_since,
            memberships_to_end=records.memberships_left(self._connection),
        )

    def find(self, kind: Kind, query: str, limit: int) -> list[FoundRow]:
        """Find users or organizations by Logto id, local id or what else names them (an email, a
        phone, a name); else by a part of that."""
        return records.find_rows(self._connection, records.SIDES[kind], query, limit)

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
        """List known records by id, from `after` on, without users and organizations that are
        deleted for sure.

        Memberships may be those `of` a user or an organization, present or not; users and
        organizations those of which Logto wasn't asked since a moment (ms); users `with_roles`
        are those with a role that Logto wasn't asked about since.
        """
        return records.list_keys(self._connection, kind, limit, after, of, unread_since, with_roles)


class TransactionRunner(Protocol):
    """Runs functions of a Store, each in one transaction."""

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run and commit. Raises StoreUnavailable or RowRejected for what the database says."""

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run `Store.add` alone, each statement committed by itself, within a limit.

        A connection that doesn't answer is thrown away, and so are all others of its age. What
        was given up may be stored all the same. Raises as `run`.
        """

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run without writing, and without waiting for who writes."""

    async def close(self) -> None:
        """Give back threads and connections."""


class HandlerRunner(TransactionRunner, Protocol):
    """A host that lets handlers take part in its transactions."""

    @property
    def room(self) -> int:
        """For how many handlers there is room."""

    async def within(self, session: Any, work: Callable[[Store], T]) -> T:
        """Run within the transaction of an application's session, which it ends by itself.

        Raises SettingInvalid for a session that can't be used here, and what `run` raises.
        """

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """The kinds of transaction that a handler, `awaited` or not, can ask for by annotation."""

    async def handle(
        self, wish: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with the transaction that was wished for, await what it returns if need be, and
        let `finish` end in the same one. All is rolled back if either raises.

        Raises what they raise, and StoreUnavailable.
        """
