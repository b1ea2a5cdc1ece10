"""What is known of a user, an organization or a membership, and what can be told of one.

Its value is kept in groups; `records/merge.py` says how they merge. All times are Logto's, in
milliseconds since the epoch.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from msgspec import Struct

GUARD_MS: Final = 10
RESTORED_MS: Final = 60_000  # how long after a deletion a whole must be made to prove a return
# Why Logto must be asked, beside doubt and incompleteness; the first is a doubt, too.
DEAD_DELIVERY: Final = "dead delivery"
MEMBERS: Final = "members"
UNKNOWN_CHANGE: Final = "unknown change"
RESTORED: Final = "restored"  # it is back: which memberships and roles it has now is unknown
EXISTENCE: Final = "existence"  # the doubt whether a user or an organization exists
WRONG_CLOCK: Final = "wrong clock"  # a delivery's date was corrected; a doubt, too
DOUBTS: Final = (DEAD_DELIVERY, WRONG_CLOCK)
# The group `own` tells all of its fields. A value that leaves some out tells each of the others as
# a group of its own, named with the prefix.
OWN_FIELD: Final = "own."
# A member's roles are a group. A user's are one each, named with the prefix; beside them stands
# what is known of any role that was never named.
ROLES: Final = "roles"
ROLE: Final = "role:"
NEVER: Final = -1
REFETCHED: Final = "met: "  # a fact: when Logto was last asked about such a need

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


class Contender(NamedTuple):
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
    ends: tuple[Contender, ...]
    read_at: int = NEVER  # nothing that ended by then counts

    @property
    def doubtful(self) -> bool:
        """Whether another value may be the newer one."""
        if len(self.ends) < 2 and self.ends[0].digest == self.digest:
            return False  # most often, and quickly told
        latest = self.start - GUARD_MS
        return any(end >= latest for end, digest in self.ends if digest != self.digest)

    @property
    def by_read(self) -> bool:
        """Whether the winner is what Logto's API answered."""
        return self.read_at != NEVER and self.stamp == self.read_at + 1

    @property
    def is_claimed(self) -> bool:
        """Whether all that is known are a token's claims, which are of no time."""
        return self.end == 0 and not self.by_read


