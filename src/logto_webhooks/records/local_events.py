"""Derive local events from a record before and after a change."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from logto_webhooks.canonical_json import is_equal
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
from logto_webhooks.records.record import NEVER, Key, Record

_NOT_REPORTED: Final = {"updated_at", "deleted_at"}  # they follow from other changes


def local_events(before: Record, after: Record, source: Source) -> list[LocalEvent]:
    """Return the events of a change of a user or an organization; none if the row is the same."""
    old, new = live_row(before), live_row(after)
    if new is None:
        return [_make_deleted(after, source)] if old is not None else []
    if old is None:
        was_here = project(before) is not None
        return [_make_created(after, source, restored=was_here)]
    changes: Changes = {
        name: (_convert_times(name, old[name]), _convert_times(name, value))
        for name, value in new.items()
        if name not in _NOT_REPORTED and not is_equal(old[name], value)
    }
    return [_make_updated(after, source, changes)] if changes else []


def member_added(key: Key, source: Source) -> LocalMemberAdded:
    """Make the event of a membership whose user and organization both have rows."""
    organization, user = key.organization_and_user
    return LocalMemberAdded(source=source, organization_id=organization.id, user_id=user.id)


def member_removed(key: Key, source: Source) -> LocalMemberRemoved:
    """Make the event of the end of a membership that had a `LocalMemberAdded`."""
    organization, user = key.organization_and_user
    return LocalMemberRemoved(source=source, organization_id=organization.id, user_id=user.id)


def existing(record: Record) -> LocalEvent:
    """Make the event of a record that was here before its handler."""
    if record.key.kind == "membership":
        return member_added(record.key, "existing")
    return _make_created(record, "existing", restored=record.gone_at != NEVER)


def user_row(record: Record) -> UserRow | None:
    """Return the row of a user; None if there is none (yet)."""
    row = project(record)
    return None if row is None else msgspec.convert(_convert_row(record, row), UserRow)


def is_here(record: Record) -> bool:
    """Whether a record has a row and isn't deleted."""
    if record.deleted_at is not None or not record.complete:
        return False
    return record.key.kind != "membership" or bool(record.groups["present"].content)


def _make_created(record: Record, source: Source, restored: bool) -> LocalEvent:
    if record.key.kind == "user":
        return LocalUserCreated(source=source, user=_get_user(record), restored=restored)
    organization = _get_organization(record)
    return LocalOrganizationCreated(source=source, organization=organization, restored=restored)


def _make_updated(record: Record, source: Source, changes: Changes) -> LocalEvent:
    if record.key.kind == "user":
        return LocalUserUpdated(source=source, user=_get_user(record), changes=changes)
    organization = _get_organization(record)
    return LocalOrganizationUpdated(source=source, organization=organization, changes=changes)


def _make_deleted(record: Record, source: Source) -> LocalEvent:
    if record.key.kind == "user":
        return LocalUserDeleted(source=source, user=_get_user(record))
    return LocalOrganizationDeleted(source=source, organization=_get_organization(record))


def _get_user(record: Record) -> UserRow:
    return msgspec.convert(_convert_row(record, project(record) or {}), UserRow)


def _get_organization(record: Record) -> OrganizationRow:
    return msgspec.convert(_convert_row(record, project(record) or {}), OrganizationRow)


def _convert_row(record: Record, row: dict[str, Any]) -> dict[str, Any]:
    return {"id": record.local_id} | {
        name: _convert_times(name, value) for name, value in row.items()
    }


def _convert_times(name: str, value: Any) -> Any:
    """Convert times to datetimes in UTC."""
    if not name.endswith("_at") or value is None:
        return value
    return datetime.fromtimestamp(value / 1000, UTC)
