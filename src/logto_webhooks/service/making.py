"""Making the jobs of handlers, in the transaction that applies."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Final, cast

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.core import local, making
from logto_webhooks.core.events import Event
from logto_webhooks.core.events.base import LATEST
from logto_webhooks.core.events.local import (
    LocalEvent,
    LocalMemberAdded,
    LocalOrganizationCreated,
    LocalUserCreated,
    Source,
)
from logto_webhooks.core.log import INSTALLED, RECONCILE
from logto_webhooks.core.ports import Claimed, Store
from logto_webhooks.core.record import Key, Record, Told

_NEW: Final = (LocalUserCreated, LocalOrganizationCreated, LocalMemberAdded)


class Planned(Struct, frozen=True):
    """A claimed delivery, and what it changes."""

    claimed: Claimed
    event: Event
    changes: list[Told]

    @property
    def weight(self) -> int:
        """How much work it is: one, or as many as it changes."""
        return max(1, len(self.changes))


class Written(Struct, frozen=True):
    """What a transaction wrote: records before and after, and memberships that went with an end."""

    changed: list[tuple[Record, Record]]
    left: list[Key]


def of_deliveries(store: Store, batch: Sequence[Planned], written: Written) -> None:
    """Make the jobs of applied deliveries, and of what they changed here."""
    handlers = store.jobs.handlers()
    if not handlers:
        return
    since = installed_at(store)
    brought = {change.key: each.claimed for each in batch for change in each.changes}
    jobs = [
        job for each in batch for job in making.jobs_of(each.event, each.claimed, handlers, since)
    ]
    for key, event in _events(written, since, "webhook"):
        claimed = _bringer(key, brought)
        told = replace(event, source=cast(Source, claimed.origin))
        jobs += making.local_jobs(told, uuid.uuid4().hex, handlers, claimed.id)
    store.jobs.add(jobs)


def of_answers(store: Store, written: Written, source: Source) -> None:
    """Make the jobs of what Logto's answers changed here."""
    handlers = store.jobs.handlers()
    if not handlers:
        return
    # Until all was compared once, who joined before the installation can't be told from others.
    first_look = store.progress(RECONCILE) is None
    jobs = [
        job
        for _, event in _events(written, installed_at(store), source)
        if not (first_look and isinstance(event, LocalMemberAdded))
        for job in making.local_jobs(event, uuid.uuid4().hex, handlers, None)
    ]
    store.jobs.add(jobs)


def installed_at(store: Store) -> int:
    """Since when this is installed (ms): what is older runs no handlers."""
    installed = store.progress(INSTALLED)
    return installed.at if installed else 0


def _events(written: Written, since: int, source: Source) -> list[tuple[Key, LocalEvent]]:
    told = [
        (after.key, event)
        for before, after in written.changed
        for event in local.events_of(before, after, source)
        if not (isinstance(event, _NEW) and _born(after) < since)
    ]
    return told + [(key, local.member_removed(key, source)) for key in written.left]


def _born(record: Record) -> int:
    name = "addedAt" if record.key.kind == "membership" else "createdAt"
    return record.facts.get(name, LATEST)


def _bringer(key: Key, brought: dict[Key, Claimed]) -> Claimed:
    """The delivery that changed a record: its own, or its end's, with which it went."""
    if key in brought:
        return brought[key]
    return next(brought[end] for end in key.organization_and_user if end in brought)
