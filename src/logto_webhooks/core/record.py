"""What is known of a user, an organization or a membership, and what can be told of one.

Its value is kept in groups; `core/merge.py` says how they merge. All times are Logto's, in
milliseconds since the epoch.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from msgspec import Struct

GUARD_MS: Final = 10
# Why Logto must be asked, beside doubt and incompleteness; the first is a doubt, too.
DEAD_DELIVERY: Final = "dead delivery"
MEMBERS: Final = "members"
UNKNOWN_CHANGE: Final = "unknown change"
# A member's roles are a group. A user's are one each, named with the prefix; beside them stands
# what is known of any role that was never named.
ROLES: Final = "roles"
ROLE: Final = "role:"
NEVER: Final = -1
MET: Final = "met: "  # a fact: when Logto was last asked about such a need

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
        group = self.groups.get(self._main)
        return None if group is None or group.read_at == NEVER else group.read_at

    def asked_for(self, need: str) -> int:
        """When Logto was last asked to meet such a need."""
        return self.facts.get(f"{MET}{need}", NEVER)

    @property
    def complete(self) -> bool:
        """Whether enough is known for a row."""
        return self._main in self.groups

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
        reasons += [ROLES] if self.roles_are_old else []
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


class Refetch(Struct, frozen=True):
    """Only Logto can tell more about the record."""

    key: Key
    why: str
    at: int


Told = Put | Drop | Refetch  # by a delivery
Change = Told | Read
