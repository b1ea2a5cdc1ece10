"""Explain a user or an organization: its history, and which delivery set each field."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import partial
from typing import Final

from msgspec import Struct

from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import DeliveryState, StoredDelivery
from logto_webhooks.errors import MalformedEvent, NotADelivery
from logto_webhooks.event_loop import run_in_thread
from logto_webhooks.explain.provenance import Field, Provenance
from logto_webhooks.explain.timeline import Timeline, TimelineEntry
from logto_webhooks.records.changes import LAG_MS, read
from logto_webhooks.records.projection import belongs_to, columns_for
from logto_webhooks.records.record import (
    DEAD_DELIVERY,
    NEVER,
    DeliveryChange,
    Key,
    Record,
    RefetchRequest,
    Tombstone,
)
from logto_webhooks.signing_keys import trust


class Explained(Struct, frozen=True):
    """A record's history: each delivery and API response, and the source of each field."""

    subject: Key
    lines: list[TimelineEntry]
    fields: list[Field]

    def only(self, name: str) -> Explained:
        """Keep one field, or all that begin with `name.`, and the lines about them.

        These include lines that changed nothing, but confirmed the field's value.
        """
        columns = columns_for(self.subject, self.subject)
        group = {column.name: column.group for column in columns}.get(name)

        def matches(other: str) -> bool:
            return other in (name, group) or other.startswith(f"{name}.")

        fields = [field for field in self.fields if matches(field.name)]
        ids = {by.id for field in fields for by in (field.set_by, field.told_by) if by}
        lines = [line for line in self.lines if line.id in ids or any(map(matches, line.names))]
        return Explained(self.subject, lines, fields)


class _Explanation:
    """Explains a user or an organization from its deliveries.

    `records` has its current record and those of its memberships.
    """

    def __init__(self, subject: Key, records: Mapping[Key, Record], lag_ms: int) -> None:
        self._subject = subject
        self._records = records
        self._lag_ms = lag_ms
        self._timeline, self._provenance = Timeline(subject, records), Provenance(subject)
        self._ends = {
            end for key in records if key.kind == "membership" for end in key.organization_and_user
        }

    def add(self, deliveries: Iterable[StoredDelivery]) -> None:
        """Add the next deliveries, sorted by ID. Those about other records are left out."""
        for delivery in deliveries:
            self._add(delivery)

    def _add(self, delivery: StoredDelivery) -> None:
        subject = self._subject
        is_subjects = delivery.subject == f"{subject.kind}:{subject.id}"
        if delivery.state is DeliveryState.DEAD and is_subjects:
            request = RefetchRequest(subject, DEAD_DELIVERY, delivery.received_at)
            self._timeline.add(delivery, [request])
            return
        changes = [
            change
            for change in _list_changes(delivery, self._lag_ms)
            # About the subject or its memberships, or deletions of their other ends.
            if belongs_to(change.key, subject)
            or (isinstance(change, Tombstone) and change.key in self._ends)
        ]
        if changes or is_subjects:
            self._timeline.add(delivery, changes)
            self._provenance.add(delivery, changes)

    def end(self) -> Explained:
        """Return the result, after the last delivery."""
        self._timeline.end()
        fields = self._provenance.list_fields(self._records)
        return Explained(self._subject, self._timeline.lines, fields)


def _list_changes(delivery: StoredDelivery, lag_ms: int) -> list[DeliveryChange]:
    """List the changes of a delivery; none if it wasn't applied."""
    if delivery.state is not DeliveryState.DONE:
        return []
    try:
        return read(trust(delivery.body), delivery.occurred_at, lag_ms)[1]
    except (MalformedEvent, NotADelivery):
        return []


_PAGE: Final = 200


async def explain_stored(
    host: TransactionRunner, subject: Key, lag_ms: int = LAG_MS
) -> Explained | None:
    """Explain a stored user or organization; return None if nothing is known about it.

    Deliveries that arrive meanwhile may be listed, but may not have set a field yet. Raises
    StoreUnavailable.
    """
    records = await host.read_long(lambda store: store.inbox.known(subject))
    # In threads, because a record can have thousands of memberships and deliveries.
    explanation = await run_in_thread(_Explanation, subject, records, lag_ms)
    others = [
        end
        for key, record in records.items()
        if key.kind == "membership" and record.gone_at != NEVER
        for end in key.organization_and_user
        if end != subject
    ]
    async for page in _read_deliveries(host, subject, others):
        await run_in_thread(explanation.add, page)
    explained = await run_in_thread(explanation.end)
    return explained if explained.lines or records else None


async def _read_deliveries(
    host: TransactionRunner, subject: Key, others: Sequence[Key]
) -> AsyncIterator[list[StoredDelivery]]:
    after = 0
    while page := await host.read_long(partial(_read_page, subject, others, after)):
        yield page
        after = page[-1].id


def _read_page(
    subject: Key, others: Sequence[Key], after: int, store: Store
) -> list[StoredDelivery]:
    return store.inbox.about(subject, others, after, _PAGE)
