"""Merge the values of a record in any order, and decide whether one is in doubt.

A record is a user, an organization or a membership. Its values are kept in groups. Merging is
commutative, associative and idempotent, so a record depends only on the *set* of known values.

- The value with the greatest (stamp, digest) wins. If both are equal, the later start counts.
- Whether a record exists also depends only on maxima (`Record.deleted_at`): the newest deletion,
  the newest reads from Logto, and the greatest stamp of a value with the whole record. A late,
  older update doesn't restore a deleted record; a newer one does.
- A group is doubtful if a value that differs from the winner has an end at or after the winner's
  start less `GUARD_MS`. The two greatest ends of different digests are enough to decide this.
- A read from Logto's API beats every value with an end at or before the read, whenever that value
  arrives. Against later values, it competes like any other.

All times are on Logto's clock, in milliseconds since the epoch.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from logto_webhooks import canonical_json
from logto_webhooks.records.record import (
    ABSENT_UNTIL,
    NEVER,
    REFETCHED,
    ROLE,
    ROLES,
    Absent,
    ApiRead,
    Change,
    Contender,
    DeliveryChange,
    Group,
    Named,
    Record,
    RefetchRequest,
    Tombstone,
    Upsert,
    Value,
)


def merge(known: Record, change: Change) -> Record:
    """Return the record merged with `change`; `known` itself if nothing is new."""
    match change:
        case Tombstone():
            merged = replace(known, gone_at=max(known.gone_at, change.at))
        case Absent():
            merged = _apply_absent(known, change)
        case Named():
            merged = _note_evidence(known, change.at, change.at)
        case RefetchRequest():
            merged = _add_need(known, change)
        case ApiRead():
            merged = _apply_read(known, change)
        case Upsert():
            merged = _apply_upsert(known, change)
    return known if merged == known else merged


def merge_group(known: Group | None, value: Value) -> Group:
    """Merge a value into one group."""
    if known is not None and value.end <= known.read_at:
        return known
    digest = canonical_json.digest(value.content).hex()[:32]
    new = Group(
        content=value.content,
        digest=digest,
        stamp=value.stamp,
        start=value.start,
        end=value.end,
        ends=(Contender(value.end, digest),),
    )
    if known is None:
        return new
    ends = _keep_two_greatest(known.ends, new.ends[0])
    if (new.stamp, new.digest) == (known.stamp, known.digest):
        # A whole record and a part can have the same value and stamp.
        start, end = max(known.start, new.start), max(known.end, new.end)
        return replace(known, start=start, end=end, ends=ends)
    winner = max(known, new, key=lambda group: (group.stamp, group.digest))
    return replace(winner, ends=ends, read_at=known.read_at)


def read_group(known: Group | None, content: Any, at: int, end: int) -> Group:
    """Merge a value read from Logto's API: drop values with an end at or before `at`."""
    # One more than the stamp of any dropped value, so that the read wins.
    value = Value(content, stamp=at + 1, start=at, end=max(at + 1, end))
    if known is None or at <= known.read_at:
        merged = merge_group(known, value)
        return replace(merged, read_at=max(at, merged.read_at))
    ends = tuple(rival for rival in known.ends if rival.end > at)
    remembered = replace(known, ends=ends) if known.end > at else None
    merged = merge_group(remembered, value)
    if remembered is None:
        merged = replace(merged, ends=_keep_two_greatest(ends, merged.ends[0]))
    return replace(merged, read_at=at)


def _apply_upsert(known: Record, upsert: Upsert) -> Record:
    groups = {
        name: merge_group(known.groups.get(name), value) for name, value in upsert.values.items()
    }
    merged = replace(
        known, groups=known.groups | groups, facts=_keep_greatest(known.facts, upsert.facts)
    )
    # A token's claims have no time, so they don't prove that the record existed.
    dated = [value for value in upsert.values.values() if value.end]
    stamp = max((value.stamp for value in dated), default=NEVER)
    end = max((value.end for value in dated), default=NEVER)
    return _note_evidence(merged, stamp, end)


