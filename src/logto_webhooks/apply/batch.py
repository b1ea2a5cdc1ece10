"""Apply a batch of claimed deliveries to records and rows, in one transaction.

The steps, in order: plan, lock, merge, save, drop memberships, finish. Everything is decided before
anything is written, and a malformed delivery harms no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.database.store import RECONCILE, Store
from logto_webhooks.deliveries import ClaimedDelivery, DeliveryOutcome, DeliveryState
from logto_webhooks.events import TestPayload, UnknownEvent
from logto_webhooks.events.local import Source
from logto_webhooks.handlers.enqueue import (
    PlannedDelivery,
    WrittenRecords,
    enqueue_for_deliveries,
    enqueue_for_reads,
)
from logto_webhooks.records.changes import read
from logto_webhooks.records.local_events import is_here
from logto_webhooks.records.merge import OUTCOMES, merge, name_effect
from logto_webhooks.records.record import (
    DEAD_DELIVERY,
    MEMBERS,
    NEVER,
    UNLISTED,
    Absent,
    ApiRead,
    Change,
    Key,
    Named,
    Record,
    RefetchRequest,
    Tombstone,
)
from logto_webhooks.signing_keys import trust

Records = dict[Key, Record]
Ends = dict[Key, tuple[Record, Record]]  # users and organizations, before and after
FEW: Final = 500  # memberships that can end in the transaction of the deletion


class LockedRecords(Struct, frozen=True):
    """Locked records, and the deleted ones among them whose memberships are locked, too. Of the
    `heads`, the contents of groups weren't read: these are only the ends of changed memberships."""

    records: Records
    few: frozenset[Key]
    heads: frozenset[Key]


class InvalidDelivery(Struct, frozen=True):
    """A claimed delivery that can't be applied."""

    claimed: ClaimedDelivery
    error: Exception
    weight: int = 1


Work = PlannedDelivery | InvalidDelivery


def parse_delivery(claimed: ClaimedDelivery, lag_ms: int, window_ms: int = 0) -> Work:
    """Parse and plan a delivery, without a transaction. One that arrived at the webhook later than
    `window_ms` runs no handlers; 0 is no limit. The limit isn't for deliveries from Logto's log, or
    for replays by hand."""
    age = claimed.received_at - claimed.occurred_at
    is_late = window_ms > 0 and claimed.origin == "webhook" and age > window_ms
    try:
        event, changes = read(trust(claimed.body), claimed.occurred_at, lag_ms)
        return PlannedDelivery(claimed, event, changes, is_late)
    except Exception as error:
        # Its traceback would keep the body in memory as long as the error.
        return InvalidDelivery(claimed, error.with_traceback(None))


def apply_batch(
    store: Store, batch: Sequence[PlannedDelivery], *, own_jobs: bool = True
) -> tuple[list[DeliveryOutcome], int]:
    """Apply planned deliveries. Return their outcomes, which have yet to be written, and the time
    of the installation (ms): older events run no handlers. Applying them again changes nothing.

    Without `own_jobs`, which is for a piece of a delivery, only changes here make jobs.
    """
    locked = lock_records(store, [change for planned in batch for change in planned.changes])
    records = _mark_unlisted(locked.records)
    outcomes = [_merge_one(records, planned) for planned in batch]
    _doubt_unlisted(store, locked.records, records)
    written = _write(store, locked, records)
    return outcomes, enqueue_for_deliveries(store, batch, written, own=own_jobs)


def combine_outcomes(planned: PlannedDelivery, results: Iterable[str]) -> DeliveryOutcome:
    """Return the outcome of a large delivery from the results of its pieces."""
    result = min(results, default="nothing", key=_STRONGEST_FIRST.index)
    return DeliveryOutcome(id=planned.claimed.id, state=DeliveryState.DONE, result=result)


def apply_reads(
    store: Store, changes: Sequence[Change], source: Source | None
) -> list[tuple[Record, Record]]:
    """Apply answers of Logto's API. Return each changed record, before and after.

    Without a `source`, no handlers run.
    """
    locked = lock_records(store, changes)
    records = _mark_unlisted(locked.records)
    for change in changes:
        records[change.key] = merge(records[change.key], change)
    written = _write(store, locked, records)
    enqueue_for_reads(store, written, source)
    return written.changed


def _write(store: Store, locked: LockedRecords, records: Records) -> WrittenRecords:
    before = dict(locked.records)
    for key in locked.few:
        if records[key].ended_at != before[key].ended_at:
            newest, _ = store.newest_membership(key)
            records[key] = merge(records[key], Named(key, newest))
    end_memberships(records)
    _announce(records, records)
    changed_heads = [key for key in locked.heads if records[key] is not before[key]]
    for key, record in store.read_unlocked(changed_heads).items():
        # Only evidence changes the end of a membership, and that changes no group.
        before[key], records[key] = record, replace(records[key], groups=record.groups)
    changed = [
        record for key, record in records.items() if record is not before[key] or not record.kept
    ]
    saved = store.save(changed)
    ended = [
        record
        for record in changed
        if record.key.kind != "membership" and record.ended_at != before[record.key].ended_at
    ]
    few = [record for record in ended if record.key in locked.few]
    removed = store.drop_memberships(few) if few else []
    many = [record for record in ended if record.key not in locked.few]
    written = [(before[record.key], record) for record in saved]
    ends = {
        key: (before[key], record) for key, record in records.items() if key.kind != "membership"
    }
    came = [key for key, (old, new) in ends.items() if not is_here(old) and is_here(new)]
    few_came = store.with_few_memberships(came, FEW) if came else []
    others = {
        k: r for k, r in store.lock_memberships(few_came, "known").items() if k not in records
    }
    members = [pair for pair in written if pair[0].key.kind == "membership"]
    members += announce(store, others, ends) if others else []
    many_came = [key for key in came if key not in few_came]
    return WrittenRecords(written, removed, members, many, many_came, ends)


