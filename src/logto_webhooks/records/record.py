"""Records: what is known about a user, an organization or a membership, and their changes.

Values are kept in groups, which `records/merge.py` merges. All times are on Logto's clock, in
milliseconds since the epoch.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from msgspec import Struct

GUARD_MS: Final = 10
RESTORED_MS: Final = 60_000  # a record seen more than this after its deletion was restored
# Two answers of Logto's API that are so far apart confirm that a record is gone.
CONFIRMED_MS: Final = 60_000
# Needs: why Logto must be asked, besides doubtful groups and missing values.
DEAD_DELIVERY: Final = "dead delivery"
MEMBERS: Final = "members"
UNKNOWN_CHANGE: Final = "unknown change"
RESTORED: Final = "restored"  # memberships and roles are unknown after the restore
EXISTENCE: Final = "existence"  # it is doubtful whether the record exists
WRONG_CLOCK: Final = "wrong clock"  # a delivery's date was corrected
UNLISTED: Final = "unlisted"  # it is older than a comparison in which Logto didn't list it
# The needs that also make the record doubtful.
DOUBTS: Final = (DEAD_DELIVERY, WRONG_CLOCK, UNLISTED)
# The group `own` has all of its fields. If a value lacks some, each field that it has becomes a
# separate group, named with this prefix.
OWN_FIELD: Final = "own."
# A member's roles are one group. Each of a user's roles is a group, named with the prefix; the
# group `roles` of a user stands for all roles that were never seen.
ROLES: Final = "roles"
ROLE: Final = "role:"
NEVER: Final = -1
# A user's groups besides `own`. Logto sends all of them with the whole user.
USER_PARTS: Final = ("suspension", "custom_data", "profile")
ABSENT_UNTIL: Final = "absent until"  # a fact: by when Logto last answered that there is none
REFETCHED: Final = "met: "  # prefix of a fact: when Logto was last asked because of the need

Kind = Literal["user", "organization", "membership"]
Needs = dict[str, int]  # why Logto must be asked -> since when


class Key(NamedTuple):
    """Identifies a record. A membership's `id` is `organization:user`. Locks sort by keys."""

    kind: Kind
    id: str

    @property
    def organization_and_user(self) -> tuple[Key, Key]:
        """The organization and the user of a membership."""
        organization, _, user = self.id.partition(":")
        return Key("organization", organization), Key("user", user)

    @property
    def ends(self) -> tuple[Key, ...]:
        """The organization and the user of a membership; of a user or an organization, itself."""
        return self.organization_and_user if self.kind == "membership" else (self,)


def membership(organization_id: str, user_id: str) -> Key:
    """Make the key of a membership."""
    return Key("membership", f"{organization_id}:{user_id}")


class Value(Struct, frozen=True):
    """One group's content from one delivery.

    Values are ordered by `stamp`, which is at most `end`, when Logto sent it. The change was made
    at `start` or later.
    """

    content: Any
    stamp: int
    start: int
    end: int


class Contender(NamedTuple):
    """The greatest `end` of the values with this digest."""

    end: int
    digest: str


class Group(Struct, frozen=True):
    """The winning value of one group, and the two greatest ends of different digests."""

    content: Any
    digest: str
    stamp: int
    start: int
    end: int
    ends: tuple[Contender, ...]
    read_at: int = NEVER  # values with an end at or before it don't count

    @property
    def doubtful(self) -> bool:
        """Whether another value may be the newer one."""
        if len(self.ends) < 2 and self.ends[0].digest == self.digest:
            return False  # the usual case, fast
        threshold = self.start - GUARD_MS
        return any(end >= threshold for end, digest in self.ends if digest != self.digest)

    @property
    def by_read(self) -> bool:
        """Whether the winner was read from Logto's API."""
        return self.read_at != NEVER and self.stamp == self.read_at + 1

    @property
    def is_claimed(self) -> bool:
        """Whether only a token's claims are known, which have no time."""
        return self.end == 0 and not self.by_read


