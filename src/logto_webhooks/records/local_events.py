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
from logto_webhooks.records.projection import live_row, project
from logto_webhooks.records.record import Key, Record

_UNTOLD: Final = {"updated_at", "deleted_at"}  # they follow from what else changed


def local_events(before: Record, after: Record, source: Source) -> list[LocalEvent]:
    """Say what became of the row of a user or an organization; nothing if it looks the same."""
    old, new = live_row(before), live_row(after)
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


def member_added(key: Key, source: Source) -> LocalMemberAdded:
    """That a membership is here, and so are both its ends."""
    organization, user = key.organization_and_user
    return LocalMemberAdded(source=source, organization_id=organization.id, user_id=user.id)


def member_removed(key: Key, source: Source) -> LocalMemberRemoved:
    """That a membership, of which it was told that it was here, is over."""
    organization, user = key.organization_and_user
    return LocalMemberRemoved(source=source, organization_id=organization.id, user_id=user.id)


def user_row(record: Record) -> UserRow | None:
    """The row of a user; None where there is none (yet)."""
    row = project(record)
    return None if row is None else msgspec.convert(_dated(record, row), UserRow)


def is_here(record: Record) -> bool:
    """Whether a record has a row, and isn't deleted."""
    return live_row(record) is not None


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
