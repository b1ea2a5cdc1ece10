"""Keys and what no key signed, in memory: the same answers as the SQL store's."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.core.keys import (
    BOUNDS,
    OVERLAP_MS,
    Bounds,
    HookKey,
    Stranger,
    fingerprint,
    is_key,
)
from logto_webhooks.core.ports import Clock


class KeyTables(Struct):
    """All that is held of keys."""

    learnt: dict[str, HookKey] = {}
    used: dict[str, int] = {}
    strangers: dict[int, Stranger] = {}
    made: int = 0

    def copy(self) -> KeyTables:
        """Copy the tables; rows are frozen."""
        return KeyTables(dict(self.learnt), dict(self.used), dict(self.strangers), self.made)


class MemoryKeys:
    """The Keys of a MemoryStore."""

    def __init__(self, tables: KeyTables, clock: Clock) -> None:
        self._tables = tables
        self._clock = clock

    def learnt(self) -> list[HookKey]:
        """The keys that Logto told."""
        learnt = [each for each in self._tables.learnt.values() if is_key(each.key)]
        return sorted(learnt, key=lambda each: each.learnt_at)

    def learn(self, new: Sequence[HookKey]) -> None:
        """Keep keys; the others of the same hooks end after the overlap, unless they do before.
        What can't be a key isn't kept."""
        for each in filter(lambda told: is_key(told.key), new):
            for known, other in self._tables.learnt.items():
                if other.hook == each.hook and other.key != each.key and other.until is None:
                    ends = each.learnt_at + OVERLAP_MS
                    self._tables.learnt[known] = replace(other, until=ends)
            self._tables.learnt[fingerprint(each.key)] = each

    def used(self, marks: dict[str, int]) -> dict[str, int]:
        """Note when keys were last used (ms), by their fingerprints; return that of all."""
        self._tables.used |= marks
        return dict(self._tables.used)

    def set_aside(self, strangers: Sequence[Stranger]) -> None:
        """Keep requests, and of all that are kept what is within the bounds."""
        for each in strangers:
            self._tables.made += 1
            self._tables.strangers[self._tables.made] = replace(each, id=self._tables.made)
        for known, bounds in BOUNDS.items():
            self._prune(known, bounds)

    def strangers(self, after: int, limit: int) -> list[Stranger]:
        """List what is set aside, the oldest first."""
        return [each for id, each in sorted(self._tables.strangers.items()) if id > after][:limit]

    def release(self, ids: Sequence[int]) -> None:
        """Forget what was set aside."""
        for each in ids:
            self._tables.strangers.pop(each, None)

    def aside(self, since: int = 0, *, known: bool = False) -> int:
        """Count what is set aside, received after a moment (ms); of `known` hooks, or of any."""
        later = (each for each in self._tables.strangers.values() if each.received_at > since)
        return sum(each.known or not known for each in later)

    def _prune(self, known: bool, bounds: Bounds) -> None:
        total = place = 0
        oldest = self._clock.now() - bounds.age_ms
        for each in sorted(self._tables.strangers.values(), key=lambda each: -each.id):
            if each.known is not known:
                continue
            place, total = place + 1, total + len(each.body)
            if place > bounds.rows or total > bounds.bytes or each.received_at < oldest:
                del self._tables.strangers[each.id]
