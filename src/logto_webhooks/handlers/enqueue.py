"""Enqueue jobs in the transaction that applies a delivery."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from operator import attrgetter
from typing import Final, TypeVar, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import ClaimedDelivery
from logto_webhooks.events import (
    ALIASES,
    Event,
    OrganizationMembershipUpdated,
    OrganizationUserAdded,
    OrganizationUserRemoved,
    TestPayload,
)
from logto_webhooks.events.base import LATEST
from logto_webhooks.events.local import (
    LOCAL,
    LocalEvent,
    LocalMemberAdded,
    LocalMemberEvent,
    LocalMemberRemoved,
    LocalOrganizationCreated,
    LocalOrganizationEvent,
    LocalUserCreated,
    LocalUserEvent,
    Source,
)
from logto_webhooks.jobs import NewJob, RegisteredHandler, ToldEvent
from logto_webhooks.records import local_events
from logto_webhooks.records.record import (
    MEMBERS,
    NEVER,
    Arrival,
    DeliveryChange,
    Ending,
    Key,
    Record,
    membership,
)

T = TypeVar("T")
_BEFORE: Final = 0
_AFTER: Final = 1

_CREATED: Final = (LocalUserCreated, LocalOrganizationCreated)
COMING: Final = (*_CREATED, LocalMemberAdded)  # the events of a record that came


class PlannedDelivery(Struct, frozen=True):
    """A claimed delivery, and its changes. One that `is_late` arrived at the webhook later than
    Logto sends, so somebody else may have replayed it. It runs no handlers."""

    claimed: ClaimedDelivery
    event: Event
    changes: list[DeliveryChange]
    is_late: bool = False

    @property
    def weight(self) -> int:
        """The amount of work: the number of changes, but at least one."""
        return max(1, len(self.changes))

    def runs_handlers(self, since: int) -> bool:
        """Whether it is neither late nor older than the installation."""
        return not self.is_late and self.claimed.occurred_at >= since


class WrittenRecords(Struct, frozen=True):
    """What a transaction wrote: records before and after, and the announced memberships (`left`)
    that a deletion of their user or organization ended.

    `members` are memberships before and after, written or not. `many` are deleted records whose
    memberships are ended step by step. `came` are users and organizations that came, with so many
    memberships that they are announced step by step. `ends` are all users and organizations that
    were locked or read, before and after.
    """

    changed: list[tuple[Record, Record]]
    left: list[Key]
    members: list[tuple[Record, Record]] = []
    many: list[Record] = []
    came: list[Key] = []
    ends: dict[Key, tuple[Record, Record]] = {}


def enqueue_for_deliveries(
    store: Store, batch: Sequence[PlannedDelivery], written: WrittenRecords, *, own: bool = True
) -> int:
    """Create the jobs of the deliveries (if `own`) and of local events. Note the records whose
    memberships have yet to be ended or announced.

    Return the time of the installation (ms), before which there are no jobs; 0 without handlers.
    """
    handlers = store.jobs.handlers()
    since = store.installed_at() if handlers else 0
    if not (handlers or written.many or written.came):
        return 0
    jobs = own_jobs(batch, handlers, since) if own else []
    sources: dict[Key, PlannedDelivery] = {}  # record -> the newest delivery that changed it
    for planned in sorted(batch, key=attrgetter("claimed.occurred_at")):
        sources |= {change.key: planned for change in planned.changes}
    for key, event in _find_local_events(written, since, "webhook", handlers):
        planned = _find_source(key, sources)
        if planned.runs_handlers(since):
            event = replace(event, source=cast(Source, planned.claimed.origin))
            jobs += jobs_for_change(event, handlers, planned.claimed.id)
    store.jobs.add(jobs)
    for record in written.many:
        planned = _find_source(record.key, sources)
        source = planned.claimed.origin if planned.runs_handlers(since) else None
        store.note_ending(_to_ending(record, source, planned.claimed.id))
    for end in written.came:
        planned = _find_source(end, sources)
        source = planned.claimed.origin if planned.runs_handlers(since) else None
        store.note_arrival(end, source, planned.claimed.id)
    return since


def _find_source(key: Key, sources: dict[Key, PlannedDelivery]) -> PlannedDelivery:
    """Find the delivery that changed a record, or deleted the membership's user or organization."""
    if key in sources:
        return sources[key]
    return next(sources[end] for end in key.organization_and_user if end in sources)


