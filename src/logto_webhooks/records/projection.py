"""Project a record onto the rows of the mirror tables."""

from __future__ import annotations

import re
from typing import Any, Final, Literal

from msgspec import UNSET, Struct

from logto_webhooks import canonical_json
from logto_webhooks.records.record import OWN_FIELD, ROLE, ROLES, Key, Kind, Record


class Column(Struct, frozen=True):
    """A column of a group. `inside` is its field in the content; None if it is the content."""

    name: str
    group: str
    inside: str | None = None

    def read(self, content: Any) -> Any:
        """Return the column's value from a content of its group."""
        return content if self.inside is None else content[self.inside]

    def resolve(self, record: Record) -> Column:
        """Return the column in the group that has its newest value."""
        alone, whole = f"{OWN_FIELD}{self.inside}", record.groups.get(self.group)
        group = record.groups.get(alone) if self.group == "own" else None
        newer = group is not None and (whole is None or group.stamp > whole.stamp)
        return Column(self.name, alone) if newer else self

    def value(self, record: Record) -> Any:
        """Return the column's value; UNSET if it is unknown."""
        column = self.resolve(record)
        if column is not self:
            return column.value(record)
        group = record.groups.get(self.group)
        if group is None:
            return UNSET
        over = record.key.kind == "membership" and record.deleted_at is not None
        return False if over and self.group == "present" else self.read(group.content)


_GROUP_COLUMNS: Final[dict[Kind, tuple[Column, ...]]] = {
    "user": (
        Column("username", "own", "username"),
        Column("email", "own", "primaryEmail"),
        Column("phone", "own", "primaryPhone"),
        Column("name", "own", "name"),
        Column("avatar", "own", "avatar"),
        Column("identities", "own", "identities"),
        Column("profile", "profile"),
        Column("custom_data", "custom_data"),
        Column("is_suspended", "suspension"),
    ),
    "organization": (
        Column("name", "own", "name"),
        Column("description", "own", "description"),
        Column("custom_data", "own", "customData"),
    ),
}
_FACT_COLUMNS: Final[dict[Kind, dict[str, str]]] = {
    "user": {
        "last_sign_in_at": "lastSignInAt",
        "created_at": "createdAt",
        "updated_at": "updatedAt",
    },
    "organization": {"created_at": "createdAt", "updated_at": "updatedAt"},
}


def columns_for(key: Key, subject: Key) -> tuple[Column, ...]:
    """Return the columns with groups, of the subject or one of its memberships."""
    if key.kind == "membership":
        return (Column(_label_membership(key, subject), "present"),)
    return _GROUP_COLUMNS[key.kind]


def fact_columns(key: Key) -> dict[str, str]:
    """Return the columns that are facts, with the facts' names."""
    return _FACT_COLUMNS.get(key.kind, {})


def column_names(kind: Kind) -> list[str]:
    """Return the names by which `explain` can be asked about a user or an organization."""
    others = ["deleted_at", *(["organizations", ROLES] if kind == "user" else ["members"])]
    return [*(column.name for column in _GROUP_COLUMNS[kind]), *_FACT_COLUMNS[kind], *others]


def column_label(key: Key, group: str, subject: Key) -> str:
    """Name a group among all groups of the subject and its memberships."""
    name = ROLES if group.startswith(ROLE) else group
    if key.kind != "membership":
        return name
    pair = _label_membership(key, subject)
    return pair if group == "present" else f"{pair}.{name}"


def belongs_to(key: Key, subject: Key) -> bool:
    """Whether a record is the subject's, or one of its memberships."""
    return key == subject or (key.kind == "membership" and subject in key.organization_and_user)


def _label_membership(key: Key, subject: Key) -> str:
    organization, user = key.organization_and_user
    return f"organizations.{organization.id}" if subject == user else f"members.{user.id}"


KEY_LENGTH: Final = 256  # characters of a text in a primary key
Part = Literal["identities", "roles", "member_roles"]


def project(record: Record) -> dict[str, Any] | None:
    """Return a record's row of the mirror, by column; None if there is none (yet)."""
    if not record.complete:
        return None
    row = _PROJECTIONS[record.key.kind](record)
    return row and {name: _remove_nul(value) for name, value in row.items()}


def live_row(record: Record) -> dict[str, Any] | None:
    """Like `project`, but return None for a deleted record."""
    return None if record.deleted_at is not None else project(record)


