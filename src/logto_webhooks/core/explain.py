"""Explaining a user or an organization: its life, and who set what it has now."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from msgspec import Struct

from logto_webhooks.core.columns import columns_of, is_of
from logto_webhooks.core.credit import Credits, Field
from logto_webhooks.core.inbox import Kept
from logto_webhooks.core.life import Life, Line
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.projection import LAG_MS, read
from logto_webhooks.core.record import DEAD_DELIVERY, Drop, Key, Record, Refetch, Told
from logto_webhooks.core.signature import vouch
from logto_webhooks.errors import MalformedEvent, NotADelivery


class Explained(Struct, frozen=True):
    """A line for each delivery and answer, and who set the present value of each column."""

    subject: Key
    lines: list[Line]
    fields: list[Field]

    def only(self, name: str) -> Explained:
        """What is told of one field, or of all that begin with `name.`; nothing, if it has none.

        Also the lines of who set it: one that came late told what was known by then.
        """
        group = {each.name: each.group for each in columns_of(self.subject, self.subject)}.get(name)

        def is_meant(other: str) -> bool:
            return other in (name, group) or other.startswith(f"{name}.")

        fields = [each for each in self.fields if is_meant(each.name)]
        ids = {by.id for each in fields for by in (each.set_by, each.told_by) if by}
        lines = [each for each in self.lines if each.id in ids or any(map(is_meant, each.told))]
        return Explained(self.subject, lines, fields)


def explain(
    subject: Key,
    known: Mapping[Key, Record],
    deliveries: Iterable[Kept],
    lag_ms: int = LAG_MS,
) -> Explained:
    """Explain a user or an organization.

    `known` are its record and its memberships' as they are now; `deliveries` come by id, and
    those that don't concern it are left out.
    """
    life, credits = Life(subject, known), Credits(subject)
    itself = f"{subject.kind}:{subject.id}"
    others = {end for key in known if key.kind == "membership" for end in key.organization_and_user}
    for kept in deliveries:
        if kept.state is State.DEAD and kept.subject == itself:
            life.take(kept, [Refetch(subject, DEAD_DELIVERY, kept.received_at)])
            continue
        own = [change for change in _changes(kept, lag_ms) if _concerns(change, subject, others)]
        if own or kept.subject == itself:
            life.take(kept, own)
            credits.take(kept, own)
    life.end()
    return Explained(subject, life.lines, credits.fields(known))


def _concerns(change: Told, subject: Key, others: Collection[Key]) -> bool:
    """Whether it is about the subject or its memberships, or deletes the other end of one."""
    return is_of(change.key, subject) or (isinstance(change, Drop) and change.key in others)


def _changes(kept: Kept, lag_ms: int) -> list[Told]:
    """What it changed; nothing, unless it was applied."""
    if kept.state is not State.DONE:
        return []
    try:
        return read(vouch(kept.body), kept.occurred_at, lag_ms)[1]
    except (MalformedEvent, NotADelivery):
        return []