def own_jobs(
    batch: Sequence[PlannedDelivery], handlers: Sequence[RegisteredHandler], since: int
) -> list[NewJob]:
    """Make the jobs of the deliveries' events."""
    return [
        job
        for planned in batch
        if planned.runs_handlers(since)
        for job in jobs_for_event(planned.event, planned.claimed, handlers)
    ]


def enqueue_for_ended(store: Store, pairs: Sequence[Key], endings: Sequence[Ending]) -> None:
    """Create the jobs of memberships that ended with deleted users or organizations, one each."""
    by_end = {ending.key: ending for ending in endings if ending.source is not None}
    if not by_end or not pairs:
        return
    name = LocalMemberRemoved.name
    handlers = [handler for handler in store.jobs.handlers() if handler.wants(name)]
    jobs = []
    for key in pairs:
        if ending := _find_note(key, by_end):
            event = local_events.member_removed(key, cast(Source, ending.source))
            jobs += jobs_for_change(event, handlers, ending.delivery_id)
    store.jobs.add(jobs)


def enqueue_for_announced(
    store: Store, written: WrittenRecords, arrivals: Sequence[Arrival]
) -> None:
    """Create the jobs of memberships whose users or organizations came before, one each."""
    by_end = {arrival.key: arrival for arrival in arrivals if arrival.source is not None}
    if not by_end or not written.members:
        return
    handlers = store.jobs.handlers()
    jobs = []
    for source in {cast(Source, arrival.source) for arrival in by_end.values()}:
        for key, event in _find_member_events(written, _find_first(store, source), source):
            arrival = _find_note(key, by_end)
            if arrival and arrival.source == source:
                jobs += jobs_for_change(event, handlers, arrival.delivery_id)
    store.jobs.add(jobs)


def _find_note(pair: Key, by_end: dict[Key, T]) -> T | None:
    """Find the note of a membership's organization or user."""
    return next((by_end[end] for end in pair.organization_and_user if end in by_end), None)


def enqueue_for_reads(store: Store, written: WrittenRecords, source: Source | None) -> None:
    """Create the jobs of changes from Logto's answers; none without a `source`. Note the records
    whose memberships have yet to be ended or announced."""
    old = _enqueue_for_reads(store, written, source) if source is not None else set()
    for record in written.many:
        store.note_ending(_to_ending(record, None if record.key in old else source, None))
    for end in written.came:
        store.note_arrival(end, source, None)


def _to_ending(record: Record, source: str | None, delivery_id: int | None) -> Ending:
    return Ending(key=record.key, ended_at=record.ended_at, source=source, delivery_id=delivery_id)


def _enqueue_for_reads(store: Store, written: WrittenRecords, source: Source) -> set[Key]:
    """Create the jobs. Return the records without jobs, because their changes may be older than the
    installation."""
    handlers = store.jobs.handlers()
    if not handlers:
        return set()
    since = _find_first(store, source)
    old = {
        after.key
        for before, after in written.changed
        if _is_old(after, since)
        and _known_until(before, written.ends) < since
        and (local_events.is_here(after) or _find_evidence(store, after, written) < since)
    }
    old |= {key for key in written.left if old.intersection(key.organization_and_user)}
    jobs = [
        job
        for key, event in _find_local_events(written, since, source, handlers)
        if key not in old
        for job in jobs_for_change(event, handlers, None)
    ]
    store.jobs.add(jobs)
    return old


def _find_first(store: Store, source: Source) -> int:
    """Return since when records run handlers. A backfill is asked to run them for all."""
    return NEVER if source == "backfill" else store.installed_at()


