"""Explain a user or an organization: its timeline, and which delivery set each field."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from logto_webhooks.deliveries import StoredDelivery
from logto_webhooks.errors import MalformedEvent, NotADelivery
from logto_webhooks.explain.provenance import Field, Provenance
from logto_webhooks.explain.timeline import Timeline, TimelineEntry
from logto_webhooks.interfaces import Store
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
from logto_webhooks.states import DeliveryState


class Explained(Struct, frozen=True):
    """A record's history: a line for each delivery and answer, and what set each column's current
    value."""

    subject: Key
    lines: list[TimelineEntry]
    fields: list[Field]

    def only(self, name: str) -> Explained:
        """Return the history of one field, or of all that begin with `name.`.

        It includes the deliveries that set the field.
        """
        group = {each.name: each.group for each in columns_for(self.subject, self.subject)}.get(
            name
        )

        def is_meant(other: str) -> bool:
            return other in (name, group) or other.startswith(f"{name}.")

        fields = [each for each in self.fields if is_meant(each.name)]
        ids = {by.id for each in fields for by in (each.set_by, each.told_by) if by}
        lines = [each for each in self.lines if each.id in ids or any(map(is_meant, each.told))]
        return Explained(self.subject, lines, fields)


def explain(
    subject: Key,
    known: Mapping[Key, Record],
    deliveries: Iterable[StoredDelivery],
    lag_ms: int = LAG_MS,
) -> Explained:
    """Explain a user or an organization.

    `known` are its record and its memberships' as they are now; `deliveries` come by id, and
    those that don't concern it are left out.
    """
    life, credits = Timeline(subject, known), Provenance(subject)
    itself = f"{subject.kind}:{subject.id}"
    others = {end for key in known if key.kind == "membership" for end in key.organization_and_user}
    for kept in deliveries:
        if kept.state is DeliveryState.DEAD and kept.subject == itself:
            life.take(kept, [RefetchRequest(subject, DEAD_DELIVERY, kept.received_at)])
            continue
        own = [change for change in _changes(kept, lag_ms) if _concerns(change, subject, others)]
        if own or kept.subject == itself:
            life.take(kept, own)
            credits.take(kept, own)
    life.end()
    return Explained(subject, life.lines, credits.fields(known))


def _concerns(change: DeliveryChange, subject: Key, others: Collection[Key]) -> bool:
    """Whether it is about the subject or its memberships, or deletes the other end of one."""
    return belongs_to(change.key, subject) or (
        isinstance(change, Tombstone) and change.key in others
    )


def _changes(kept: StoredDelivery, lag_ms: int) -> list[DeliveryChange]:
    """What it changed; nothing, unless it was applied."""
    if kept.state is not DeliveryState.DONE:
        return []
    try:
        return read(trust(kept.body), kept.occurred_at, lag_ms)[1]
    except (MalformedEvent, NotADelivery):
        return []


_PAGE: Final = 200


def explain_stored(store: Store, subject: Key, lag_ms: int = LAG_MS) -> Explained | None:
    """Explain a user or an organization; None if nothing came about it and nothing is known.

    What comes meanwhile may be told, but credited with nothing yet.
    """
    known = store.inbox.known(subject)
    others = [
        end
        for key, record in known.items()
        if key.kind == "membership" and record.gone_at != NEVER
        for end in key.organization_and_user
        if end != subject
    ]
    found = explain(subject, known, _about(store, subject, others), lag_ms)
    return found if found.lines or known else None


def _about(store: Store, subject: Key, others: Sequence[Key]) -> Iterator[StoredDelivery]:
    after = 0
    while page := store.inbox.about(subject, others, after, _PAGE):
        yield from page
        after = page[-1].id