class Record(Struct, frozen=True):
    """All that is known about one user, organization or membership.

    `facts` are numbers (`lastSignInAt`, `createdAt`, `updatedAt`). The greatest value counts. They
    are in no group and never doubtful.

    Whether a user or an organization exists depends only on maxima, not on the order of changes:
    `gone_at` is the newest deletion, `absent_at` the newest read without the record, `found_at` the
    newest read with it. `told_stamp` and `told_end` are the greatest stamp and end of any evidence
    of it. The `gone_at` of a membership is the greater `ended_at` of its organization and its user.
    """

    key: Key
    groups: dict[str, Group] = {}
    facts: dict[str, int] = {}
    needs: Needs = {}
    gone_at: int = NEVER
    absent_at: int = NEVER
    told_stamp: int = NEVER
    told_end: int = NEVER
    announced: bool = False  # of a membership: whether its last local event was LocalMemberAdded
    local_id: str = ""  # set when the record is first stored

    @property
    def kept(self) -> bool:
        """Whether the record is stored."""
        return bool(self.local_id)

    @property
    def found_at(self) -> int:
        """When Logto's API last returned the record; NEVER if it didn't."""
        group = self.groups.get(self._main)
        return NEVER if group is None else group.read_at

    @property
    def read_at(self) -> int | None:
        """When the record was last read from Logto's API; None if never."""
        read_at = max(self.found_at, self.absent_at)
        return None if read_at == NEVER else read_at

    @property
    def deleted_at(self) -> int | None:
        """When the record was deleted; None while it exists, or may exist."""
        if self.gone_at == NEVER and self.absent_at == NEVER:
            return None  # the usual case, fast
        if self.key.kind == "membership":
            return self.gone_at if self.stamp <= self.gone_at else None
        if self._deletion_counts:
            return self.gone_at if self.stamp <= self.gone_at + RESTORED_MS else None
        if self.absent_at > self.found_at and self.stamp <= self.absent_at:
            # The read confirms a deletion since the record was last found.
            return self.gone_at if self.gone_at > self.found_at else self.absent_at
        return None

    @property
    def ended_at(self) -> int:
        """When the record last didn't exist: older memberships are over, even if it was restored.
        NEVER if it always existed."""
        return max(self.gone_at, self.absent_at)

    @property
    def is_restored(self) -> bool:
        """Whether it was restored, and its memberships and roles weren't read since."""
        if self.ended_at == NEVER or self.key.kind == "membership" or self.deleted_at is not None:
            return False
        return self.ended_at > self.asked_for(RESTORED)

    def is_told_since(self, end: Record) -> bool:
        """Of a membership: whether what is known of it is newer than the deletion of `end`: its
        user or organization, which was restored. Until then, a read didn't list the membership."""
        present = self.groups.get("present")
        if present is None:
            return False
        if present.content:
            return present.stamp > end.ended_at
        return present.stamp >= end.stamp if present.by_read else present.start > end.ended_at

    @property
    def absent_until(self) -> int:
        """By when Logto's API last answered that there is no such record; NEVER if it didn't."""
        return self.facts.get(ABSENT_UNTIL, NEVER)

    @property
    def _deletion_counts(self) -> bool:
        """Whether the newest deletion is newer than the last read."""
        return self.gone_at > max(self.found_at, self.absent_at)

    @property
    def stamp(self) -> int:
        """The greatest stamp of a value that shows the record; of a membership, of `present`."""
        group = self.groups.get(self._main)
        stamp = NEVER if group is None else group.stamp
        parts = (part.stamp for name, part in self.groups.items() if name.startswith(OWN_FIELD))
        return max(stamp, *parts, NEVER)

    @property
    def _existence_is_doubtful(self) -> bool:
        """Whether it is doubtful that the record exists: it exists although a deletion counts, or
        although Logto may have answered later that there is none; or it is deleted although there
        is later evidence. A membership is doubtful if its value is so soon after its user or
        organization was deleted that it may have been made before."""
        if self.ended_at == NEVER:
            return False
        if self.key.kind == "membership":
            present = self.groups.get("present")
            if present is None or not present.content or present.read_at >= self.gone_at:
                return False
            return self.gone_at < present.stamp <= self.gone_at + RESTORED_MS
        if self._deletion_counts:
            return self.deleted_at is None or self.told_stamp > self.gone_at
        if self.deleted_at is None:
            return max(self.found_at, self.stamp) <= self.absent_until
        return self.told_end > self.absent_at

    def asked_for(self, need: str) -> int:
        """When Logto was last asked because of a need."""
        return self.facts.get(f"{REFETCHED}{need}", NEVER)

    @property
    def complete(self) -> bool:
        """Whether enough is known for a row."""
        return self._main in self.groups or any(name.startswith(OWN_FIELD) for name in self.groups)

    @property
    def is_in_part(self) -> bool:
        """Of a user or an organization: whether Logto hasn't sent all of it yet. The rest is
        unknown, or known only from a token's claims."""
        own = self.groups.get("own")
        if own is None or own.is_claimed:
            return True
        if self.key.kind != "user" or UNKNOWN_CHANGE not in self.needs:
            return False
        return any(name not in self.groups for name in USER_PARTS)

    @property
    def own(self) -> dict[str, Any]:
        """The fields of `own`, each with its newest value."""
        whole = self.groups.get("own")
        fields: dict[str, Any] = {} if whole is None else whole.content
        newer = {
            name.removeprefix(OWN_FIELD): group.content
            for name, group in self.groups.items()
            if name.startswith(OWN_FIELD) and (whole is None or group.stamp > whole.stamp)
        }
        return fields | newer if newer else fields

    @property
    def _is_completed_by_claims(self) -> bool:
        """Whether a token's claims stand for what Logto has sent only in part."""
        own = self.groups.get("own")
        return own is not None and own.is_claimed and self.told_stamp > own.stamp

    @property
    def _main(self) -> str:
        return "present" if self.key.kind == "membership" else "own"

    @property
    def roles_are_old(self) -> bool:
        """Whether a member's roles are from before the membership, so from an earlier one."""
        roles, present = self.groups.get(ROLES), self.groups.get("present")
        if roles is None or present is None or not present.content:
            return False
        return roles.end < present.start

    @property
    def doubts(self) -> list[str]:
        """The doubtful groups, `existence` if that is doubtful, and the needs that are doubts."""
        existence = [EXISTENCE] if self._existence_is_doubtful else []
        if self.deleted_at is not None:
            # A deletion with a wrong date may have been undone since.
            wrong = self.key.kind != "membership" and WRONG_CLOCK in self.needs
            return existence + [WRONG_CLOCK] * wrong
        groups = [
            name
            for name, group in sorted(self.groups.items())
            if group.doubtful and not self._is_settled(name, group)
        ]
        return existence + groups + [need for need in DOUBTS if need in self.needs]

    def _is_settled(self, name: str, group: Group) -> bool:
        """Whether a read of all of `own` is newer than all values of one of its fields."""
        return name.startswith(OWN_FIELD) and max(group.ends).end <= self.found_at

    @property
    def waiting_for(self) -> str | None:
        """Why Logto must be asked about this record; None if it needn't be."""
        doubts = self.doubts
        reasons = [f"doubtful: {', '.join(doubts)}"] if doubts else []
        if self.deleted_at is None:
            reasons += [] if self.complete and not self._is_completed_by_claims else ["incomplete"]
            reasons += [ROLES] if self.roles_are_old else []
            reasons += [RESTORED] if self.is_restored else []
            reasons += [need for need in sorted(self.needs) if need not in DOUBTS]
        return "; ".join(reasons) or None


