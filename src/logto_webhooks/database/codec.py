"""Deliveries and records as the columns of their tables, and back."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from typing import Any

from sqlalchemy import RowMapping

from logto_webhooks.deliveries import DeliveryState, NewDelivery
from logto_webhooks.records.record import NEVER, Contender, Group, Key, Record

Columns = dict[str, Any]


def to_inbox_row(delivery: NewDelivery) -> Columns:
    """The columns of a new delivery."""
    return {
        "digest": delivery.digest,
        "body": delivery.body,
        "event": delivery.event,
        "subject": delivery.subject,
        "occurred_at": delivery.occurred_at,
        "received_at": delivery.received_at,
        "origin": delivery.origin,
        "state": DeliveryState.PENDING.value,
        "attempts": 0,
    }


def local_ids(count: int) -> Iterator[str]:
    """Make ids: UUIDs of version 7, for ids in order of time keep an index small and near."""
    now, chance = time.time_ns() // 1_000_000 << 80, os.urandom(10 * count)
    for start in range(0, 10 * count, 10):
        number = now | int.from_bytes(chance[start : start + 10])
        number = number & ~(0xF << 76) | 7 << 76
        yield str(uuid.UUID(int=number & ~(0x3 << 62) | 0x2 << 62))


def to_record_row(record: Record) -> Columns:
    """The columns of a record; since when it waits is for the database's clock to say."""
    organization = user = None
    if record.key.kind == "membership":
        organization, user = (end.id for end in record.key.organization_and_user)
    return {
        "kind": record.key.kind,
        "logto_id": record.key.id,
        "local_id": record.local_id,
        "organization_id": organization,
        "user_id": user,
        "data": {name: group.content for name, group in record.groups.items()},
        "groups": {name: _standing(group) for name, group in record.groups.items()},
        "facts": record.facts,
        "needs": record.needs,
        "deleted_at": record.deleted_at,
        "gone_at": _moment(record.gone_at),
        "absent_at": _moment(record.absent_at),
        "stamp": _moment(record.stamp),
        "told_at": _moment(record.told_stamp),
        "told_end": _moment(record.told_end),
        "read_at": record.read_at,
        "doubtful": bool(record.doubts),
        "waiting_reason": record.waiting_for,
    }


def from_record_row(row: RowMapping) -> Record:
    """The record of a row."""
    return Record(
        key=Key(row["kind"], row["logto_id"]),
        groups={
            name: _group(row["data"][name], standing) for name, standing in row["groups"].items()
        },
        facts=row["facts"],
        needs=row["needs"],
        gone_at=_gone_at(row),
        absent_at=_number(row["absent_at"]),
        told_stamp=_number(row["told_at"]),
        told_end=_number(row["told_end"]),
        local_id=row["local_id"],
    )


def _gone_at(row: RowMapping) -> int:
    """When it was deleted; a release that knew no `gone_at` wrote only `deleted_at`."""
    gone_at, deleted_at = _number(row["gone_at"]), row["deleted_at"]
    if deleted_at is None or deleted_at in (gone_at, row["absent_at"]):
        return gone_at
    return max(gone_at, int(deleted_at))


def _moment(number: int) -> int | None:
    return None if number == NEVER else number


def _number(moment: int | None) -> int:
    return NEVER if moment is None else moment


def _standing(group: Group) -> Columns:
    return {
        "stamp": group.stamp,
        "start": group.start,
        "end": group.end,
        "read_at": group.read_at,
        "digest": group.digest,
        "ends": [list(rival) for rival in group.ends],
    }


def _group(content: Any, standing: Columns) -> Group:
    ends = tuple(Contender(end, digest) for end, digest in standing["ends"])
    return Group(**standing | {"content": content, "ends": ends})
