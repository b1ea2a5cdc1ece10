"""Describe how a record differed from Logto."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from logto_webhooks.canonical_json import is_equal
from logto_webhooks.records.projection import Part, child_rows, live_row
from logto_webhooks.records.record import NEVER, ROLE, ROLES, Absent, ApiRead, Change, Kind, Record

MISSING: Final = "missing"
DELETED: Final = "deleted"
# Logto sends nothing when these change.
_WITHOUT_WEBHOOK: Final = {"identities"}
_ROLE_COLUMNS: Final[dict[Part, str]] = {"roles": "roles", "member_roles": "organization_roles"}


class Drift(Struct, frozen=True):
    """A record that differed from Logto, with the columns and the likely reason.

    `fields` is `missing` or `deleted` if the whole record differed. It differed no later than
    `since` (ms; None if unknown). Each role that differed is a separate drift, with its name.
    """

    kind: Kind
    id: str
    fields: tuple[str, ...]
    since: int | None = None
    reason: str = ""
    role: str = ""


def drifts_of(before: Record, after: Record) -> list[Drift]:
    """Compare a record before and after a read from Logto; empty if nothing differs."""
    fields = differing(before, after)
    own = tuple(name for name in fields if name not in _ROLE_COLUMNS.values())
    drifts = []
    if own:
        since, reason = _find_since(before, after, own), _find_reason(before, after, own)
        drifts.append(Drift(after.key.kind, after.key.id, own, since, reason))
    for part, column in _ROLE_COLUMNS.items():
        if column in fields:
            drifts += _compare_roles(before, after, part)
    return drifts


def differing(before: Record, after: Record) -> tuple[str, ...]:
    """Return the mirror columns in which two states of a record differ."""
    old, new = _get_columns(before), _get_columns(after)
    if old is None or new is None:
        return () if old is new else (MISSING if old is None else DELETED,)
    return tuple(name for name, value in new.items() if not is_equal(old[name], value))


def agrees(record: Record, change: Change) -> bool:
    """Whether a record equals what Logto's API returned. It doesn't if a later change won."""
    match change:
        case Absent():
            return record.deleted_at is not None
        case ApiRead():
            present = change.contents.get("present", "own" in change.contents or None)
            if present is not None and (live_row(record) is not None) is not present:
                return False
            if present is False:
                return True
            all_of = change.all_of
            unlisted = [name for name in record.groups if all_of and name.startswith(all_of)]
            return all(
                is_equal(record.own if name == "own" else record.groups[name].content, content)
                for name, content in (dict.fromkeys(unlisted) | change.contents).items()
            )
    return True


def _get_columns(record: Record) -> dict[str, Any] | None:
    row = live_row(record)
    if row is None:
        return None
    columns = {name: value for name, value in row.items() if name not in _NOT_COMPARED}
    return columns | {name: _get_role_names(record, part) for part, name in _ROLE_COLUMNS.items()}


def _get_role_names(record: Record, part: Part) -> dict[str, str]:
    """Return the names of the roles by ID."""
    return {role["role_id"]: role["name"] for role in child_rows(record).get(part, [])}


def _compare_roles(before: Record, after: Record, part: Part) -> list[Drift]:
    """Return a drift for each role that was added, removed or renamed."""
    old, new = _get_role_names(before, part), _get_role_names(after, part)
    return [
        Drift(
            after.key.kind,
            after.key.id,
            (_ROLE_COLUMNS[part],),
            _find_role_read_at(before, part, role_id),
            "Logto sends no webhook when these change",
            new.get(role_id, old.get(role_id, "")),
        )
        for role_id in sorted(old.keys() | new.keys())
        if old.get(role_id) != new.get(role_id)
    ]


def _find_role_read_at(record: Record, part: Part, role_id: str) -> int | None:
    """Return when a role was last read from Logto; None if never."""
    group = record.groups.get(ROLES)
    if part == "roles":
        group = record.groups.get(ROLE + role_id, group)
    return None if group is None or group.read_at == NEVER else group.read_at


# Logto doesn't have the last two, and changes `updated_at` without a webhook.
_NOT_COMPARED: Final = {"updated_at", "joined_at", "deleted_at"}


def _find_since(before: Record, after: Record, fields: tuple[str, ...]) -> int | None:
    if fields == (MISSING,) and before.deleted_at is not None:
        return before.deleted_at
    groups = [group for name, group in before.groups.items() if not name.startswith("role")]
    # A read is valid as of its start.
    known_at = max((max(group.read_at, group.stamp) for group in groups), default=None)
    changed = after.facts.get("createdAt" if known_at is None else "updatedAt")
    if known_at is None or (changed is not None and changed > known_at):
        return changed
    return known_at


def _find_reason(before: Record, after: Record, fields: tuple[str, ...]) -> str:
    if before.waiting_for is not None and before.groups:
        return f"waiting for a refetch: {before.waiting_for}"
    if set(fields) <= _WITHOUT_WEBHOOK:
        return "Logto sends no webhook when these change"
    if fields == (MISSING,) and before.deleted_at is not None:
        return "it was deleted, and exists in Logto again"
    if fields == (MISSING,):
        made = "added" if after.key.kind == "membership" else "created"
        return f"{made} before the webhook existed, or its delivery was lost"
    if fields == (DELETED,):
        end = "removal" if after.key.kind == "membership" else "deletion"
        return f"the delivery about its {end} was lost"
    if set(fields) == {"last_sign_in_at"}:
        return "PostSignIn was lost, or the webhook isn't subscribed to it"
    return "its delivery was lost, or the webhook isn't subscribed to it"
