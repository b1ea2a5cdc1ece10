"""The order-free rule: how values of a record merge, and when one is in doubt.

Nothing here asks in which order deliveries came. A record is a user, an organization or a
membership; its value is kept in groups. Merging is commutative, associative and idempotent, so
a record follows from the *set* of what is known about it.

- The greatest (stamp, digest) wins; where both are equal, the later start counts.
- Whether a record exists follows from maxima, too (`Record.deleted_at`): the newest deletion, the
  newest answers of Logto's, and the greatest stamp of what shows the whole record. A late, older
  update revives nobody; what Logto shows again comes back.
- A group is doubtful while a value that differs from the winner ended no earlier than the
  winner's start, less `GUARD_MS`. The two greatest ends of distinct digests are enough to tell.
- What Logto's API answers beats every value that had ended when it was asked, whenever that
  arrives; with a later one it competes as any other value.

All times are Logto's, in milliseconds since the epoch.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from logto_webhooks import canonical_json
from logto_webhooks.records.record import (
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
    """Return what is known once `change` is known too; `known` itself if nothing is new."""
    match change:
        case Tombstone():
            merged = replace(known, gone_at=max(known.gone_at, change.at))
        case Absent():
            merged = _find_absent(known, change)
        case Named():
            merged = _tell(known, change.at, change.at)
        case RefetchRequest():
            merged = _need(known, change)
        case ApiRead():
            merged = _settle(known, change)
        case Upsert():
            merged = _upsert(known, change)
    return known if merged == known else merged


def merge_group(known: Group | None, value: Value) -> Group:
    """The rule itself, for one group."""
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
    ends = _two_greatest(known.ends, new.ends[0])
    if (new.stamp, new.digest) == (known.stamp, known.digest):
        # A whole and a part can carry the same value and stamp.
        start, end = max(known.start, new.start), max(known.end, new.end)
        return replace(known, start=start, end=end, ends=ends)
    winner = max(known, new, key=lambda group: (group.stamp, group.digest))
    return replace(winner, ends=ends, read_at=known.read_at)


def read_group(known: Group | None, content: Any, at: int, end: int) -> Group:
    """The same for an answer of Logto's: forget what had ended by then, and compete."""
    # Greater than the stamp of all that is forgotten: so nothing else of that can matter.
    value = Value(content, stamp=at + 1, start=at, end=max(at + 1, end))
    if known is None or at <= known.read_at:
        merged = merge_group(known, value)
        return replace(merged, read_at=max(at, merged.read_at))
    ends = tuple(rival for rival in known.ends if rival.end > at)
    remembered = replace(known, ends=ends) if known.end > at else None
    merged = merge_group(remembered, value)
    if remembered is None:
        merged = replace(merged, ends=_two_greatest(ends, merged.ends[0]))
    return replace(merged, read_at=at)


def _upsert(known: Record, upsert: Upsert) -> Record:
    groups = {
        name: merge_group(known.groups.get(name), value) for name, value in upsert.values.items()
    }
    merged = replace(
        known, groups=known.groups | groups, facts=_greatest(known.facts, upsert.facts)
    )
    # Claims of a token are of no time, and so no evidence.
    dated = [value for value in upsert.values.values() if value.end]
    stamp = max((value.stamp for value in dated), default=NEVER)
    end = max((value.end for value in dated), default=NEVER)
    return _tell(merged, stamp, end)


def _tell(known: Record, stamp: int, end: int) -> Record:
    """Note that something was told of the record: evidence that it existed then."""
    if stamp <= known.told_stamp and end <= known.told_end:
        return known
    return replace(
        known, told_stamp=max(known.told_stamp, stamp), told_end=max(known.told_end, end)
    )


def _find_absent(known: Record, absent: Absent) -> Record:
    """Logto has no such record: what was needed of it by then isn't needed."""
    needs = {need: at for need, at in known.needs.items() if at > absent.at}
    return replace(known, needs=needs, absent_at=max(known.absent_at, absent.at))


def _settle(known: Record, read: ApiRead) -> Record:
    untold = [name for name in known.groups if read.all_of and name.startswith(read.all_of)]
    groups = {
        name: read_group(_known(known, name), content, read.at, read.end)
        for name, content in (dict.fromkeys(untold) | read.contents).items()
    }
    met = {f"{REFETCHED}{need}": read.at for need in read.settles}
    facts = _greatest(known.facts, read.facts | met)
    needs = {
        need: at for need, at in known.needs.items() if at > facts.get(f"{REFETCHED}{need}", NEVER)
    }
    settled = replace(known, groups=known.groups | groups, facts=facts, needs=needs)
    # A list that has it: of members, or of those who have a role. A list without it tells nothing.
    is_listed = any(
        content and (name == "present" or name.startswith(ROLE))
        for name, content in read.contents.items()
    )
    return _tell(settled, read.at + 1, read.at + 1) if is_listed else settled


def _known(known: Record, name: str) -> Group | None:
    """What is known of a group: of a role that was never named, that no whole list had it."""
    unnamed = known.groups.get(ROLES) if name.startswith(ROLE) else None
    return known.groups.get(name, unnamed)


def _need(known: Record, refetch: RefetchRequest) -> Record:
    known = _tell(known, refetch.at, refetch.at)
    if refetch.at <= max(known.asked_for(refetch.why), known.absent_at):
        return known
    return replace(known, needs=_greatest(known.needs, {refetch.why: refetch.at}))


def _two_greatest(known: tuple[Contender, ...], new: Contender) -> tuple[Contender, ...]:
    others = [rival for rival in known if rival.digest != new.digest]
    same = [rival for rival in known if rival.digest == new.digest]
    return tuple(sorted([*others, max([new, *same])], reverse=True)[:2])


def _greatest(known: dict[str, int], new: dict[str, int]) -> dict[str, int]:
    return known | {name: max(value, known.get(name, value)) for name, value in new.items()}


# The strongest first: a delivery that changes several records has the strongest of their words.
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
    """Say in a word what merging did: applied, stale, tombstoned, unchanged or asks."""
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
    lost = any(merged.groups[name].content != value.content for name, value in names.items())
    return "stale" if lost else "unchanged"