def _announce(pairs: Records, ends: Records) -> None:
    """Note of each membership whether it is here: if it and both its ends are."""
    here = {key: is_here(end) for key, end in ends.items() if key.kind != "membership"}
    for key, record in pairs.items():
        if key.kind == "membership":
            announced = is_here(record) and all(here[end] for end in key.organization_and_user)
            if announced is not record.announced:
                pairs[key] = replace(record, announced=announced)


def announce(store: Store, pairs: Records, ends: Ends) -> list[tuple[Record, Record]]:
    """Announce locked memberships whose user or organization came; return those, before and after.
    `ends` gets their other ends. If another transaction adds the other end, the lock lets one of
    the two see both."""
    missing = {end for key in pairs for end in key.organization_and_user} - ends.keys()
    ends |= {key: (end, end) for key, end in store.read_heads(missing).items()}
    announced = dict(pairs)
    _announce(announced, {key: after for key, (_, after) in ends.items()})
    changed = [record for key, record in announced.items() if record is not pairs[key]]
    return [(pairs[record.key], record) for record in store.save(changed)]


def lock_records(store: Store, changes: Iterable[Change]) -> LockedRecords:
    """Lock the changed records: organizations, users, memberships, each kind sorted.

    Organizations that only gain members are locked for reading. If one itself changes, all are
    locked for writing, because two kinds of locks in one pass would have no order. Memberships of
    deleted records are locked, too, unless they are so many that they are ended later.
    """
    changes = list(changes)
    changed = {change.key for change in changes}
    deleted = sorted({change.key for change in changes if isinstance(change, Tombstone | Absent)})
    ends = {end for key in changed if key.kind == "membership" for end in key.organization_and_user}
    records: Records = {}
    few: Sequence[Key] = ()
    heads = ends - changed
    for kind in ("organization", "user", "membership"):
        keys = sorted(key for key in changed | ends if key.kind == kind)
        share = kind == "organization" and changed.isdisjoint(keys)
        if kind == "membership" and deleted:  # their ends are locked, so no more are added
            few = store.with_few_memberships(deleted, FEW)
        records |= store.lock(
            keys,
            share=share,
            ends=few if kind == "membership" else (),
            heads=heads.intersection(keys),
        )
    return LockedRecords(records, frozenset(few), frozenset(heads))


def mark_doubtful(store: Store, claimed: ClaimedDelivery) -> None:
    """Mark the record of a dead delivery as doubtful, because only a refetch can settle it."""
    kind, _, logto_id = (claimed.subject or "").partition(":")
    if kind not in ("user", "organization"):
        return
    key = Key("user" if kind == "user" else "organization", logto_id)
    needs = [DEAD_DELIVERY] if kind == "user" else [DEAD_DELIVERY, MEMBERS]
    record = store.lock([key])[key]
    at = max(claimed.occurred_at, claimed.received_at)  # either clock may be slow
    for need in needs:
        record = merge(record, RefetchRequest(key, need, at))
    store.save([record])


def _merge_one(records: Records, planned: PlannedDelivery) -> DeliveryOutcome:
    effects = []
    for change in planned.changes:
        before = records[change.key]
        records[change.key] = merge(before, change)
        effects.append(name_effect(before, change, records[change.key]))
    result = min(effects, default="nothing", key=_STRONGEST_FIRST.index)
    state = DeliveryState.DONE
    if isinstance(planned.event, TestPayload):
        state, result = DeliveryState.IGNORED, "test"
    elif isinstance(planned.event, UnknownEvent):
        result = "unknown"
    return DeliveryOutcome(id=planned.claimed.id, state=state, result=result)


_STRONGEST_FIRST = list(OUTCOMES)


def _mark_unlisted(locked: Records) -> Records:
    """Mark memberships that are unknown, or over, as absent from the organization's last full list
    of members. One that is present was read with that list."""
    records = dict(locked)
    for key, record in locked.items():
        if key.kind != "membership":
            continue
        present = record.groups.get("present")
        listed_at = locked[key.organization_and_user[0]].asked_for(MEMBERS)
        is_absent = present is None or not present.content
        if is_absent and listed_at > (NEVER if present is None else present.read_at):
            unlisted = ApiRead(key, {"present": False}, listed_at, listed_at)
            records[key] = merge(record, unlisted)
    return records


def _doubt_unlisted(store: Store, before: Records, records: Records) -> None:
    """Mark changed users and organizations as doubtful that the last comparison would have listed:
    it didn't know them, and Logto doesn't list what it has deleted."""
    unread = [
        record
        for key, record in records.items()
        if key.kind != "membership"
        and record is not before[key]
        and record.read_at is None
        and record.deleted_at is None
    ]
    compared = store.checkpoint(RECONCILE) if unread else None
    for record in unread:
        if compared is not None and NEVER < record.told_end <= compared.at:
            request = RefetchRequest(record.key, UNLISTED, record.told_end)
            records[record.key] = merge(record, request)


def end_memberships(records: Records) -> None:
    """End each membership that isn't newer than a deletion of its organization or user, as far as
    these are among the records.

    A newer one is evidence that these exist.
    """
    for key in [key for key in records if key.kind == "membership"]:
        for end in key.organization_and_user:
            ended_at = records[end].ended_at if end in records else NEVER
            if ended_at == NEVER:
                continue
            records[key] = merge(records[key], Tombstone(key, ended_at))
            records[end] = merge(records[end], Named(end, records[key].told_stamp))
