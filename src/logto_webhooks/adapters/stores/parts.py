"""The rows that hang on a record's own: identities, roles, a member's roles.

There are few of them, and they seldom change: they are read, and only what differs is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from logto_webhooks.adapters.stores.dialect import among
from logto_webhooks.adapters.stores.schema import member_roles, members, user_identities, user_roles
from logto_webhooks.core.mirror import Part, parts_of
from logto_webhooks.core.record import Key, Record

Row = dict[str, Any]
_TABLES: dict[Part, sa.Table] = {
    "identities": user_identities,
    "roles": user_roles,
    "member_roles": member_roles,
}
_HAVE = {
    part: sa.select(table).where(among(table.c.logto_user_id, "users"))
    for part, table in _TABLES.items()
}


def save(connection: sa.Connection, changed: Sequence[Record]) -> None:
    """Make the rows of changed records those that follow from them."""
    wanted: dict[Part, dict[Key, list[Row]]] = {}
    for record in changed:
        for part, rows in parts_of(record).items():
            wanted.setdefault(part, {})[record.key] = rows
    for part, by_record in wanted.items():
        _replace(connection, part, by_record)


def drop(connection: sa.Connection, end: Key, others: Sequence[str] | None = None) -> None:
    """Take the rows of a user's or an organization's memberships out, or of those with `others`,
    but of those that stay."""
    user, organization = member_roles.c.logto_user_id, member_roles.c.logto_organization_id
    mine, theirs = (user, organization) if end.kind == "user" else (organization, user)
    stays = sa.exists().where(
        members.c.logto_organization_id == organization, members.c.logto_user_id == user
    )
    delete = sa.delete(member_roles).where(mine == end.id, sa.not_(stays))
    if others is None:
        connection.execute(delete)
    else:
        connection.execute(delete.where(among(theirs, "others")), {"others": list(others)})


def holders(
    connection: sa.Connection, limit: int, after: str, unread_since: int | None
) -> list[Key]:
    """List users who have a role, by id, from `after` on; those with one not read since."""
    user = user_roles.c.logto_user_id
    query = sa.select(user).where(user > after).distinct()
    if unread_since is not None:
        query = query.where(user_roles.c.read_at < unread_since)
    return [Key("user", each) for each in connection.scalars(query.order_by(user).limit(limit))]


def role_names(connection: sa.Connection, user_id: str) -> list[str]:
    """The names of a user's roles."""
    name = user_roles.c.name
    query = sa.select(name).where(user_roles.c.logto_user_id == user_id).order_by(name)
    return list(connection.scalars(query))


def _replace(connection: sa.Connection, part: Part, by_record: dict[Key, list[Row]]) -> None:
    table = _TABLES[part]
    users = sorted({_user(key) for key in by_record})
    rows = connection.execute(_HAVE[part], {"users": users}).mappings()
    have = {_key(table, row): dict(row) for row in rows if _owner(row) in by_record}
    want = {_key(table, row): row for rows in by_record.values() for row in rows}
    old = [key for key, row in have.items() if want.get(key) != row]
    new = [row for key, row in want.items() if have.get(key) != row]
    if old:
        names = [column.name for column in table.primary_key]
        mine = [table.c[name] == sa.bindparam(f"of_{name}") for name in names]
        given = [{f"of_{name}": each for name, each in zip(names, key, strict=True)} for key in old]
        connection.execute(sa.delete(table).where(*mine), given)
    if new:
        connection.execute(sa.insert(table), new)


def _user(key: Key) -> str:
    return key.organization_and_user[1].id if key.kind == "membership" else key.id


def _owner(row: Any) -> Key:
    organization = row.get("logto_organization_id")
    user = row["logto_user_id"]
    return Key("membership", f"{organization}:{user}") if organization else Key("user", user)


def _key(table: sa.Table, row: Any) -> tuple[Any, ...]:
    return tuple(row[column.name] for column in table.primary_key)