def _find_local_events(
    written: WrittenRecords,
    since: int,
    source: Source,
    handlers: Sequence[RegisteredHandler],
) -> list[tuple[Key, LocalEvent]]:
    """Derive the local events: of users and organizations first, then of memberships.

    A new record that is older than the installation has no event. A restored one isn't new.
    """
    if not handlers:
        return []
    events = []
    for before, after in written.changed:
        if after.key.kind == "membership":
            continue
        for event in local_events.local_events(before, after, source):
            is_new = isinstance(event, _CREATED) and not event.restored
            if not is_new or _created_at(after) >= since:
                events.append((after.key, event))
    names = (LocalMemberAdded.name, LocalMemberRemoved.name)
    if any(handler.wants(name) for handler in handlers for name in names):
        events += _find_member_events(written, since, source)
    return events


def _find_member_events(
    written: WrittenRecords, since: int, source: Source
) -> list[tuple[Key, LocalEvent]]:
    """Derive the events of memberships. A membership is here if it and both its ends are, so a
    change of any of the three can start or end it."""
    events: list[tuple[Key, LocalEvent]] = [
        (key, local_events.member_removed(key, source)) for key in written.left
    ]
    for before, after in written.members:
        key = after.key
        if before.announced and not after.announced:
            events.append((key, local_events.member_removed(key, source)))
        elif after.announced and not before.announced:
            is_new_end = any(
                _created_at(written.ends[end][_AFTER]) >= since for end in key.organization_and_user
            )
            if is_new_end or _find_start(before, after) >= since:
                events.append((key, local_events.member_added(key, source)))
    return events


def _find_start(before: Record, after: Record) -> int:
    """Return when a membership began, as far as known. If it was here before its ends were, and was
    read from an answer, it may have begun at any time."""
    if not local_events.is_here(before):
        return LATEST  # whenever it was added before
    if "addedAt" in after.facts:
        return after.facts["addedAt"]
    group = after.groups["present"]
    return NEVER if group.read_at != NEVER else group.stamp


def _created_at(record: Record) -> int:
    return record.facts.get("createdAt", LATEST)


def _is_old(record: Record, since: int) -> bool:
    """Whether there is no evidence that it is newer than the installation. An answer doesn't say
    when somebody joined."""
    newest = record.facts.get("updatedAt", NEVER)
    return record.key.kind == "membership" or (_created_at(record) < since and newest < since)


def _find_evidence(store: Store, gone: Record, written: WrittenRecords) -> int:
    """Return the time of the newest evidence of a record that is gone now, including that of its
    memberships: it was deleted later."""
    if all(record.key != gone.key for record in written.many):
        return gone.told_stamp
    newest, _ = store.newest_membership(gone.key)
    return max(gone.told_stamp, newest)


def _known_until(before: Record, ends: dict[Key, tuple[Record, Record]]) -> int:
    """Return until when a record is known to have been different, so that it changed later. For a
    membership, this includes a full list of members without it, and the creation of its ends."""
    moments = [max(group.read_at, group.stamp) for group in before.groups.values()]
    moments.append(before.ended_at)
    if before.key.kind == "membership":
        organization, user = (ends[key] for key in before.key.organization_and_user)
        born = [
            _created_at(after) for _, after in (organization, user) if "createdAt" in after.facts
        ]
        moments += [organization[_BEFORE].asked_for(MEMBERS), *born]
    return max(moments, default=NEVER)