class Upsert(Struct, frozen=True):
    """New values and facts of a record."""

    key: Key
    values: dict[str, Value]
    facts: dict[str, int] = {}


class Tombstone(Struct, frozen=True):
    """The record was deleted; for a membership, its user or its organization was."""

    key: Key
    at: int


class Absent(Struct, frozen=True):
    """Logto's API has no such record. It was asked at `at` or later, and answered by `end`."""

    key: Key
    at: int
    end: int


class ApiRead(Struct, frozen=True):
    """What Logto's API returned about a record.

    It was asked at `at` or later, and had answered by `end`. `settles` are the needs that it meets.
    If the answer is a complete list, `all_of` is the prefix of its groups: groups with the prefix
    that aren't in `contents` become null.
    """

    key: Key
    contents: dict[str, Any]
    at: int
    end: int
    facts: dict[str, int] = {}
    settles: tuple[str, ...] = ()
    all_of: str = ""


class Named(Struct, frozen=True):
    """A membership names the user or the organization, so it existed then."""

    key: Key
    at: int


class RefetchRequest(Struct, frozen=True):
    """The record must be read from Logto."""

    key: Key
    why: str
    at: int


class Ending(Struct, frozen=True, kw_only=True):
    """A deleted user or organization whose memberships are ended in several steps.

    Memberships that aren't newer than `ended_at` (Logto's clock, ms) are over. Handlers get
    `source` and `delivery_id` as the origin; without a `source`, no handler runs.
    """

    key: Key
    ended_at: int
    source: str | None = None
    delivery_id: int | None = None


class Arrival(Struct, frozen=True, kw_only=True):
    """A user or an organization that came, whose memberships are announced in several steps."""

    key: Key
    noted_at: int
    source: str | None = None
    delivery_id: int | None = None


DeliveryChange = Upsert | Tombstone | RefetchRequest
Change = DeliveryChange | ApiRead | Absent | Named
