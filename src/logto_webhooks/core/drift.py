"""How a record differed from Logto's own: in what, since when, and why that is likely."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from logto_webhooks.core.mirror import Part, parts_of, row_of
from logto_webhooks.core.record import Kind, Record

MISSING: Final = "missing"
DELETED: Final = "deleted"
# Logto sends nothing when these change.
_SILENT: Final = {"identities", "roles", "organization_roles"}
_PARTS: Final[dict[Part, str]] = {"roles": "roles", "member_roles": "organization_roles"}


class Drift(Struct, frozen=True):
    """A record that differed, in which columns (`missing` and `deleted` are whole records), since
    when at the latest (ms; None if that is unknown), and the likely reason."""

    kind: Kind
    id: str
    fields: tuple[str, ...]
    since: int | None = None
    reason: str = ""


def drift_of(before: Record, after: Record) -> Drift | None:
    """Compare a record with what it became once Logto was asked; None if nothing differs."""
    fields = differing(before, after)
    if not fields:
        return None
    key = after.key
    since = _since(before, after, fields)
    return Drift(key.kind, key.id, fields, since, _reason(before, after, fields))


def differing(before: Record, after: Record) -> tuple[str, ...]:
    """Name the columns of the mirror in which two states of a record differ."""
    old, new = _live(before), _live(after)
    if old is None or new is None:
        return () if old is new else (MISSING if old is None else DELETED,)
    return tuple(name for name, value in new.items() if old[name] != value)


def _live(record: Record) -> dict[str, Any] | None:
    row = row_of(record)
    if row is None or record.deleted_at is not None:
        return None
    found = {name: value for name, value in row.items() if name not in _OWN}
    for part, name in _PARTS.items():
        rows = parts_of(record).get(part, [])
        found[name] = {each["role_id"]: each["name"] for each in rows}
    return found


# Known only here; and the newest change, which Logto bumps without saying so.
_OWN: Final = {"updated_at", "joined_at", "deleted_at"}


def _since(before: Record, after: Record, fields: tuple[str, ...]) -> int | None:
    of_roles = set(fields) <= set(_PARTS.values())
    groups = [group for name, group in before.groups.items() if name.startswith("role") is of_roles]
    # What a read told is true as of its beginning.
    heard = max((max(group.read_at, group.stamp) for group in groups), default=None)
    if of_roles:
        return heard
    changed = after.facts.get("createdAt" if heard is None else "updatedAt")
    if heard is None or (changed is not None and changed > heard):
        return changed
    return heard


def _reason(before: Record, after: Record, fields: tuple[str, ...]) -> str:
    if before.waiting_for is not None and before.groups:
        return f"known here, to be asked about: {before.waiting_for}"
    if set(fields) <= _SILENT:
        return "Logto sends no webhook when these change"
    if fields == (MISSING,):
        made = "added" if after.key.kind == "membership" else "created"
        return f"{made} before the hook, or its webhook was lost"
    if fields == (DELETED,):
        gone = "removed" if after.key.kind == "membership" else "deleted"
        return f"the webhook of its being {gone} was lost"
    if set(fields) == {"last_sign_in_at"}:
        return "PostSignIn was lost, or the hook doesn't subscribe to it"
    return "its webhook was lost, or the hook doesn't subscribe to it"
