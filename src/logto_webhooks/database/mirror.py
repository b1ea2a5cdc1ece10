"""Select rows of the mirror by what a handler can be run for."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.schema import members, organizations, users
from logto_webhooks.records.record import Key, Kind, membership

_pair = (members.c.logto_organization_id, members.c.logto_user_id)
_user_id = users.c.logto_user_id
_organization_id = organizations.c.logto_organization_id


class RowFilter(Struct, frozen=True, kw_only=True):
    """Which users, organizations and members to select. All conditions must match.

    `user` and `organization` are Logto's ids. An organization also selects its members, as users
    and as members. `email` is a part of a user's email, in any case. `since` and `until`
    (exclusive) limit when the user or the organization was created in Logto, in milliseconds: of a
    member, the user.
    """

    user: str | None = None
    organization: str | None = None
    email: str | None = None
    since: int | None = None
    until: int | None = None

    @property
    def is_of_users(self) -> bool:
        """Whether it selects users, and so no organizations."""
        return self.user is not None or self.email is not None


class Mirror:
    """Lists the rows of records that exist, without locks."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def count(self, kind: Kind, wanted: RowFilter) -> int:
        """Count the rows."""
        rows = _select(kind, wanted).subquery()
        return self._connection.scalar(sa.select(sa.func.count()).select_from(rows)) or 0

    def list_keys(self, kind: Kind, wanted: RowFilter, after: Key | None, limit: int) -> list[Key]:
        """List the records of the rows after a record, ordered by their IDs in Logto."""
        query = _select(kind, wanted)
        if after is not None:
            query = query.where(_is_after(kind, after))
        rows = self._connection.execute(query.order_by(*_key_columns(kind)).limit(limit))
        return [membership(*row) if kind == "membership" else Key(kind, row[0]) for row in rows]


def _key_columns(kind: Kind) -> tuple[sa.Column[Any], ...]:
    if kind == "membership":
        return _pair
    return (_user_id,) if kind == "user" else (_organization_id,)


def _is_after(kind: Kind, after: Key) -> sa.ColumnElement[bool]:
    if kind == "membership":
        organization, user = after.organization_and_user
        return sa.tuple_(*_pair) > sa.tuple_(organization.id, user.id)
    [column] = _key_columns(kind)
    return column > after.id


def _select(kind: Kind, wanted: RowFilter) -> sa.Select[Any]:
    query = sa.select(*_key_columns(kind))
    if kind == "organization":
        return query.where(*_list_conditions(organizations, wanted))
    query = query.where(*_list_conditions(users, wanted))
    if kind == "membership":
        # Only those whose user and organization are here.
        query = query.join(users, _user_id == _pair[1])
        query = query.join(organizations, _organization_id == _pair[0])
        query = query.where(organizations.c.deleted_at.is_(None))
        if wanted.organization is not None:
            query = query.where(_pair[0] == wanted.organization)
    elif wanted.organization is not None:
        of_organization = sa.select(_pair[1]).where(_pair[0] == wanted.organization)
        query = query.where(_user_id.in_(of_organization))
    return query


def _list_conditions(table: sa.Table, wanted: RowFilter) -> list[sa.ColumnElement[bool]]:
    """List the conditions on a row of a user or an organization."""
    conditions: list[sa.ColumnElement[bool]] = [table.c.deleted_at.is_(None)]
    if wanted.since is not None:
        conditions.append(table.c.created_at >= wanted.since)
    if wanted.until is not None:
        conditions.append(table.c.created_at < wanted.until)
    if table is organizations:
        if wanted.organization is not None:
            conditions.append(_organization_id == wanted.organization)
        return conditions
    if wanted.user is not None:
        conditions.append(_user_id == wanted.user)
    if wanted.email is not None:
        conditions.append(users.c.email.icontains(wanted.email, autoescape=True))
    return conditions
