"""Explain a user or an organization: its history, and which delivery set each field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import DeliveryState, StoredDelivery
from logto_webhooks.errors import MalformedEvent, NotADelivery
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


def explain(
    subject: Key,
    records: Mapping[Key, Record],
    deliveries: Iterable[StoredDelivery],
    lag_ms: int = LAG_MS,
) -> Explained:
    """Explain a user or an organization.

    `records` has its current record and those of its memberships. `deliveries` are sorted by ID;
    those about other records are left out.
    """
    timeline, provenance = Timeline(subject, records), Provenance(subject)
    subject_name = f"{subject.kind}:{subject.id}"
    others = {
        end for key in records if key.kind == "membership" for end in key.organization_and_user
    }
    for delivery in deliveries:
        if delivery.state is DeliveryState.DEAD and delivery.subject == subject_name:
            timeline.add(delivery, [RefetchRequest(subject, DEAD_DELIVERY, delivery.received_at)])
            continue
        changes = [
            change
            for change in _list_changes(delivery, lag_ms)
            # About the subject or its memberships, or deletions of their other ends.
            if belongs_to(change.key, subject)
            or (isinstance(change, Tombstone) and change.key in others)
        ]
        if changes or delivery.subject == subject_name:
            timeline.add(delivery, changes)
            provenance.add(delivery, changes)
    timeline.end()
    return Explained(subject, timeline.lines, provenance.list_fields(records))


def _list_changes(delivery: StoredDelivery, lag_ms: int) -> list[DeliveryChange]:
    """List the changes of a delivery; none if it wasn't applied."""
    if delivery.state is not DeliveryState.DONE:
        return []
    try:
        return read(trust(delivery.body), delivery.occurred_at, lag_ms)[1]
    except (MalformedEvent, NotADelivery):
        return []


_PAGE: Final = 200


def explain_stored(store: Store, subject: Key, lag_ms: int = LAG_MS) -> Explained | None:
    """Explain a stored user or organization; return None if nothing is known about it.

    Deliveries that arrive meanwhile may be listed, but may not have set a field yet.
    """
    records = store.inbox.known(subject)
    others = [
        end
        for key, record in records.items()
        if key.kind == "membership" and record.gone_at != NEVER
        for end in key.organization_and_user
        if end != subject
    ]
    explained = explain(subject, records, _read_deliveries(store, subject, others), lag_ms)
    return explained if explained.lines or records else None


def _read_deliveries(store: Store, subject: Key, others: Sequence[Key]) -> Iterator[StoredDelivery]:
    after = 0
    while page := store.inbox.about(subject, others, after, _PAGE):
        yield from page
        after = page[-1].id