def _note_evidence(known: Record, stamp: int, end: int) -> Record:
    """Note evidence that the record existed."""
    if stamp <= known.told_stamp and end <= known.told_end:
        return known
    return replace(
        known, told_stamp=max(known.told_stamp, stamp), told_end=max(known.told_end, end)
    )


def _apply_absent(known: Record, absent: Absent) -> Record:
    """Note that Logto has no such record, and drop the needs from before the read."""
    needs = {need: at for need, at in known.needs.items() if at > absent.at}
    facts = _keep_greatest({ABSENT_UNTIL: absent.end}, known.facts)
    return replace(known, needs=needs, facts=facts, absent_at=max(known.absent_at, absent.at))


def _apply_read(known: Record, read: ApiRead) -> Record:
    unlisted = [name for name in known.groups if read.all_of and name.startswith(read.all_of)]
    groups = {
        name: read_group(_get_group(known, name), content, read.at, read.end)
        for name, content in (dict.fromkeys(unlisted) | read.contents).items()
    }
    met = {f"{REFETCHED}{need}": read.at for need in read.settles}
    facts = _keep_greatest(known.facts, read.facts | met)
    needs = {
        need: at for need, at in known.needs.items() if at > facts.get(f"{REFETCHED}{need}", NEVER)
    }
    settled = replace(known, groups=known.groups | groups, facts=facts, needs=needs)
    # A record in a list of members or of users with a role exists. Others may exist, too.
    is_listed = any(
        content and (name == "present" or name.startswith(ROLE))
        for name, content in read.contents.items()
    )
    return _note_evidence(settled, read.at + 1, read.at + 1) if is_listed else settled


def _get_group(known: Record, name: str) -> Group | None:
    """Return a group. For a role that was never seen, `roles` stands for it."""
    unnamed = known.groups.get(ROLES) if name.startswith(ROLE) else None
    return known.groups.get(name, unnamed)


def _add_need(known: Record, refetch: RefetchRequest) -> Record:
    known = _note_evidence(known, refetch.at, refetch.at)
    if refetch.at <= max(known.asked_for(refetch.why), known.absent_at):
        return known
    return replace(known, needs=_keep_greatest(known.needs, {refetch.why: refetch.at}))


def _keep_two_greatest(known: tuple[Contender, ...], new: Contender) -> tuple[Contender, ...]:
    others = [rival for rival in known if rival.digest != new.digest]
    same = [rival for rival in known if rival.digest == new.digest]
    return tuple(sorted([*others, max([new, *same])], reverse=True)[:2])


def _keep_greatest(known: dict[str, int], new: dict[str, int]) -> dict[str, int]:
    return known | {name: max(value, known.get(name, value)) for name, value in new.items()}


# Strongest first: a delivery that changes several records has the strongest of their outcomes.
OUTCOMES: Final = {
    "applied": "changed a record",
    "stale": "older than the known values",
    "asks": "says that something changed, but not what",
    "tombstoned": "about a deleted record, which stays deleted",
    "unchanged": "equal to the known values",
    "nothing": "an event that changes no record",
    "unknown": "an event that this release doesn't know",
    "test": "a test payload from Logto's console",
    "duplicate": "already in the inbox",
}


def name_effect(known: Record, change: DeliveryChange, merged: Record) -> str:
    """Return the outcome of a merge: applied, stale, tombstoned, unchanged or asks."""
    if known.deleted_at is not None:
        return "tombstoned" if merged.deleted_at is not None else "applied"
    if isinstance(change, RefetchRequest):
        return "asks"
    if merged.deleted_at is not None or merged.facts != known.facts:
        return "applied"
    if isinstance(change, Tombstone):
        return "unchanged"
    names = change.values
    if any(
        name not in known.groups or merged.groups[name].digest != known.groups[name].digest
        for name in names
    ):
        return "applied"
    lost = any(
        not canonical_json.is_equal(merged.groups[name].content, value.content)
        for name, value in names.items()
    )
    return "stale" if lost else "unchanged"
