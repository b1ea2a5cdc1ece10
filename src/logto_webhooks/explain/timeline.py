"""Build the timeline of a user or an organization: what each delivery and API response did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.deliveries import Origin, StoredDelivery
from logto_webhooks.records.merge import merge
from logto_webhooks.records.outcome import OUTCOMES, name_effect
from logto_webhooks.records.projection import column_label, columns_for, fact_columns
from logto_webhooks.records.record import (
    NEVER,
    Absent,
    ApiRead,
    Contender,
    DeliveryChange,
    Group,
    Key,
    Record,
    Tombstone,
    Upsert,
)
from logto_webhooks.states import DeliveryState

SETTLED: Final = "settled"
ASKED: Final = "asked Logto"
_STRONGEST_FIRST: Final = list(OUTCOMES)
_ABSENT: Final = "absent"  # in the place of a group: Logto had no such record
_Names = tuple[str, ...]
_Records = dict[Key, Record]


class TimelineEntry(Struct, frozen=True, kw_only=True):
    """What a delivery did, or an answer, which has no id; times in milliseconds.

    `set` and `stale` are columns: those that it gave another value, and those that have another
    than it told. `settled` and `doubtful` are groups: after it in doubt no longer, or in doubt.
    """

    id: int | None = None
    occurred_at: int
    received_at: int | None = None
    origin: Origin | Literal["read"]
    event: str
    call: str = ""
    outcome: str
    set: _Names = ()
    stale: _Names = ()
    settled: _Names = ()
    doubtful: _Names = ()

    @property
    def told(self) -> _Names:
        """All columns and groups about which it said something."""
        return (*self.set, *self.stale, *self.settled)


class Timeline:
    """The subject's record and its memberships', merged once more; `lines` tell of each step."""

    def __init__(self, subject: Key, known: Mapping[Key, Record]) -> None:
        self.lines: list[TimelineEntry] = []
        self._subject = subject
        self._known = known
        self._records: _Records = {subject: Record(subject)}
        self._answers = _answers(known)

    def take(self, kept: StoredDelivery, changes: Sequence[DeliveryChange]) -> None:
        """Merge what a delivery told; before that, what Logto had answered by then."""
        while self._answers and self._answers[0][0] < kept.received_at:
            self._answer(*self._answers.pop(0))
        before = self._touched(changes)
        effects = [self._merge(change) for change in changes]
        self._bury()
        line = TimelineEntry(
            id=kept.id,
            occurred_at=kept.occurred_at,
            received_at=kept.received_at,
            origin=kept.origin,
            event=kept.event,
            call=kept.call,
            outcome=_outcome(kept, effects),
        )
        self.lines.append(self._compared(line, before, changes))

    def end(self) -> None:
        """Tell what Logto answered after the last delivery; also which records are gone, and which
        memberships over, though nothing that is left here tells why."""
        for at, groups in self._answers:
            self._answer(at, groups)
        ended: dict[int, _Records] = {}
        for key, now in self._known.items():
            if now.deleted_at is not None and self._of(key).deleted_at is None:
                ended.setdefault(now.deleted_at, {})[key] = self._of(key)
        for at, before in sorted(ended.items()):
            for key, old in before.items():
                self._records[key] = merge(old, Tombstone(key, at))
            line = TimelineEntry(occurred_at=at, origin="read", event=ASKED, outcome=SETTLED)
            self.lines.append(self._compared(line, before, ()))

    def _merge(self, change: DeliveryChange) -> str:
        old = self._of(change.key)
        self._records[change.key] = new = merge(old, change)
        return name_effect(old, change, new)

    def _answer(self, at: int, groups: Sequence[tuple[Key, str]]) -> None:
        is_gone = (self._subject, _ABSENT) in groups
        before = dict(self._records) if is_gone else {key: self._of(key) for key, _ in groups}
        for key, name in groups:
            self._records[key] = _answered(self._of(key), name, self._known[key])
        self._bury()
        line = TimelineEntry(occurred_at=at, origin="read", event=ASKED, outcome=SETTLED)
        line = self._compared(line, before, ())
        groups = [each for each in groups if each[1] != _ABSENT]
        asked = dict.fromkeys(column_label(key, name, self._subject) for key, name in groups)
        settled = tuple(each for each in asked if each not in line.doubtful)
        self.lines.append(replace(line, settled=settled))

    def _touched(self, changes: Sequence[DeliveryChange]) -> _Records:
        """The records that may change, as they are: by the deletion of an end all."""
        if any(isinstance(change, Tombstone) for change in changes):
            return dict(self._records)
        return {key: self._of(key) for key in [self._subject, *(each.key for each in changes)]}

    def _bury(self) -> None:
        """End the memberships that are no newer than the deletion of either of their ends."""
        for key in [key for key in self._records if key.kind == "membership"]:
            for end in key.organization_and_user:
                ended_at = self._of(end).ended_at
                if ended_at != NEVER:
                    self._records[key] = merge(self._records[key], Tombstone(key, ended_at))

    def _compared(
        self, line: TimelineEntry, before: _Records, changes: Sequence[DeliveryChange]
    ) -> TimelineEntry:
        moved = tuple(name for old in before.values() for name in self._set(old))
        told = [name for change in changes for name in self._told_else(change)]
        doubts = tuple(name for key in before for name in self._doubts(self._of(key)))
        doubted = [name for old in before.values() for name in self._doubts(old)]
        return replace(
            line,
            set=moved,
            stale=tuple(name for name in told if name not in moved),
            settled=tuple(name for name in doubted if name not in doubts),
            doubtful=doubts,
        )

    def _set(self, old: Record) -> Iterator[str]:
        """The columns that have another value than in `old`."""
        new = self._of(old.key)
        if not self._is_told(old.key):
            return
        for column in columns_for(old.key, self._subject):
            if column.value(new) != column.value(old):
                yield column.name
        for name, fact in fact_columns(old.key).items():
            if new.facts.get(fact) != old.facts.get(fact):
                yield name
        if old.key == self._subject and new.deleted_at != old.deleted_at:
            yield "deleted_at"

    def _told_else(self, change: DeliveryChange) -> Iterator[str]:
        """The columns that have another value than the one told."""
        values = change.values if isinstance(change, Upsert) else {}
        for column in columns_for(change.key, self._subject) if values else ():
            value = values.get(column.group)
            if value and column.told(value.content) != column.value(self._of(change.key)):
                yield column.name

    def _is_told(self, key: Key) -> bool:
        """Whether the record is the subject's or one of its memberships, and not another end's."""
        return key == self._subject or key.kind == "membership"

    def _doubts(self, record: Record) -> list[str]:
        if not self._is_told(record.key):
            return []
        names = (column_label(record.key, name, self._subject) for name in record.doubts)
        return list(dict.fromkeys(names))

    def _of(self, key: Key) -> Record:
        return self._records.get(key) or Record(key)


def _outcome(kept: StoredDelivery, effects: Iterable[str]) -> str:
    states = {
        DeliveryState.PENDING: "pending",
        DeliveryState.DEAD: "dead",
        DeliveryState.IGNORED: "test",
    }
    if kept.state in states:
        return states[kept.state]
    return min(effects, default=kept.result or "nothing", key=_STRONGEST_FIRST.index)


def _answers(known: Mapping[Key, Record]) -> list[tuple[int, list[tuple[Key, str]]]]:
    """When Logto was last asked, and about which groups."""
    found: dict[int, list[tuple[Key, str]]] = {}
    for key, record in known.items():
        for name, group in record.groups.items():
            if group.read_at != NEVER:
                found.setdefault(group.read_at, []).append((key, name))
        if record.absent_at != NEVER:
            found.setdefault(record.absent_at, []).append((key, _ABSENT))
    return sorted(found.items())


def _answered(record: Record, name: str, now: Record) -> Record:
    """A record after the answer of which a group of it knows now."""
    if name == _ABSENT:
        return merge(record, Absent(record.key, now.absent_at))
    needs = {need: at for need, at in record.needs.items() if at > now.asked_for(need)}
    record, answer = replace(record, needs=needs), now.groups[name]
    if answer.by_read:
        told = ApiRead(record.key, {name: answer.content}, answer.read_at, answer.end)
        return merge(record, told)
    group = record.groups.get(name)
    if group is None:
        return record
    return replace(record, groups=record.groups | {name: _undoubted(group, answer.read_at)})


def _undoubted(group: Group, read_at: int) -> Group:
    """What was answered isn't known any more, since a later value won: as if it was the same."""
    later = tuple(rival for rival in group.ends if rival.end > read_at)
    ends = later or (Contender(group.end, group.digest),)
    return replace(group, ends=ends, read_at=read_at)
