"""Build the timeline of a user or an organization: what each delivery and API response did."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.canonical_json import is_equal
from logto_webhooks.deliveries import DeliveryState, Origin, StoredDelivery
from logto_webhooks.records.merge import OUTCOMES, merge, name_effect
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

SETTLED: Final = "settled"
ASKED: Final = "asked Logto"
_STRONGEST_FIRST: Final = list(OUTCOMES)
_ABSENT: Final = "absent"  # in place of a group: Logto had no such record
_Names = tuple[str, ...]
_Records = dict[Key, Record]


class TimelineEntry(Struct, frozen=True, kw_only=True):
    """What a delivery did, or an API response, which has no `id`. Times are in milliseconds.

    `set` are the columns that it changed; `stale` those that already had a newer value. `settled`
    and `doubtful` are the groups that were in doubt before it, or are since then.
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
    def names(self) -> _Names:
        """The columns and groups that it had values for."""
        return (*self.set, *self.stale, *self.settled)


class Timeline:
    """Merges the records of the subject and its memberships again. `lines` are the steps."""

    def __init__(self, subject: Key, records: Mapping[Key, Record]) -> None:
        self.lines: list[TimelineEntry] = []
        self._subject = subject
        self._current = records
        self._records: _Records = {subject: Record(subject)}
        self._memberships: dict[Key, list[Key]] = {}  # of each user and organization
        self._responses = deque(_list_responses(records))

    def add(self, delivery: StoredDelivery, changes: Sequence[DeliveryChange]) -> None:
        """Merge the changes of a delivery, after all API responses that came before it."""
        while self._responses and self._responses[0][0] < delivery.received_at:
            self._add_response(*self._responses.popleft())
        before = self._copy_records([self._subject, *(change.key for change in changes)])
        effects = [self._merge(change) for change in changes]
        self._end_memberships(before)
        line = TimelineEntry(
            id=delivery.id,
            occurred_at=delivery.occurred_at,
            received_at=delivery.received_at,
            origin=delivery.origin,
            event=delivery.event,
            call=delivery.call,
            outcome=_find_outcome(delivery, effects),
        )
        self.lines.append(self._compare(line, before, changes))

    def end(self) -> None:
        """Merge the API responses after the last delivery. Then end deleted records whose deletion
        is in no remaining delivery."""
        for at, groups in self._responses:
            self._add_response(at, groups)
        ended: dict[int, _Records] = {}
        for key, now in self._current.items():
            if now.deleted_at is not None and self._get(key).deleted_at is None:
                ended.setdefault(now.deleted_at, {})[key] = self._get(key)
        for at, before in sorted(ended.items()):
            for key, old in before.items():
                self._put(merge(old, Tombstone(key, at)))
            line = TimelineEntry(occurred_at=at, origin="read", event=ASKED, outcome=SETTLED)
            self.lines.append(self._compare(line, before, ()))

    def _merge(self, change: DeliveryChange) -> str:
        old = self._get(change.key)
        new = merge(old, change)
        self._put(new)
        return name_effect(old, change, new)

    def _add_response(self, at: int, groups: Sequence[tuple[Key, str]]) -> None:
        before = self._copy_records(key for key, _ in groups)
        for key, name in groups:
            self._put(_merge_response(self._get(key), name, self._current[key]))
        self._end_memberships(before)
        line = TimelineEntry(occurred_at=at, origin="read", event=ASKED, outcome=SETTLED)
        line = self._compare(line, before, ())
        groups = [group for group in groups if group[1] != _ABSENT]
        labels = dict.fromkeys(column_label(key, name, self._subject) for key, name in groups)
        doubtful = set(line.doubtful)
        settled = tuple(label for label in labels if label not in doubtful)
        self.lines.append(replace(line, settled=settled))

    def _copy_records(self, keys: Iterable[Key]) -> _Records:
        """Copy the records that a step may change, except memberships that it ends."""
        return {key: self._get(key) for key in keys}

    def _end_memberships(self, before: _Records) -> None:
        """End memberships that aren't newer than the deletion of their user or organization, and
        add them to `before`. Only those can be concerned that this step changed, or one of whose
        ends it changed."""
        keys: dict[Key, None] = {}
        for key, old in before.items():
            if key.kind == "membership":
                keys[key] = None
            elif self._get(key).ended_at != old.ended_at:
                keys |= dict.fromkeys(self._memberships.get(key, ()))
        for key in keys:
            old = self._get(key)
            for end in key.organization_and_user:
                ended_at = self._get(end).ended_at
                if ended_at != NEVER:
                    self._put(merge(self._get(key), Tombstone(key, ended_at)))
            if self._get(key) is not old:
                before.setdefault(key, old)

    def _compare(
        self, line: TimelineEntry, before: _Records, changes: Sequence[DeliveryChange]
    ) -> TimelineEntry:
        changed = [name for old in before.values() for name in self._list_changed(old)]
        stale = [name for change in changes for name in self._list_stale(change)]
        doubts = [name for key in before for name in self._list_doubts(self._get(key))]
        doubts_before = [name for old in before.values() for name in self._list_doubts(old)]
        return replace(
            line,
            set=tuple(changed),
            stale=_subtract(stale, changed),
            settled=_subtract(doubts_before, doubts),
            doubtful=tuple(doubts),
        )

    def _list_changed(self, old: Record) -> Iterator[str]:
        """List the columns that have another value than in `old`."""
        new = self._get(old.key)
        if not self._is_shown(old.key):
            return
        for column in columns_for(old.key, self._subject):
            if not is_equal(column.value(new), column.value(old)):
                yield column.name
        for name, fact in fact_columns(old.key).items():
            if new.facts.get(fact) != old.facts.get(fact):
                yield name
        if old.key == self._subject and new.deleted_at != old.deleted_at:
            yield "deleted_at"

    def _list_stale(self, change: DeliveryChange) -> Iterator[str]:
        """List the columns that have another value than in the change."""
        values = change.values if isinstance(change, Upsert) else {}
        for column in columns_for(change.key, self._subject) if values else ():
            value = values.get(column.group)
            if value and not is_equal(
                column.read(value.content), column.value(self._get(change.key))
            ):
                yield column.name

    def _is_shown(self, key: Key) -> bool:
        """Return whether this is the subject, or one of its memberships."""
        return key == self._subject or key.kind == "membership"

    def _list_doubts(self, record: Record) -> list[str]:
        if not self._is_shown(record.key):
            return []
        names = (column_label(record.key, name, self._subject) for name in record.doubts)
        return list(dict.fromkeys(names))

    def _get(self, key: Key) -> Record:
        return self._records.get(key) or Record(key)

    def _put(self, record: Record) -> None:
        key = record.key
        if key.kind == "membership" and key not in self._records:
            for end in key.organization_and_user:
                self._memberships.setdefault(end, []).append(key)
        self._records[key] = record


