"""What a record means for the mirror: the row that follows from it."""

from __future__ import annotations

import re
from typing import Any, Final, Literal

from logto_webhooks.core import canonical
from logto_webhooks.core.record import ROLE, ROLES, Record

KEY_LENGTH: Final = 256  # of a text in a primary key
Part = Literal["identities", "roles", "member_roles"]


def row_of(record: Record) -> dict[str, Any] | None:
    """Return the mirror's row of a record, by column; None where there is none (yet)."""
    if not record.complete:
        return None
    row = _ROWS[record.key.kind](record)
    return row and {name: _clean(value) for name, value in row.items()}


def parts_of(record: Record) -> dict[Part, list[dict[str, Any]]]:
    """Return the rows that hang on a record's own: of each part of which something is known."""
    parts: dict[Part, list[dict[str, Any]]] = {}
    if record.key.kind == "user":
        if record.complete:
            parts["identities"] = _identities(record)
        if any(name.startswith(ROLE) for name in record.groups):
            parts["roles"] = _user_roles(record)
    elif ROLES in record.groups:
        parts["member_roles"] = _member_roles(record)
    return parts


def without_nul(value: Any) -> Any:
    """Take NUL out of all text in a JSON value, for databases that can't hold it."""
    text = canonical.encode(value)
    if b"\\u0000" not in text:
        return value
    # In the text, since the value may be nested deeper than Python's functions.
    return canonical.decode(_NUL.sub(rb"\1", text))


_NUL: Final = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")


def _clean(value: Any) -> Any:
    return value.replace("\0", "") if isinstance(value, str) else value


def _user_row(record: Record) -> dict[str, Any]:
    own = record.own
    return {
        "logto_user_id": record.key.id,
        "username": own.get("username"),
        "email": own.get("primaryEmail"),
        "phone": own.get("primaryPhone"),
        "name": own.get("name"),
        "avatar": own.get("avatar"),
        "identities": own.get("identities", {}),
        "profile": _content(record, "profile", {}),
        "custom_data": _content(record, "custom_data", {}) | {"logtoUserId": record.key.id},
        "is_suspended": _content(record, "suspension", False),
        "last_sign_in_at": record.facts.get("lastSignInAt"),
        "created_at": record.facts.get("createdAt"),
        "updated_at": record.facts.get("updatedAt"),
        "deleted_at": record.deleted_at,
    }


def _organization_row(record: Record) -> dict[str, Any]:
    own = record.own
    return {
        "logto_organization_id": record.key.id,
        "name": own["name"],
        "description": own.get("description"),
        "custom_data": own.get("customData", {}),
        "created_at": record.facts.get("createdAt"),
        "updated_at": record.facts.get("updatedAt"),
        "deleted_at": record.deleted_at,
    }


def _member_row(record: Record) -> dict[str, Any] | None:
    present = record.groups["present"]
    if not present.content or record.deleted_at is not None:
        return None
    organization, user = record.key.organization_and_user
    return {
        "logto_organization_id": organization.id,
        "logto_user_id": user.id,
        "joined_at": record.facts.get("addedAt"),
    }


def _identities(record: Record) -> list[dict[str, Any]]:
    identities = record.own.get("identities", {}) if record.deleted_at is None else {}
    found: dict[str, dict[str, Any]] = {}  # by target: of two, the first that is spelt so
    for target, identity in sorted(identities.items()):
        told = identity if isinstance(identity, dict) else {}
        user_id, name = told.get("userId"), _as_key(target)
        row = {
            "logto_user_id": record.key.id,
            "target": name,
            "identity_id": _clean(user_id) if isinstance(user_id, str) else None,
            "details": told.get("details"),
        }
        found.setdefault(name, row)
    return list(found.values())


def _as_key(text: str) -> str:
    """A text for a primary key: one that no index takes is cut, and ends in its digest."""
    if len(text) <= KEY_LENGTH:
        return str(_clean(text))
    return f"{_clean(text[:KEY_LENGTH])}…{canonical.digest(text).hex()}"


def _user_roles(record: Record) -> list[dict[str, Any]]:
    roles = [(name, group) for name, group in record.groups.items() if name.startswith(ROLE)]
    return [
        {
            "logto_user_id": record.key.id,
            "role_id": _clean(name.removeprefix(ROLE)),
            "name": _clean(group.content),
            "read_at": group.read_at,
        }
        for name, group in sorted(roles)
        if group.content is not None and record.deleted_at is None
    ]


def _member_roles(record: Record) -> list[dict[str, Any]]:
    row, roles = row_of(record), record.groups[ROLES]
    if row is None or record.roles_are_old:
        return []
    ends = {name: row[name] for name in ("logto_organization_id", "logto_user_id")}
    return [
        ends | {"role_id": _clean(role_id), "name": _clean(name)}
        for role_id, name in sorted(roles.content.items())
    ]


def _content(record: Record, group: str, otherwise: Any) -> Any:
    return record.groups[group].content if group in record.groups else otherwise


_ROWS = {"user": _user_row, "organization": _organization_row, "membership": _member_row}
