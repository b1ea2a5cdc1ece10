"""Derive local events from a record before and after a change."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from logto_webhooks.events.local import (
    Changes,
    LocalEvent,
    LocalMemberAdded,
    LocalMemberRemoved,
    LocalOrganizationCreated,
    LocalOrganizationDeleted,
    LocalOrganizationUpdated,
    LocalUserCreated,
    LocalUserDeleted,
    LocalUserUpdated,
    OrganizationRow,
    Source,
    UserRow,
)
from logto_webhooks.records.projection import project
from logto_webhooks.records.record import Key, Record

_UNTOLD: Final = {"updated_at", "deleted_at"}  # they follow from what else changed


def local_events(before: Record, after: Record, source: Source) -> list[LocalEvent]:
    """Say what became of a record's row; nothing if it looks the same."""
    if after.key.kind == "membership":
        return _member_events(before, after, source)
    old, new = _live(before), _live(after)
    if new is None:
        return [_deleted(after, source)] if old is not None else []
    if old is None:
        was_here = project(before) is not None
        return [_created(after, source, restored=was_here)]
    changes: Changes = {
        name: (_shown(name, old[name]), _shown(name, value))
        for name, value in new.items()
        if old[name] != value and name not in _UNTOLD
    }
    return [_updated(after, source, changes)] if changes else []


def member_removed(key: Key, source: Source) -> LocalEvent:
    """That a membership is over."""
    organization, user = key.organization_and_user
    return LocalMemberRemoved(source=source, organization_id=organization.id, user_id=user.id)


def user_row(record: Record) -> UserRow | None:
    """The row of a user; None where there is none (yet)."""
    row = project(record)
    return None if row is None else msgspec.convert(_dated(record, row), UserRow)


def _member_events(before: Record, after: Record, source: Source) -> list[LocalEvent]:
    was, is_now = project(before) is not None, project(after) is not None
    if was == is_now:
        return []
    if was:
        return [member_removed(after.key, source)]
    organization, user = after.key.organization_and_user
    return [LocalMemberAdded(source=source, organization_id=organization.id, user_id=user.id)]


def _live(record: Record) -> dict[str, Any] | None:
    return None if record.deleted_at is not None else project(record)


def _created(record: Record, source: Source, restored: bool) -> LocalEvent:
    if record.key.kind == "user":
        return LocalUserCreated(source=source, user=_user(record), restored=restored)
    organization = _organization(record)
    return LocalOrganizationCreated(source=source, organization=organization, restored=restored)


def _updated(record: Record, source: Source, changes: Changes) -> LocalEvent:
    if record.key.kind == "user":
        return LocalUserUpdated(source=source, user=_user(record), changes=changes)
    organization = _organization(record)
    return LocalOrganizationUpdated(source=source, organization=organization, changes=changes)


def _deleted(record: Record, source: Source) -> LocalEvent:
    if record.key.kind == "user":
        return LocalUserDeleted(source=source, user=_user(record))
    return LocalOrganizationDeleted(source=source, organization=_organization(record))


def _user(record: Record) -> UserRow:
    return msgspec.convert(_dated(record, project(record) or {}), UserRow)


def _organization(record: Record) -> OrganizationRow:
    return msgspec.convert(_dated(record, project(record) or {}), OrganizationRow)


def _dated(record: Record, row: dict[str, Any]) -> dict[str, Any]:
    return {"id": record.local_id} | {name: _shown(name, value) for name, value in row.items()}


def _shown(name: str, value: Any) -> Any:
    """A column's value as people want it: its times as datetimes in UTC."""
    if not name.endswith("_at") or value is None:
        return value
    return datetime.fromtimestamp(value / 1000, UTC)
