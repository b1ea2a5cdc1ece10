"""Finding people and organizations in the mirror, for commands."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa

from logto_webhooks.adapters.stores.schema import members, organizations, records, users
from logto_webhooks.core.ports import Found


def users_like(connection: sa.Connection, query: str, limit: int) -> list[Found]:
    """Users whose Logto id, local id, email, phone or username is `query`; else contains it."""
    exact = [users.c.logto_user_id, users.c.phone, users.c.username]
    parts = [users.c.email, users.c.username, users.c.name, users.c.phone]
    rows = _rows(connection, users, query, limit, exact, [users.c.email], parts)
    return [
        _found(connection, "user", row["logto_user_id"], row, members.c.logto_organization_id)
        for row in rows
    ]


def organizations_like(connection: sa.Connection, query: str, limit: int) -> list[Found]:
    """Organizations whose Logto id, local id or name is `query`; else whose name contains it."""
    exact = [organizations.c.logto_organization_id]
    name = [organizations.c.name]
    rows = _rows(connection, organizations, query, limit, exact, name, name)
    return [
        _found(
            connection, "organization", row["logto_organization_id"], row, members.c.logto_user_id
        )
        for row in rows
    ]


def _rows(
    connection: sa.Connection,
    table: sa.Table,
    query: str,
    limit: int,
    exact: list[sa.Column[Any]],
    any_case: list[sa.Column[Any]],
    parts: list[sa.Column[Any]],
) -> list[dict[str, Any]]:
    same = [column == query for column in exact]
    same += [sa.func.lower(column) == query.lower() for column in any_case]
    same += [table.c.id == local_id for local_id in _uuids(query)]
    alike = [column.icontains(query, autoescape=True) for column in parts]
    for conditions in (same, alike):
        found = connection.execute(
            sa.select(table).where(sa.or_(*conditions)).order_by(table.c.id).limit(limit)
        )
        rows = [dict(row) for row in found.mappings()]
        if rows:
            return rows
    return []


def _uuids(query: str) -> list[str]:
    try:
        return [str(uuid.UUID(query))]
    except ValueError:
        return []


def _found(
    connection: sa.Connection, kind: str, logto_id: str, row: dict[str, Any], other: sa.Column[Any]
) -> Found:
    side = {
        "user": members.c.logto_user_id,
        "organization": members.c.logto_organization_id,
    }[kind]
    waiting = connection.scalar(
        sa.select(records.c.waiting_reason).where(
            records.c.kind == kind, records.c.logto_id == logto_id
        )
    )
    others = connection.scalars(sa.select(other).where(side == logto_id).order_by(other))
    return Found(row=row, waiting_for=waiting, memberships=list(others))
