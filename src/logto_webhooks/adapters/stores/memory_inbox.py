"""Looking at the inbox in memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from logto_webhooks.core.inbox import DELETIONS, MEMBERSHIP_EVENTS, DeliveryFilter, Kept
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.record import Key, Record

if TYPE_CHECKING:
    from logto_webhooks.adapters.stores.memory_tables import InboxRow, Tables


class MemoryInbox:
    """An Inbox over Tables."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def search(self, sought: DeliveryFilter) -> list[Kept]:
        """List deliveries."""
        every = sorted(self._tables.inbox.values(), key=lambda row: row.id)
        if not sought.oldest_first:
            every.reverse()
        return [_kept(row) for row in every if _is_sought(row, sought)][: sought.limit]

    def get(self, delivery_id: int) -> Kept | None:
        """Return one delivery; None if there is no such id."""
        row = self._tables.inbox.get(delivery_id)
        return None if row is None else _kept(row)

    def again(self, ids: Sequence[int]) -> int:
        """Make deliveries pending again, but those that are; return how many."""
        over = [
            row
            for row in map(self._tables.inbox.get, ids)
            if row is not None and row.state is not State.PENDING
        ]
        for row in over:
            fresh = replace(row, state=State.PENDING, due_at=0, attempts=0, token=None)
            self._tables.inbox[row.id] = fresh
        return len(over)

    def about(self, key: Key, others: Sequence[Key], after: int, limit: int) -> list[Kept]:
        """List what may tell of a user or an organization, or of its memberships, by id; of the
        `others`, at the other ends of these, only their deletions."""
        deleted = {f"{each.kind}:{each.id}" for each in others}
        rows = sorted(self._tables.inbox.values(), key=lambda row: row.id)
        found = [row for row in rows if _concerns(row, key) or _deletes(row, deleted)]
        return [_kept(row) for row in found if row.id > after][:limit]

    def known(self, key: Key) -> dict[Key, Record]:
        """Return a record, if there is one, and those of all its memberships."""
        return {
            each: record
            for each, record in sorted(self._tables.records.items())
            if each == key or (each.kind == "membership" and key in each.organization_and_user)
        }


def _concerns(row: InboxRow, key: Key) -> bool:
    if row.delivery.subject == f"{key.kind}:{key.id}":
        return True
    of_members = key.kind == "user" and row.delivery.event in MEMBERSHIP_EVENTS
    return of_members and key.id.encode() in row.delivery.body


def _deletes(row: InboxRow, subjects: Collection[str]) -> bool:
    return row.delivery.event in DELETIONS and row.delivery.subject in subjects


def _is_sought(row: InboxRow, sought: DeliveryFilter) -> bool:
    delivery, number = row.delivery, row.id
    further = sought.after is None or (
        number > sought.after if sought.oldest_first else number < sought.after
    )
    return (
        further
        and sought.event in (None, delivery.event)
        and sought.state in (None, row.state)
        and sought.subject in (None, delivery.subject)
        and (sought.since is None or delivery.received_at >= sought.since)
        and (sought.until is None or delivery.received_at < sought.until)
        and (sought.text or "").encode() in delivery.body
    )


def _kept(row: InboxRow) -> Kept:
    return Kept(
        id=row.id,
        event=row.delivery.event,
        subject=row.delivery.subject,
        occurred_at=row.delivery.occurred_at,
        received_at=row.delivery.received_at,
        origin=row.delivery.origin,
        state=row.state,
        result=row.result,
        attempts=row.attempts,
        error=row.last_error,
        body=row.delivery.body,
    )
