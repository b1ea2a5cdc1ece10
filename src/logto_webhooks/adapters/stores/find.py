"""Finding people and organizations in the mirror, for commands."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.adapters.stores.parts import role_names
from logto_webhooks.adapters.stores.schema import members, organizations, records, users
from logto_webhooks.core.ports import Found

Column = sa.Column[Any]


class _Side(Struct, frozen=True):
    """How one end of memberships is found; `mine` and `other` in the mirror and in the records."""

    table: sa.Table
    kind: str
    exact: list[Column]
    any_case: list[Column]
    parts: list[Column]
    mine: tuple[Column, Column]
    other: tuple[Column, Column]


_USER = (members.c.logto_user_id, records.c.user_id)
_ORGANIZATION = (members.c.logto_organization_id, records.c.organization_id)

USERS = _Side(
    table=users,
    kind="user",
    exact=[users.c.logto_user_id, users.c.phone, users.c.username],
    any_case=[users.c.email],
    parts=[users.c.email, users.c.username, users.c.name, users.c.phone],
    mine=_USER,
    other=_ORGANIZATION,
)
ORGANIZATIONS = _Side(
    table=organizations,
    kind="organization",
    exact=[organizations.c.logto_organization_id],
    any_case=[organizations.c.name],
    parts=[organizations.c.name],
    mine=_ORGANIZATION,
    other=_USER,
)
SIDES = {"user": USERS, "organization": ORGANIZATIONS}


def find(connection: sa.Connection, side: _Side, query: str, limit: int) -> list[Found]:
    """Find rows by what names them; else by a part of it, those that are deleted last.

    An empty query finds all.
    """
    order = (side.table.c.deleted_at.is_not(None), side.table.c.id)
    same = [column == query for column in side.exact]
    same += [sa.func.lower(column) == query.lower() for column in side.any_case]
    same += [side.table.c.id == local_id for local_id in _uuids(query)]
    alike = [column.icontains(query, autoescape=True) for column in side.parts]
    if not query:
        alike.append(sa.true())
    for conditions in (same, alike):
        wanted = sa.select(side.table).where(sa.or_(*conditions))
        rows = connection.execute(wanted.order_by(*order).limit(limit)).mappings().all()
        if rows:
            return [_found(connection, side, dict(row)) for row in rows]
    return []


def _found(connection: sa.Connection, side: _Side, row: dict[str, Any]) -> Found:
    logto_id = row[f"logto_{side.kind}_id"]
    (mine, mine_known), (other, other_known) = side.mine, side.other
    own = (records.c.kind == side.kind, records.c.logto_id == logto_id)
    memberships = sa.select(other).where(mine == logto_id).order_by(other)
    in_doubt = sa.select(other_known).where(mine_known == logto_id, records.c.doubtful)
    return Found(
        row=row,
        waiting_for=connection.scalar(sa.select(records.c.waiting_reason).where(*own)),
        memberships=list(connection.scalars(memberships)),
        memberships_in_doubt=list(connection.scalars(in_doubt.order_by(other_known))),
        roles=role_names(connection, logto_id) if side is USERS else [],
    )


def _uuids(query: str) -> list[str]:
    try:
        return [str(uuid.UUID(query))]
    except ValueError:
        return []
