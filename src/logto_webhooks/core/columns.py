"""Where the mirror's columns stand in a record: in which group, and under what name.

Seen from a user, its memberships are columns, too: `organizations.ID`; from an organization
`members.ID`.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import UNSET, Struct

from logto_webhooks.core.record import OWN_FIELD, ROLE, ROLES, Key, Kind, Record


class Column(Struct, frozen=True):
    """A column, its group, and its name in the group's content; None where it is all of that."""

    name: str
    group: str
    inside: str | None = None

    def told(self, content: Any) -> Any:
        """The column's value in a content of its group."""
        return content if self.inside is None else content[self.inside]

    def deciding(self, record: Record) -> Column:
        """The same column in the group that decides about it."""
        alone, whole = f"{OWN_FIELD}{self.inside}", record.groups.get(self.group)
        group = record.groups.get(alone) if self.group == "own" else None
        newer = group is not None and (whole is None or group.stamp > whole.stamp)
        return Column(self.name, alone) if newer else self

    def value(self, record: Record) -> Any:
        """The column's value; UNSET as long as nothing is known."""
        column = self.deciding(record)
        if column is not self:
            return column.value(record)
        group = record.groups.get(self.group)
        if group is None:
            return UNSET
        over = record.key.kind == "membership" and record.deleted_at is not None
        return False if over and self.group == "present" else self.told(group.content)


_GROUPED: Final[dict[Kind, tuple[Column, ...]]] = {
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
_FACTS: Final[dict[Kind, dict[str, str]]] = {
    "user": {
        "last_sign_in_at": "lastSignInAt",
        "created_at": "createdAt",
        "updated_at": "updatedAt",
    },
    "organization": {"created_at": "createdAt", "updated_at": "updatedAt"},
}


def columns_of(key: Key, subject: Key) -> tuple[Column, ...]:
    """The columns that stand in groups, of the subject or of one of its memberships."""
    if key.kind == "membership":
        return (Column(_membership(key, subject), "present"),)
    return _GROUPED[key.kind]


def facts_of(key: Key) -> dict[str, str]:
    """The columns that are facts, and what these are called."""
    return _FACTS.get(key.kind, {})


def names_of(kind: Kind) -> list[str]:
    """The names under which a user or an organization is explained."""
    more = ["deleted_at", *(["organizations", ROLES] if kind == "user" else ["members"])]
    return [*(column.name for column in _GROUPED[kind]), *_FACTS[kind], *more]


def label(key: Key, group: str, subject: Key) -> str:
    """What a group is called beside others of the subject and its memberships."""
    name = ROLES if group.startswith(ROLE) else group
    if key.kind != "membership":
        return name
    pair = _membership(key, subject)
    return pair if group == "present" else f"{pair}.{name}"


def is_of(key: Key, subject: Key) -> bool:
    """Whether a record is the subject's own, or of one of its memberships."""
    return key == subject or (key.kind == "membership" and subject in key.organization_and_user)


def _membership(key: Key, subject: Key) -> str:
    organization, user = key.organization_and_user
    return f"organizations.{organization.id}" if subject == user else f"members.{user.id}"