class Record(Struct, frozen=True):
    """All that is known of one user, organization or membership.

    `facts` are numbers of which the greatest counts (`lastSignInAt`, `createdAt`, `updatedAt`);
    they are in no group and never doubtful.

    Whether a user or an organization exists follows from maxima, so that it needs no order:
    `gone_at` is the newest deletion, `absent_at` the newest read that found no such record,
    `found_at` the newest read that found it, `told_stamp` and `told_end` the greatest stamp and
    end of anything that was told of it. The `gone_at` of a membership is the greatest `ended_at`
    of its organization and its user.
    """

    key: Key
    groups: dict[str, Group] = {}
    facts: dict[str, int] = {}
    needs: Needs = {}
    gone_at: int = NEVER
    absent_at: int = NEVER
    told_stamp: int = NEVER
    told_end: int = NEVER
    local_id: str = ""  # given by the store when it first keeps the record

    @property
    def kept(self) -> bool:
        """Whether a store has it."""
        return bool(self.local_id)

    @property
    def found_at(self) -> int:
        """When Logto's API last answered with the record; NEVER if it didn't."""
        group = self.groups.get(self._main)
        return NEVER if group is None else group.read_at

    @property
    def read_at(self) -> int | None:
        """When Logto's API was last asked about it; None if never."""
        read_at = max(self.found_at, self.absent_at)
        return None if read_at == NEVER else read_at

    @property
    def deleted_at(self) -> int | None:
        """When the record was deleted; None while it exists, or may exist."""
        if self.gone_at == NEVER and self.absent_at == NEVER:
            return None  # most often, and quickly told
        if self.key.kind == "membership":
            return self.gone_at if self.stamp <= self.gone_at else None
        if self._deletion_counts:
            return self.gone_at if self.stamp <= self.gone_at + RESTORED_MS else None
        if self.absent_at > self.found_at and self.stamp <= self.absent_at:
            # The read confirms a deletion that came after the record was last found.
            return self.gone_at if self.gone_at > self.found_at else self.absent_at
        return None

    @property
    def ended_at(self) -> int:
        """When Logto last had no such record: memberships of before are over, also when the
        record is back. NEVER if it always existed."""
        return max(self.gone_at, self.absent_at)

    @property
    def is_restored(self) -> bool:
        """Whether it is back, and Logto wasn't asked since what belongs to it."""
        if self.ended_at == NEVER or self.key.kind == "membership" or self.deleted_at is not None:
            return False
        return self.ended_at > self.asked_for(RESTORED)

    @property
    def _deletion_counts(self) -> bool:
        """Whether the newest deletion came after Logto was last asked."""
        return self.gone_at > max(self.found_at, self.absent_at)

    @property
    def stamp(self) -> int:
        """The greatest stamp of what says that the record exists; of a membership, whether."""
        group = self.groups.get(self._main)
        stamp = NEVER if group is None else group.stamp
        parts = (part.stamp for name, part in self.groups.items() if name.startswith(OWN_FIELD))
        return max(stamp, *parts, NEVER)

    @property
    def _may_not_exist(self) -> bool:
        """Whether it exists although a deletion counts, or is gone although something later tells
        of it; of a membership, whether it was told of so soon after the deletion of an end that it
        may have been made before."""
        if self.ended_at == NEVER:
            return False
        if self.key.kind == "membership":
            present = self.groups.get("present")
            if present is None or not present.content or present.read_at >= self.gone_at:
                return False
            return self.gone_at < present.stamp <= self.gone_at + RESTORED_MS
        if self._deletion_counts:
            return self.deleted_at is None or self.told_stamp > self.gone_at
        return self.deleted_at is not None and self.told_end > self.absent_at

    def asked_for(self, need: str) -> int:
        """When Logto was last asked to meet such a need."""
        return self.facts.get(f"{REFETCHED}{need}", NEVER)

    @property
    def complete(self) -> bool:
        """Whether enough is known for a row."""
        return self._main in self.groups or any(name.startswith(OWN_FIELD) for name in self.groups)

    @property
    def own(self) -> dict[str, Any]:
        """The fields of `own`, each as the newest value that tells it."""
        whole = self.groups.get("own")
        fields: dict[str, Any] = {} if whole is None else whole.content
        newer = {
            name.removeprefix(OWN_FIELD): group.content
            for name, group in self.groups.items()
            if name.startswith(OWN_FIELD) and (whole is None or group.stamp > whole.stamp)
        }
        return fields | newer if newer else fields

    @property
    def _main(self) -> str:
        return "present" if self.key.kind == "membership" else "own"

    @property
    def roles_are_old(self) -> bool:
        """Whether a member's roles were told before the membership began: of an earlier one."""
        roles, present = self.groups.get(ROLES), self.groups.get("present")
        if roles is None or present is None or not present.content:
            return False
        return roles.end < present.start

    @property
    def doubts(self) -> list[str]:
        """What only Logto could tell: groups, and whether the record exists."""
        existence = [EXISTENCE] if self._may_not_exist else []
        if self.deleted_at is not None:
            # A deletion of a wrong date may have been undone since.
            wrong = self.key.kind != "membership" and WRONG_CLOCK in self.needs
            return existence + [WRONG_CLOCK] * wrong
        groups = [
            name
            for name, group in sorted(self.groups.items())
            if group.doubtful and not self._is_settled(name, group)
        ]
        return existence + groups + [need for need in DOUBTS if need in self.needs]

    def _is_settled(self, name: str, group: Group) -> bool:
        """Whether an answer with all of `own` came after all that was told of one of its fields."""
        return name.startswith(OWN_FIELD) and max(group.ends).end <= self.found_at

    @property
    def waiting_for(self) -> str | None:
        """Why Logto must be asked about this record; None when it needn't be."""
        doubts = self.doubts
        reasons = [f"doubtful: {', '.join(doubts)}"] if doubts else []
        if self.deleted_at is None:
            reasons += [] if self.complete else ["incomplete"]
            reasons += [ROLES] if self.roles_are_old else []
            reasons += [RESTORED] if self.is_restored else []
            reasons += [need for need in sorted(self.needs) if need not in DOUBTS]
        return "; ".join(reasons) or None


class Upsert(Struct, frozen=True):
    """Values and facts of a record."""

    key: Key
    values: dict[str, Value]
    facts: dict[str, int] = {}


class Tombstone(Struct, frozen=True):
    """Logto told that the record was deleted; or of a membership, that one of its ends was."""

    key: Key
    at: int


class Absent(Struct, frozen=True):
    """Logto's API answered that there is no such record. It was asked no earlier than `at`."""

    key: Key
    at: int


class ApiRead(Struct, frozen=True):
    """What Logto's API answered about a record.

    It was asked no earlier than `at`, and had answered by `end`, both on Logto's clock. `settles`
    are the needs that it meets. Where it lists a whole, `all_of` is how the names of the groups
    begin that it tells all of: those it doesn't name are none.
    """

    key: Key
    contents: dict[str, Any]
    at: int
    end: int
    facts: dict[str, int] = {}
    settles: tuple[str, ...] = ()
    all_of: str = ""


class Named(Struct, frozen=True):
    """A membership names the user or the organization: so it existed then."""

    key: Key
    at: int


class RefetchRequest(Struct, frozen=True):
    """Only Logto can tell more about the record."""

    key: Key
    why: str
    at: int


class Ending(Struct, frozen=True, kw_only=True):
    """A deleted user or organization whose memberships are ended step by step.

    Those that are no newer than `ended_at` (Logto's clock, ms) are over. `source` and
    `delivery_id` are what handlers get as the origin; without a `source` no handler runs.
    """

    key: Key
    ended_at: int
    source: str | None = None
    delivery_id: int | None = None


DeliveryChange = Upsert | Tombstone | RefetchRequest  # by a delivery
Change = DeliveryChange | ApiRead | Absent | Named