def child_rows(record: Record) -> dict[Part, list[dict[str, Any]]]:
    """Return the child rows of a record, for each part that is known."""
    parts: dict[Part, list[dict[str, Any]]] = {}
    if record.key.kind == "user":
        if record.complete:
            parts["identities"] = _project_identities(record)
        if any(name.startswith(ROLE) for name in record.groups):
            parts["roles"] = _project_user_roles(record)
    elif ROLES in record.groups:
        parts["member_roles"] = _project_member_roles(record)
    return parts


def without_nul(value: Any) -> Any:
    """Remove NUL from all text in a JSON value, because not all databases can store it."""
    text = canonical_json.encode(value)
    if b"\\u0000" not in text:
        return value
    # Replace in the text, because the value may be nested too deep for recursion.
    return canonical_json.decode(_NUL.sub(rb"\1", text))


_NUL: Final = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")


def _remove_nul(value: Any) -> Any:
    return value.replace("\0", "") if isinstance(value, str) else value


def _project_user(record: Record) -> dict[str, Any]:
    own = record.own
    return {
        "logto_user_id": record.key.id,
        "username": own.get("username"),
        "email": own.get("primaryEmail"),
        "phone": own.get("primaryPhone"),
        "name": own.get("name"),
        "avatar": own.get("avatar"),
        "identities": own.get("identities", {}),
        "profile": _get_content(record, "profile", {}),
        "custom_data": _get_content(record, "custom_data", {}) | {"logtoUserId": record.key.id},
        "is_suspended": _get_content(record, "suspension", False),
        "last_sign_in_at": record.facts.get("lastSignInAt"),
        "created_at": record.facts.get("createdAt"),
        "updated_at": record.facts.get("updatedAt"),
        "deleted_at": record.deleted_at,
    }


def _project_organization(record: Record) -> dict[str, Any]:
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


def _project_member(record: Record) -> dict[str, Any] | None:
    present = record.groups["present"]
    if not present.content or record.deleted_at is not None:
        return None
    organization, user = record.key.organization_and_user
    return {
        "logto_organization_id": organization.id,
        "logto_user_id": user.id,
        "joined_at": record.facts.get("addedAt"),
    }


def _project_identities(record: Record) -> list[dict[str, Any]]:
    identities = record.own.get("identities", {}) if record.deleted_at is None else {}
    rows: dict[str, dict[str, Any]] = {}  # by target; the first wins if two become equal
    for target, identity in sorted(identities.items()):
        fields = identity if isinstance(identity, dict) else {}
        user_id, name = fields.get("userId"), _to_key(target)
        row = {
            "logto_user_id": record.key.id,
            "target": name,
            "identity_id": _remove_nul(user_id) if isinstance(user_id, str) else None,
            "details": fields.get("details"),
        }
        rows.setdefault(name, row)
    return list(rows.values())


def _to_key(text: str) -> str:
    """Make a text for a primary key: one too long for an index is cut and ends in its digest."""
    if len(text) <= KEY_LENGTH:
        return str(_remove_nul(text))
    return f"{_remove_nul(text[:KEY_LENGTH])}…{canonical_json.digest(text).hex()}"


def _project_user_roles(record: Record) -> list[dict[str, Any]]:
    roles = [(name, group) for name, group in record.groups.items() if name.startswith(ROLE)]
    return [
        {
            "logto_user_id": record.key.id,
            "role_id": _remove_nul(name.removeprefix(ROLE)),
            "name": _remove_nul(group.content),
            "read_at": group.read_at,
        }
        for name, group in sorted(roles)
        if group.content is not None and record.deleted_at is None
    ]


def _project_member_roles(record: Record) -> list[dict[str, Any]]:
    row, roles = project(record), record.groups[ROLES]
    if row is None or record.roles_are_old:
        return []
    ends = {name: row[name] for name in ("logto_organization_id", "logto_user_id")}
    return [
        ends | {"role_id": _remove_nul(role_id), "name": _remove_nul(name)}
        for role_id, name in sorted(roles.content.items())
    ]


def _get_content(record: Record, group: str, otherwise: Any) -> Any:
    return record.groups[group].content if group in record.groups else otherwise


_PROJECTIONS = {
    "user": _project_user,
    "organization": _project_organization,
    "membership": _project_member,
}
