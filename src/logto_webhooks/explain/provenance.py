"""Find out which delivery or API response set the current value of each column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import UNSET, Struct
from msgspec.structs import replace

from logto_webhooks.deliveries import StoredDelivery
from logto_webhooks.records.merge import merge_group
from logto_webhooks.records.projection import (
    Column,
    column_label,
    columns_for,
    fact_columns,
    project,
)
from logto_webhooks.records.record import (
    EXISTENCE,
    GUARD_MS,
    NEVER,
    ROLE,
    ROLES,
    DeliveryChange,
    Group,
    Key,
    Record,
    Tombstone,
    Upsert,
)


class DeliveryRef(Struct, frozen=True):
    """A delivery: its id, its event, the call that it tells of, and when Logto sent it (ms)."""

    id: int
    event: str
    call: str
    occurred_at: int


class Field(Struct, frozen=True, kw_only=True):
    """A column's present value, and who is to be believed for it.

    `set_by` is the first delivery since when it has this value, `told_by` the last that told it:
    the winner, unless Logto was `asked_at` a moment (ms) after that. All are None where nothing
    in the inbox tells it, as when it is `claimed` by a token alone. A membership has `ended_at`
    (ms) when either end was deleted.
    """

    name: str
    value: Any
    set_by: DeliveryRef | None = None
    told_by: DeliveryRef | None = None
    asked_at: int | None = None
    ended_at: int | None = None
    doubtful: bool = False
    claimed: bool = False


class _Telling(Struct, frozen=True):
    """A group's content as a delivery told it."""

    stamp: int
    digest: str
    start: int
    end: int
    by: DeliveryRef
    content: Any


class Provenance:
    """Gathers what deliveries told of a subject and its memberships."""

    def __init__(self, subject: Key) -> None:
        self._subject = subject
        self._groups: dict[tuple[Key, str], list[_Telling]] = {}
        self._facts: dict[tuple[Key, str], tuple[int, DeliveryRef]] = {}
        # When the subject was deleted, and the other ends of its memberships.
        self._deletions: dict[Key, dict[int, DeliveryRef]] = {}

    def add(self, kept: StoredDelivery, changes: Sequence[DeliveryChange]) -> None:
        """Note what a delivery told."""
        by = DeliveryRef(kept.id, kept.event, kept.call, kept.occurred_at)
        for change in changes:
            if isinstance(change, Tombstone):
                self._deletions.setdefault(change.key, {}).setdefault(change.at, by)
            elif isinstance(change, Upsert):
                self._put(change, by)

    def fields(self, known: Mapping[Key, Record]) -> list[Field]:
        """Credit every column of what is known now, the subject's own first."""
        keys = sorted(known, key=lambda key: (key != self._subject, key))
        return [field for key in keys for field in self._of(known[key])]

    def _put(self, change: Upsert, by: DeliveryRef) -> None:
        for name, value in change.values.items():
            group = merge_group(None, value)
            telling = _Telling(group.stamp, group.digest, group.start, group.end, by, value.content)
            self._groups.setdefault((change.key, name), []).append(telling)
        for name, fact in change.facts.items():
            greatest = self._facts.get((change.key, name))
            if greatest is None or fact > greatest[0]:
                self._facts[change.key, name] = (fact, by)

    def _of(self, record: Record) -> Iterator[Field]:
        row = project(record) or {}
        for column in columns_for(record.key, self._subject):
            yield self._column(column.deciding(record), record, row)
        for name, fact in fact_columns(record.key).items():
            yield self._fact(name, fact, record)
        if record.key == self._subject:
            yield self._deleted(record)
        yield from _roles(record, self._subject)

    def _column(self, column: Column, record: Record, row: Mapping[str, Any]) -> Field:
        value = column.value(record)
        shown = row.get(column.name, None if value is UNSET else value)
        group = record.groups.get(column.group)
        if group is None:
            return Field(name=column.name, value=shown)
        if value != column.read(group.content):
            return self._ended(Field(name=column.name, value=shown), record)
        first, last = _run(column, group, self._groups.get((record.key, column.group), []))
        return Field(
            name=column.name,
            value=shown,
            set_by=first,
            told_by=last,
            asked_at=group.read_at if group.by_read else None,
            doubtful=record.deleted_at is None and group.doubtful,
            claimed=group.is_claimed,
        )

    def _ended(self, field: Field, record: Record) -> Field:
        """A membership that ended with either end: with the one that was deleted first."""
        ends = {
            at: by
            for end in record.key.organization_and_user
            for at, by in self._deletions.get(end, {}).items()
            if at >= record.stamp
        }
        if not ends:  # only an answer of Logto's told that the end is gone
            return replace(field, ended_at=record.gone_at)
        ended_at = min(ends)
        return replace(field, set_by=ends[ended_at], told_by=ends[ended_at], ended_at=ended_at)

    def _fact(self, name: str, fact: str, record: Record) -> Field:
        value = record.facts.get(fact)
        greatest, by = self._facts.get((record.key, fact), (None, None))
        if value is None or greatest == value:
            return Field(name=name, value=value, set_by=by, told_by=by)
        return Field(name=name, value=value, asked_at=record.read_at)

    def _deleted(self, record: Record) -> Field:
        at = record.deleted_at
        by = None if at is None else self._deletions.get(record.key, {}).get(at)
        return Field(
            name="deleted_at",
            value=at,
            set_by=by,
            told_by=by,
            asked_at=at if by is None else None,
            doubtful=EXISTENCE in record.doubts,
        )


def _run(
    column: Column, group: Group, tellings: Sequence[_Telling]
) -> tuple[DeliveryRef | None, DeliveryRef | None]:
    """The first and the last of those that told the present value, one after another."""
    present = column.read(group.content)
    known = [value for value in tellings if _order(value)[:2] <= (group.stamp, group.digest)]
    newest_first = sorted(known, key=_order, reverse=True)
    differ = [column.read(value.content) != present for value in newest_first]
    begin = differ.index(False) if False in differ else len(differ)
    if begin and not (group.by_read and _may_be_newest(newest_first[: begin + 1])):
        return None, None
    end = differ.index(True, begin) if True in differ[begin:] else len(differ)
    run = newest_first[begin:end]
    return (run[-1].by, run[0].by) if run else (None, None)


def _may_be_newest(newest_first: Sequence[_Telling]) -> bool:
    """Whether the last may be newer than all before it: then Logto's answer tells that it is."""
    *others, last = newest_first
    return all(last.end >= other.start - GUARD_MS for other in others)


def _order(telling: _Telling) -> tuple[int, str, int]:
    return telling.stamp, telling.digest, telling.start


def _roles(record: Record, subject: Key) -> Iterator[Field]:
    """What Logto answered of roles, also when the record is deleted or the membership is over:
    only answers tell of them."""
    asked = [
        group.read_at
        for name, group in record.groups.items()
        if (name == ROLES or name.startswith(ROLE)) and group.read_at != NEVER
    ]
    if asked:
        if record.key.kind == "membership":
            names = sorted(record.groups[ROLES].content.values())
        else:
            roles = (group for name, group in record.groups.items() if name.startswith(ROLE))
            names = sorted(group.content for group in roles if group.content is not None)
        yield Field(name=column_label(record.key, ROLES, subject), value=names, asked_at=min(asked))
