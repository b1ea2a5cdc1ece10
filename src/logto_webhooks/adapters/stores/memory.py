"""The store in memory, for tests: the same answers as the SQL store, and gone with the process."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from typing import Any

from msgspec.structs import replace

from logto_webhooks.adapters.stores.memory_inbox import MemoryInbox
from logto_webhooks.adapters.stores.memory_jobs import MemoryJobs
from logto_webhooks.adapters.stores.memory_keys import MemoryKeys
from logto_webhooks.adapters.stores.memory_tables import InboxRow, Tables
from logto_webhooks.core.clocks import Clocks, Dated
from logto_webhooks.core.delivery import Delivery, sent_at_of
from logto_webhooks.core.ending import Ending
from logto_webhooks.core.inbox import Accepted, Claimed, Outcome, Received
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.log import RECONCILE, RECOVER
from logto_webhooks.core.merge import merge
from logto_webhooks.core.mirror import parts_of, row_of
from logto_webhooks.core.ports import Clock, DatabaseClock, Found, Progress, Status, Waiting
from logto_webhooks.core.record import NEVER, Drop, Key, Kind, Record
from logto_webhooks.core.silence import SILENT
from logto_webhooks.errors import ClaimLost

# What a query names exactly, and of what it may be a part.
_NAMES: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "user": (
        ("logto_user_id", "id", "email", "phone", "username"),
        ("email", "username", "name", "phone"),
    ),
    "organization": (("logto_organization_id", "id", "name"), ("name",)),
}


class MemoryStore:
    """A Store over Tables."""

    def __init__(self, tables: Tables, clock: Clock) -> None:
        self.tables = tables
        self._clock = clock

    @property
    def inbox(self) -> MemoryInbox:
        """The inbox to look at."""
        return MemoryInbox(self.tables)

    def add(self, new: Sequence[Delivery], tried: Collection[bytes] = ()) -> list[Accepted]:
        """Put deliveries into the inbox; one answer each, in order."""
        return [self._add(delivery) for delivery in new]

    def limit_waits(self, lock_s: float, statement_s: float) -> None:
        """Nobody waits for anybody here."""

    def claim(self, token: str, limit: int, max_bytes: int, lease_s: float) -> list[Claimed]:
        """Take due deliveries, the longest due first; nobody else gets them during the lease."""
        now = self._clock.now()
        due = [
            row
            for row in self.tables.inbox.values()
            if row.state is State.PENDING and row.due_at <= now
        ]
        claimed: list[Claimed] = []
        total = 0
        for row in sorted(due, key=lambda row: (row.due_at, row.id))[:limit]:
            total += len(row.delivery.body)
            if claimed and total > max_bytes:
                break
            until, attempts = now + int(lease_s * 1000), row.attempts + 1
            held = replace(row, token=token, due_at=until, attempts=attempts)
            self.tables.inbox[row.id] = held
            claimed.append(_claimed(held))
        return sorted(claimed, key=lambda each: each.id)

    def renew(self, token: str, ids: Sequence[int], lease_s: float) -> None:
        """Hold claimed deliveries longer. Raises ClaimLost when any is no longer held."""
        lost = [number for number in ids if self.tables.inbox[number].token != token]
        if lost:
            raise ClaimLost(count=len(lost))
        until = self._clock.now() + int(lease_s * 1000)
        for number in ids:
            self.tables.inbox[number] = replace(self.tables.inbox[number], due_at=until)

    def finish(self, token: str, outcomes: Sequence[Outcome]) -> None:
        """Write outcomes. Raises ClaimLost when any of them is no longer held by `token`."""
        rows = [self.tables.inbox[outcome.id] for outcome in outcomes]
        lost = [row for row in rows if row.token != token or row.state is not State.PENDING]
        if lost:
            raise ClaimLost(count=len(lost))
        for row, outcome in zip(rows, outcomes, strict=True):
            self.tables.inbox[row.id] = replace(
                row,
                token=None,
                state=outcome.state,
                result=outcome.result,
                last_error=outcome.error,
                due_at=self._clock.now() + int(outcome.retry_after_s * 1000),
            )

    def lock(
        self, keys: Sequence[Key], *, share: bool = False, ends: Sequence[Key] = ()
    ) -> dict[Key, Record]:
        """Return records; of unknown ones there are empty stubs."""
        return {key: self.tables.records.get(key) or Record(key) for key in keys}

    @property
    def jobs(self) -> MemoryJobs:
        """The handlers and their jobs."""
        inbox = self.tables.inbox
        return MemoryJobs(self.tables.jobs, self._clock, lambda number: inbox[number].delivery)

    @property
    def keys_of_hooks(self) -> MemoryKeys:
        """Keys of hooks, and what no key signed."""
        return MemoryKeys(self.tables.keys, self._clock)

    def save(self, changed: Sequence[Record]) -> list[Record]:
        """Write records; rows are made when they are asked for."""
        for record in changed:
            kept = record if record.kept else replace(record, local_id=str(uuid.uuid4()))
            self.tables.records[record.key] = kept
            if record.waiting_for is None:
                self.tables.since.pop(record.key, None)
            else:
                self.tables.since.setdefault(record.key, self._clock.now())
        return [self.tables.records[record.key] for record in changed]

    def with_few_memberships(self, ends: Sequence[Key], most: int) -> list[Key]:
        """List those users and organizations that have no more than `most` memberships in all,
        ended ones included."""
        few = []
        for end in ends:
            count = len(self._memberships_of(end))
            if count <= most:
                most -= count
                few.append(end)
        return few

    def note_ending(self, ending: Ending) -> None:
        """Keep that memberships are to be ended step by step."""
        known = self.tables.endings.get(ending.key)
        if known is not None:
            ending = replace(
                ending,
                ended_at=max(known.ended_at, ending.ended_at),
                source=ending.source or known.source,
                delivery_id=ending.delivery_id or known.delivery_id,
            )
        self.tables.endings[ending.key] = ending

    def endings(self) -> list[Ending]:
        """List whose memberships are to be ended, the oldest first."""
        return list(self.tables.endings.values())

    def memberships_to_end(self, ending: Ending, limit: int) -> list[Key]:
        """List memberships that are still to be ended."""
        left = [
            key
            for key in self._memberships_of(ending.key)
            if self.tables.records[key].gone_at < ending.ended_at
        ]
        return sorted(left)[:limit]

    def finish_ending(self, ending: Ending) -> None:
        """Note that all memberships have ended."""
        if self.tables.endings.get(ending.key) == ending:
            del self.tables.endings[ending.key]

    def drop_memberships(self, ends: Sequence[Record]) -> list[Key]:
        """End the memberships that are no newer than the end of their user or organization; return
        those that were present."""
        return [
            key
            for end in ends
            for key in self.end_memberships(end, self._memberships_of(end.key))[0]
        ]

    def newest_membership(self, end: Key) -> int:
        """Return the greatest stamp at which a membership of a user or an organization was told
        of; NEVER if there is none."""
        return self._newest(self._memberships_of(end))

    def end_memberships(self, end: Record, pairs: Sequence[Key]) -> tuple[list[Key], int]:
        """Do both of the above for some memberships of a user or an organization."""
        present = []
        for key in pairs:
            known = self.tables.records[key]
            over = merge(known, Drop(key, end.ended_at))
            if row_of(known) and not row_of(over):
                present.append(key)
            self.save([over])
        return present, self._newest(pairs)

    def _newest(self, pairs: Sequence[Key]) -> int:
        return max((self.tables.records[key].told_stamp for key in pairs), default=NEVER)

    def recent(self, limit: int) -> list[Received]:
        """Return the newest deliveries, the newest first."""
        newest = sorted(self.tables.inbox, reverse=True)[:limit]
        found = [self.tables.inbox[number].delivery for number in newest]
        return [Received(each.body, each.occurred_at, each.received_at) for each in found]

    def clocks(self, limit: int) -> Clocks:
        """Return the database's clock, and how the newest deliveries are dated."""
        newest = sorted(self.tables.inbox, reverse=True)[:limit]
        found = [self.tables.inbox[number].delivery for number in newest]
        dated = [
            Dated(sent_at_of(each.digest), each.occurred_at, each.received_at, each.origin)
            for each in found
        ]
        return Clocks(self._clock.now(), dated)

    def progress(self, name: str, reached: Progress | None = None) -> Progress | None:
        """Return how far the work of that name has come; keep `reached` before, if given."""
        if reached:
            self.tables.progress[name] = reached
        return self.tables.progress.get(name)

    def status(self) -> Status:
        """Count."""
        counts = dict.fromkeys((state.value for state in State), 0)
        rows = self.tables.inbox.values()
        for row in rows:
            counts[row.state.value] += 1
        received = [row.delivery.received_at for row in rows if row.state is State.PENDING]
        names = (RECOVER, RECONCILE, SILENT)
        recovered, reconciled, silent = map(self.tables.progress.get, names)
        oldest = max(0, self._clock.now() - min(received)) / 1000 if received else None
        return Status(
            deliveries=counts,
            doubtful=sum(bool(record.doubts) for record in self.tables.records.values()),
            refetch=len(self.tables.since),
            oldest_pending_s=oldest,
            recovered=recovered.count if recovered else 0,
            complete_up_to=recovered.at if recovered else None,
            reconciled_at=reconciled.at if reconciled else None,
            silent_since=silent.at if silent and silent.count else None,
            memberships_to_end=sum(
                row_of(self.tables.records[key]) is not None
                for end in self.tables.endings
                for key in self._memberships_of(end)
            ),
        )

    def clock(self) -> DatabaseClock:
        """Look at the clock; it is the test's."""
        at = self._clock.now()
        return DatabaseClock(now=at, noted=at, installed=0, due_too_late=False)

    def set_clock_back(self, by_ms: int) -> None:
        """Nothing here outlives a test."""

    def waiting(self, limit: int) -> list[Waiting]:
        """List the records about which Logto must be asked, the longest waiting first."""
        keys = sorted(self.tables.since, key=lambda key: (self.tables.since[key], key))
        known = [self.tables.records[key] for key in keys[:limit]]
        return [
            Waiting(key=each.key, reason=each.waiting_for or "", doubtful=bool(each.doubts))
            for each in known
        ]

    def find(self, kind: Kind, query: str, limit: int) -> list[Found]:
        """Find users or organizations by Logto id, local id or what else names them (an email, a
        phone, a name); else by a part of that."""
        return self._find(kind, query, limit, *_NAMES[kind])

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
        """List known records that aren't deleted, by id, from `after` on."""
        found = [
            key
            for key, record in sorted(self.tables.records.items())
            if key.kind == kind and key.id > after
            if kind == "membership" or record.deleted_at is None or record.doubts
            if of is None or of in key.organization_and_user
            if not with_roles or parts_of(record).get("roles")
            if unread_since is None or _read_at(record, with_roles) < unread_since
        ]
        return found[:limit]

    def _memberships_of(self, end: Key) -> list[Key]:
        known = [key for key in self.tables.records if key.kind == "membership"]
        return [key for key in known if end in key.organization_and_user]

    def _add(self, delivery: Delivery) -> Accepted:
        known = self.tables.ids.get(delivery.digest)
        if known is not None:
            return Accepted(known, True)
        new = len(self.tables.inbox) + 1
        self.tables.ids[delivery.digest] = new
        self.tables.inbox[new] = InboxRow(new, delivery, self._clock.now())
        return Accepted(new, False)

    def _find(
        self, kind: str, query: str, limit: int, exact: tuple[str, ...], parts: tuple[str, ...]
    ) -> list[Found]:
        rows = {
            record.key: row | {"id": record.local_id}
            for record in self.tables.records.values()
            if record.key.kind == kind and (row := row_of(record))
        }
        text = query.lower()

        def lower(key: Key, columns: tuple[str, ...]) -> list[str]:
            return [(rows[key][column] or "").lower() for column in columns]

        same = [key for key in rows if text and text in lower(key, exact)]
        alike = [key for key in rows if any(text in value for value in lower(key, parts))]
        found = sorted(same or alike, key=lambda key: rows[key]["deleted_at"] is not None)
        return [self._found(key, rows[key]) for key in found[:limit]]

    def _found(self, key: Key, row: dict[str, Any]) -> Found:
        memberships = {
            other.id: self.tables.records[each]
            for each in self._memberships_of(key)
            for other in each.organization_and_user
            if other != key
        }
        return Found(
            row=row,
            waiting_for=self.tables.records[key].waiting_for,
            memberships=sorted(name for name, each in memberships.items() if row_of(each)),
            memberships_in_doubt=sorted(name for name, each in memberships.items() if each.doubts),
            roles=_roles(self.tables.records[key]),
        )


def _roles(record: Record) -> list[str]:
    return sorted(row["name"] for row in parts_of(record).get("roles", ()))


def _read_at(record: Record, with_roles: bool) -> int:
    if with_roles:
        return min(int(row["read_at"]) for row in parts_of(record)["roles"])
    return NEVER if record.read_at is None else record.read_at


def _claimed(row: InboxRow) -> Claimed:
    return Claimed(
        id=row.id,
        body=row.delivery.body,
        event=row.delivery.event,
        subject=row.delivery.subject,
        received_at=row.delivery.received_at,
        digest=row.delivery.digest,
        occurred_at=row.delivery.occurred_at,
        origin=row.delivery.origin,
        attempt=row.attempts,
    )
