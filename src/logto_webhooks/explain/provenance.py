"""Find out which delivery or API response set the current value of each column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import UNSET, Struct
from msgspec.structs import replace

from logto_webhooks.canonical_json import is_equal
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
    """A delivery: its ID and event, the call that caused it, and when Logto sent it (ms)."""

    id: int
    event: str
    call: str
    occurred_at: int


class Field(Struct, frozen=True, kw_only=True):
    """A column's value now, and where it comes from.

    `set_by` is the first delivery since when it has this value, `told_by` the last that had the
    same value. Logto's API confirmed it `asked_at` a moment (ms), if that was later. Without either
    delivery, the API alone returned it, or a token's claims (`claimed`). A membership has
    `ended_at` (ms) if its user or organization was deleted.
    """

    name: str
    value: Any
    set_by: DeliveryRef | None = None
    told_by: DeliveryRef | None = None
    asked_at: int | None = None
    ended_at: int | None = None
    doubtful: bool = False
    claimed: bool = False


class _Observation(Struct, frozen=True):
    """A group's content in a delivery."""

    stamp: int
    digest: str
    start: int
    end: int
    by: DeliveryRef
    content: Any

    @property
    def order(self) -> tuple[int, str, int]:
        """The newest observation has the greatest."""
        return self.stamp, self.digest, self.start


class Provenance:
    """Collects the values of a subject and its memberships in deliveries."""

    def __init__(self, subject: Key) -> None:
        self._subject = subject
        self._observations: dict[tuple[Key, str], list[_Observation]] = {}
        self._facts: dict[tuple[Key, str], tuple[int, DeliveryRef]] = {}
        # When the subject and the other ends of its memberships were deleted.
        self._deletions: dict[Key, dict[int, DeliveryRef]] = {}

    def add(self, delivery: StoredDelivery, changes: Sequence[DeliveryChange]) -> None:
        """Add the changes of a delivery."""
        by = DeliveryRef(delivery.id, delivery.event, delivery.call, delivery.occurred_at)
        for change in changes:
            if isinstance(change, Tombstone):
                self._deletions.setdefault(change.key, {}).setdefault(change.at, by)
            elif isinstance(change, Upsert):
                self._add_upsert(change, by)

    def _add_upsert(self, change: Upsert, by: DeliveryRef) -> None:
        for name, value in change.values.items():
            group = merge_group(None, value)
            observation = _Observation(
                group.stamp, group.digest, group.start, group.end, by, value.content
            )
            self._observations.setdefault((change.key, name), []).append(observation)
        for name, fact in change.facts.items():
            greatest = self._facts.get((change.key, name))
            if greatest is None or fact > greatest[0]:
                self._facts[change.key, name] = (fact, by)

    def list_fields(self, records: Mapping[Key, Record]) -> list[Field]:
        """List every column of the current records, the subject's own first."""
        keys = sorted(records, key=lambda key: (key != self._subject, key))
        return [field for key in keys for field in self._list_fields(records[key])]

    def _list_fields(self, record: Record) -> Iterator[Field]:
        row = project(record) or {}
        for column in columns_for(record.key, self._subject):
            yield self._make_field(column.resolve(record), record, row)
        for name, fact in fact_columns(record.key).items():
            yield self._make_fact(name, fact, record)
        if record.key == self._subject:
            yield self._make_deleted_at(record)
        yield from _list_roles(record, self._subject)

    def _make_field(self, column: Column, record: Record, row: Mapping[str, Any]) -> Field:
        value = column.value(record)
        shown = row.get(column.name, None if value is UNSET else value)
        group = record.groups.get(column.group)
        if group is None:
            return Field(name=column.name, value=shown)
        if not is_equal(value, column.read(group.content)):
            return self._make_ended(Field(name=column.name, value=shown), record)
        observations = self._observations.get((record.key, column.group), [])
        first, last = _find_run(column, group, observations)
        return Field(
            name=column.name,
            value=shown,
            set_by=first,
            told_by=last,
            asked_at=group.read_at if group.by_read else None,
            doubtful=record.deleted_at is None and group.doubtful,
            claimed=group.is_claimed,
        )

    def _make_ended(self, field: Field, record: Record) -> Field:
        """Set when a membership ended: when its user or its organization was deleted first."""
        deletions = {
            at: by
            for end in record.key.organization_and_user
            for at, by in self._deletions.get(end, {}).items()
            if at >= record.stamp
        }
        if not deletions:  # only an API response said so
            return replace(field, ended_at=record.gone_at)
        at, by = min(deletions.items(), key=lambda deletion: deletion[0])
        return replace(field, set_by=by, told_by=by, ended_at=at)

    def _make_fact(self, name: str, fact: str, record: Record) -> Field:
        value = record.facts.get(fact)
        greatest, by = self._facts.get((record.key, fact), (None, None))
        if value is None or greatest == value:
            return Field(name=name, value=value, set_by=by, told_by=by)
        return Field(name=name, value=value, asked_at=record.read_at)

    def _make_deleted_at(self, record: Record) -> Field:
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


def _find_run(
    column: Column, group: Group, observations: Sequence[_Observation]
) -> tuple[DeliveryRef | None, DeliveryRef | None]:
    """Find the first and the last of the newest consecutive deliveries with the current value."""
    value = column.read(group.content)
    newest_first = sorted(
        (seen for seen in observations if seen.order[:2] <= (group.stamp, group.digest)),
        key=lambda seen: seen.order,
        reverse=True,
    )
    differ = [not is_equal(column.read(seen.content), value) for seen in newest_first]
    begin = differ.index(False) if False in differ else len(differ)
    if begin and not (group.by_read and _may_be_newest(newest_first[: begin + 1])):
        return None, None
    end = differ.index(True, begin) if True in differ[begin:] else len(differ)
    run = newest_first[begin:end]
    return (run[-1].by, run[0].by) if run else (None, None)


def _may_be_newest(newest_first: Sequence[_Observation]) -> bool:
    """Return whether the last may be newer than all others. Then an API response decides."""
    *others, last = newest_first
    return all(last.end >= other.start - GUARD_MS for other in others)


def _list_roles(record: Record, subject: Key) -> Iterator[Field]:
    """List the roles from API responses, even if the record is deleted or the membership is over.
    Deliveries contain no roles."""
    roles = {
        name: group
        for name, group in record.groups.items()
        if name == ROLES or name.startswith(ROLE)
    }
    read_at = [group.read_at for group in roles.values() if group.read_at != NEVER]
    if not read_at:
        return
    if record.key.kind == "membership":
        names = sorted(roles[ROLES].content.values())
    else:
        contents = [group.content for name, group in roles.items() if name.startswith(ROLE)]
        names = sorted(content for content in contents if content is not None)
    yield Field(name=column_label(record.key, ROLES, subject), value=names, asked_at=min(read_at))