def jobs_for_event(
    event: Event, claimed: ClaimedDelivery, handlers: Sequence[RegisteredHandler]
) -> list[NewJob]:
    """Make the jobs of an applied delivery: for its event, and for each member that it names."""
    other = "no" if isinstance(event, TestPayload) else "only"
    name = ALIASES.get(event.event, event.event).replace("\0", "")  # PostgreSQL stores none
    if name in LOCAL:  # Logto has no such event: these are told by changes of records alone
        return []
    subject, key = claimed.subject or f"event:{name}", claimed.digest.hex()
    subjects = {name: [(subject, key)]}
    if isinstance(event, OrganizationMembershipUpdated):
        for derived, users in (
            (OrganizationUserAdded.name, event.added_user_ids),
            (OrganizationUserRemoved.name, event.removed_user_ids),
        ):
            subjects[derived] = [(f"user:{user}", f"{key}:{derived}:{user}") for user in users]
    wanting = {  # chosen once for each event, which can have thousands of subjects
        name: [handler for handler in handlers if handler.tests != other and handler.wants(name)]
        for name, some in subjects.items()
        if some
    }
    return [
        NewJob(
            handler=handler.name,
            key=key,
            event=name,
            subject=subject,
            queue_key=subject if handler.ordered else key,
            occurred_at=claimed.occurred_at,
            delivery_id=claimed.id,
        )
        for name, those in wanting.items()
        for subject, key in subjects[name]
        for handler in those
    ]


def jobs_for_change(
    event: LocalEvent, handlers: Sequence[RegisteredHandler], delivery_id: int | None
) -> list[NewJob]:
    """Make the jobs of a local event."""
    subject = _name_subject(event)
    key = name_change(event)
    key_again = None
    is_new = isinstance(event, _CREATED) and not event.restored  # once per Logto id
    if not isinstance(event, COMING):
        key = f"{key}:{uuid.uuid4().hex}"
    elif not is_new and event.source != "existing":
        # The same for all handlers, so that a replay knows who was told.
        key_again = f"{key}:{uuid.uuid4().hex if delivery_id is None else delivery_id}"
    wanting = [
        handler for handler in handlers if handler.tests != "only" and handler.wants(event.name)
    ]
    payload = msgspec.json.encode(event) if wanting else b""  # once: a user's data may be large
    return [
        NewJob(
            handler=handler.name,
            key=key,
            key_again=key_again,
            event=event.name,
            subject=subject,
            queue_key=subject if handler.ordered else key,
            is_first=is_new,
            delivery_id=delivery_id,
            payload=payload,
        )
        for handler in wanting
    ]


def jobs_for_told(
    event: LocalEvent, told: ToldEvent, handlers: Sequence[RegisteredHandler]
) -> list[NewJob]:
    """Make the jobs of a past local event, for handlers that are new since then. They get the place
    in their queues that the event has by its time."""
    jobs = jobs_for_change(event, handlers, told.delivery_id)
    if not isinstance(event, COMING):
        jobs = [job.with_key(told.key) for job in jobs]
    own = {"payload": told.payload, "occurred_at": told.occurred_at}
    return [replace(job, **own) for job in jobs]


def record_of(event: LocalEvent) -> Key:
    """Return the key of a local event's record."""
    match event:
        case LocalUserEvent():
            return Key("user", event.user.logto_user_id)
        case LocalOrganizationEvent():
            return Key("organization", event.organization.logto_organization_id)
        case LocalMemberEvent():
            return membership(event.organization_id, event.user_id)
    raise TypeError(event)


def name_change(event: LocalEvent) -> str:
    """Name a local event and its record. For an event of COMING, this is the key of a handler's
    first job, whatever its source: so a handler is run only once for a record that was here."""
    return _name(event.name, event)


def name_coming(event: LocalEvent) -> str:
    """Return the key of a handler's first job of COMING for the record of any local event."""
    match event:
        case LocalUserEvent():
            return _name(LocalUserCreated.name, event)
        case LocalOrganizationEvent():
            return _name(LocalOrganizationCreated.name, event)
    return _name(LocalMemberAdded.name, event)


def _name(event_name: str, event: LocalEvent) -> str:
    member = f":{event.organization_id}" if isinstance(event, LocalMemberEvent) else ""
    return f"{event_name}:{_name_subject(event)}{member}"


def _name_subject(event: LocalEvent) -> str:
    record = record_of(event)
    subject = record.organization_and_user[1] if record.kind == "membership" else record
    return f"{subject.kind}:{subject.id}"
