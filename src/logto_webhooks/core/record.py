"""The order-free rule: how values of a record merge, and when one is in doubt.

Nothing here asks in which order deliveries came. A record is a user, an organization or a
membership; its value is kept in groups. Merging is commutative, associative and idempotent, so
a record follows from the *set* of what is known about it.

- The greatest (stamp, digest) wins; where both are equal, the later start counts.
- Deletion is final: a tombstone outlives every late update.
- A group is doubtful while a value that differs from the winner ended no earlier than the
  winner's start, less `GUARD_MS`. The two greatest ends of distinct digests are enough to tell.
- What Logto's API answers beats every value that had ended when it was asked, whenever that
  arrives; with a later one it competes as any other value.

All times are Logto's, in milliseconds since the epoch.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.core import canonical

GUARD_MS: Final = 10
# Why Logto must be asked, beside doubt and incompleteness; the first is a doubt, too.
DEAD_DELIVERY: Final = "dead delivery"
MEMBERS: Final = "members"
UNKNOWN_CHANGE: Final = "unknown change"
NEVER: Final = -1
_MET: Final = "met: "  # a fact: when Logto was last asked about such a need

Kind = Literal["user", "organization", "membership"]
Needs = dict[str, int]  # why Logto must be asked -> when that arose


class Key(NamedTuple):
    """What a record is about; a membership's `id` is `organization:user`. Locks sort by it."""

    kind: Kind
    id: str

    @property
    def organization_and_user(self) -> tuple[Key, Key]:
        """The two ends of a membership."""
        organization, _, user = self.id.partition(":")
        return Key("organization", organization), Key("user", user)


def membership(organization_id: str, user_id: str) -> Key:
    """The key of one user's membership in one organization."""
    return Key("membership", f"{organization_id}:{user_id}")


class Value(Struct, frozen=True):
    """One group's content as one delivery tells it.

    `stamp` orders values and is never after `end`, which is when Logto sent it; `start` is the
    earliest moment at which the change can have been made.
    """

    content: Any
    stamp: int
    start: int
    end: int


class Rival(NamedTuple):
    """The latest `end` at which a content with this digest was told."""

    end: int
    digest: str


class Group(Struct, frozen=True):
    """The winner of one group, and the two greatest ends of distinct digests."""

    content: Any
    digest: str
    stamp: int
    start: int
    end: int
    ends: tuple[Rival, ...]
    read_at: int = NEVER  # nothing that ended by then counts

    @property
    def doubtful(self) -> bool:
        """Whether another value may be the newer one."""
        latest = self.start - GUARD_MS
        return any(end >= latest for end, digest in self.ends if digest != self.digest)


class Record(Struct, frozen=True):
    """All that is known of one user, organization or membership.

    `facts` are numbers of which the greatest counts (`lastSignInAt`, `createdAt`, `updatedAt`);
    they are in no group and never doubtful.
    """

    key: Key
    groups: dict[str, Group] = {}
    facts: dict[str, int] = {}
    needs: Needs = {}
    deleted_at: int | None = None
    local_id: str = ""  # given by the store when it first keeps the record

    @property
    def kept(self) -> bool:
        """Whether a store has it."""
        return bool(self.local_id)

    @property
    def read_at(self) -> int | None:
        """When Logto's API was last asked about it; None if never."""
        newest = max((group.read_at for group in self.groups.values()), default=NEVER)
        return None if newest == NEVER else newest

    def asked_for(self, need: str) -> int:
        """When Logto was last asked to meet such a need."""
        return self.facts.get(f"{_MET}{need}", NEVER)

    @property
    def complete(self) -> bool:
        """Whether enough is known for a row."""
        return ("present" if self.key.kind == "membership" else "own") in self.groups

    @property
    def doubts(self) -> list[str]:
        """The groups whose value only Logto could tell; none once the record is deleted."""
        if self.deleted_at is not None:
            return []
        dead = [DEAD_DELIVERY] if DEAD_DELIVERY in self.needs else []
        return [name for name, group in sorted(self.groups.items()) if group.doubtful] + dead

    @property
    def waiting_for(self) -> str | None:
        """Why Logto must be asked about this record; None when it needn't be."""
        if self.deleted_at is not None:
            return None
        doubts = self.doubts
        reasons = [f"doubtful: {', '.join(doubts)}"] if doubts else []
        reasons += [] if self.complete else ["incomplete"]
        reasons += [need for need in sorted(self.needs) if need != DEAD_DELIVERY]
        return "; ".join(reasons) or None


class Put(Struct, frozen=True):
    """Values and facts of a record."""

    key: Key
    values: dict[str, Value]
    facts: dict[str, int] = {}


class Drop(Struct, frozen=True):
    """The record was deleted in Logto."""

    key: Key
    at: int


class Read(Struct, frozen=True):
    """What Logto's API answered about a record.

    It was asked no earlier than `at`, and had answered by `end`, both on Logto's clock. `settles`
    are the needs that it meets.
    """

    key: Key
    contents: dict[str, Any]
    at: int
    end: int
    facts: dict[str, int] = {}
    settles: tuple[str, ...] = ()


class Refetch(Struct, frozen=True):
    """Only Logto can tell more about the record."""

    key: Key
    why: str
    at: int


Told = Put | Drop | Refetch  # by a delivery
Change = Told | Read


def merge(known: Record, change: Change) -> Record:
    """Return what is known once `change` is known too; `known` itself if nothing is new."""
    if isinstance(change, Drop):
        deleted_at = change.at if known.deleted_at is None else min(change.at, known.deleted_at)
        merged = replace(known, deleted_at=deleted_at)
    elif isinstance(change, Refetch):
        merged = _need(known, change)
    elif isinstance(change, Read):
        merged = _settle(known, change)
    else:
        groups = {
            name: merge_group(known.groups.get(name), value)
            for name, value in change.values.items()
        }
        facts = _greatest(known.facts, change.facts)
        merged = replace(known, groups=known.groups | groups, facts=facts)
    return known if merged == known else merged


def merge_group(known: Group | None, value: Value) -> Group:
    """The rule itself, for one group."""
    if known is not None and value.end <= known.read_at:
        return known
    digest = canonical.digest(value.content).hex()[:32]
    new = Group(
        content=value.content,
        digest=digest,
        stamp=value.stamp,
        start=value.start,
        end=value.end,
        ends=(Rival(value.end, digest),),
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


def _settle(known: Record, read: Read) -> Record:
    groups = {
        name: read_group(known.groups.get(name), content, read.at, read.end)
        for name, content in read.contents.items()
    }
    met = {f"{_MET}{need}": read.at for need in read.settles}
    facts = _greatest(known.facts, read.facts | met)
    needs = {need: at for need, at in known.needs.items() if at > facts.get(f"{_MET}{need}", NEVER)}
    return replace(known, groups=known.groups | groups, facts=facts, needs=needs)


def _need(known: Record, refetch: Refetch) -> Record:
    if refetch.at <= known.asked_for(refetch.why):
        return known
    return replace(known, needs=_greatest(known.needs, {refetch.why: refetch.at}))


def _two_greatest(known: tuple[Rival, ...], new: Rival) -> tuple[Rival, ...]:
    others = [rival for rival in known if rival.digest != new.digest]
    same = [rival for rival in known if rival.digest == new.digest]
    return tuple(sorted([*others, max([new, *same])], reverse=True)[:2])


def _greatest(known: dict[str, int], new: dict[str, int]) -> dict[str, int]:
    return known | {name: max(value, known.get(name, value)) for name, value in new.items()}
