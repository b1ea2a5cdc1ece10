"""Select rows of the mirror by what a handler can be run for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.schema import members, organizations, users
from logto_webhooks.records.record import Key, Kind, membership


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


class MirrorPage(Struct, frozen=True):
    """Records of the next rows that match, and the last row that was looked at; None at the end."""

    keys: list[Key]
    last: Key | None


class Mirror:
    """Lists the rows of records that exist, without locks."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def count(self, kind: Kind, wanted: RowFilter) -> int:
        """Count the rows that match."""
        rows = _select_rows(kind, wanted).subquery()
        joined, is_wanted = _join(kind, wanted, rows)
        query = sa.select(sa.func.count()).select_from(joined).where(is_wanted)
        return self._connection.scalar(query) or 0

    def list_page(self, kind: Kind, wanted: RowFilter, after: Key | None, limit: int) -> MirrorPage:
        """Look at the next `limit` rows after a record, by their IDs in Logto, and return those
        that match. So a page takes the same time, however many rows there are, and match."""
        query = _select_rows(kind, wanted)
        columns = list(query.selected_columns)
        if after is not None:
            ids = [end.id for end in after.ends]
            query = query.where(
                sa.tuple_(*columns) > sa.tuple_(*ids) if ids[1:] else columns[0] > ids[0]
            )
        rows = query.order_by(*columns).limit(limit).subquery()
        joined, is_wanted = _join(kind, wanted, rows)
        page = sa.select(*rows.c, is_wanted.label("is_wanted")).select_from(joined)
        looked_at = self._connection.execute(page.order_by(*rows.c)).all()
        keys = [(_to_key(kind, row[:-1]), row.is_wanted) for row in looked_at]
        last = keys[-1][0] if len(keys) == limit else None
        return MirrorPage([key for key, is_wanted in keys if is_wanted], last)


def _to_key(kind: Kind, ids: Sequence[str]) -> Key:
    return membership(*ids) if kind == "membership" else Key(kind, ids[0])


def _select_rows(kind: Kind, wanted: RowFilter) -> sa.Select[Any]:
    """Select the IDs of the rows with the wanted IDs, which may not match otherwise."""
    organization, user = (members.c[f"logto_{end}_id"] for end in ("organization", "user"))
    if kind == "organization":
        organization = organizations.c.logto_organization_id
        query = sa.select(organization)
    elif kind == "membership":
        query = sa.select(organization, user)
    elif wanted.organization is not None:
        query = sa.select(user)
    else:
        user = users.c.logto_user_id
        query = sa.select(user)
    if wanted.organization is not None:
        query = query.where(organization == wanted.organization)
    if wanted.user is not None and kind != "organization":
        query = query.where(user == wanted.user)
    return query


def _join(
    kind: Kind, wanted: RowFilter, rows: sa.Subquery
) -> tuple[sa.FromClause, sa.ColumnElement[bool]]:
    """Join such rows to their user and organization. Return also the condition for a match."""
    joined: sa.FromClause = rows
    conditions: list[sa.ColumnElement[bool]] = []
    for name, table in (("logto_user_id", users), ("logto_organization_id", organizations)):
        if name in rows.c:
            end = table.alias()
            joined = joined.outerjoin(end, end.c[name] == rows.c[name])
            conditions += [end.c.id.is_not(None), end.c.deleted_at.is_(None)]
            if table is users or kind == "organization":
                conditions += _list_conditions(end, wanted)
    return joined, sa.and_(*conditions)


def _list_conditions(end: sa.FromClause, wanted: RowFilter) -> list[sa.ColumnElement[bool]]:
    """List the conditions on the row of a user or an organization, besides its ID."""
    conditions: list[sa.ColumnElement[bool]] = []
    if wanted.since is not None:
        conditions.append(end.c.created_at >= wanted.since)
    if wanted.until is not None:
        conditions.append(end.c.created_at < wanted.until)
    if wanted.email is not None and "email" in end.c:
        conditions.append(end.c.email.icontains(wanted.email, autoescape=True))
    return conditions