def _subtract(names: Iterable[str], others: Iterable[str]) -> _Names:
    left_out = set(others)
    return tuple(name for name in names if name not in left_out)


def _find_outcome(delivery: StoredDelivery, effects: Iterable[str]) -> str:
    states = {
        DeliveryState.PENDING: "pending",
        DeliveryState.DEAD: "dead",
        DeliveryState.IGNORED: "test",
    }
    if delivery.state in states:
        return states[delivery.state]
    return min(effects, default=delivery.result or "nothing", key=_STRONGEST_FIRST.index)


def _list_responses(records: Mapping[Key, Record]) -> list[tuple[int, list[tuple[Key, str]]]]:
    """List when the API was last read, and for which groups."""
    by_time: dict[int, list[tuple[Key, str]]] = {}
    for key, record in records.items():
        for name, group in record.groups.items():
            if group.read_at != NEVER:
                by_time.setdefault(group.read_at, []).append((key, name))
        if record.absent_at != NEVER:
            by_time.setdefault(record.absent_at, []).append((key, _ABSENT))
    return sorted(by_time.items())


def _merge_response(record: Record, name: str, now: Record) -> Record:
    """Merge the API response that set a group of the record as it is now."""
    if name == _ABSENT:
        return merge(record, Absent(record.key, now.absent_at, now.absent_until))
    needs = {need: at for need, at in record.needs.items() if at > now.asked_for(need)}
    record, answer = replace(record, needs=needs), now.groups[name]
    if answer.by_read:
        read = ApiRead(record.key, {name: answer.content}, answer.read_at, answer.end)
        return merge(record, read)
    group = record.groups.get(name)
    if group is None:
        return record
    return replace(record, groups=record.groups | {name: _settle(group, answer.read_at)})


def _settle(group: Group, read_at: int) -> Group:
    """Settle a group whose API response was replaced by a later value, as if both were equal."""
    later = tuple(rival for rival in group.ends if rival.end > read_at)
    ends = later or (Contender(group.end, group.digest),)
    return replace(group, ends=ends, read_at=read_at)
