"""Deliveries and records as the columns of their tables, and back."""

from __future__ import annotations

from typing import Any

from sqlalchemy import RowMapping

from logto_webhooks.core.delivery import Delivery
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.record import Group, Key, Record, Rival

Columns = dict[str, Any]


def inbox_row(delivery: Delivery) -> Columns:
    """The columns of a new delivery."""
    return {
        "digest": delivery.digest,
        "body": delivery.body,
        "event": delivery.event,
        "subject": delivery.subject,
        "occurred_at": delivery.occurred_at,
        "received_at": delivery.received_at,
        "origin": delivery.origin,
        "state": State.PENDING.value,
        "attempts": 0,
    }


def stub_row(key: Key, local_id: str, now: int) -> Columns:
    """The columns of a record of which nothing is known: it waits for all."""
    columns = record_row(Record(key)) | {"kind": key.kind, "logto_id": key.id}
    columns |= {"local_id": local_id, "refetch_since": now}
    columns |= {"organization_id": None, "user_id": None}
    if key.kind == "membership":
        organization, user = key.organization_and_user
        columns |= {"organization_id": organization.id, "user_id": user.id}
    return columns


def record_row(record: Record) -> Columns:
    """The columns of a record that change."""
    return {
        "data": {name: group.content for name, group in record.groups.items()},
        "groups": {name: _standing(group) for name, group in record.groups.items()},
        "facts": record.facts,
        "needs": record.needs,
        "deleted_at": record.deleted_at,
        "doubtful": bool(record.doubts),
        "waiting_reason": record.waiting_for,
    }


def record_of(row: RowMapping) -> Record:
    """The record of a row."""
    return Record(
        key=Key(row["kind"], row["logto_id"]),
        groups={
            name: _group(row["data"][name], standing) for name, standing in row["groups"].items()
        },
        facts=row["facts"],
        needs=row["needs"],
        deleted_at=row["deleted_at"],
        local_id=row["local_id"],
    )


def _standing(group: Group) -> Columns:
    return {
        "stamp": group.stamp,
        "start": group.start,
        "end": group.end,
        "digest": group.digest,
        "ends": [list(rival) for rival in group.ends],
    }


def _group(content: Any, standing: Columns) -> Group:
    ends = tuple(Rival(end, digest) for end, digest in standing["ends"])
    return Group(**standing | {"content": content, "ends": ends})
