"""The application whose processes are killed: Logto's records fill three tables of its own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import sqlalchemy as sa

from logto_webhooks import LogtoWebhooks
from logto_webhooks.database.schema import mapped_rows, members, organizations, users

metadata = sa.MetaData()
own_users = sa.Table(
    "crash_users",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("logto_id", sa.Text, unique=True, nullable=False),
    sa.Column("email", sa.Text, unique=True),
    sa.Column("name", sa.Text),
    sa.Column("active", sa.Boolean, nullable=False),
)
own_teams = sa.Table(
    "crash_teams",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("logto_id", sa.Text, unique=True, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
)
own_members = sa.Table(
    "crash_team_members",
    metadata,
    sa.Column("team_id", sa.ForeignKey(own_teams.c.id), primary_key=True),
    sa.Column("user_id", sa.ForeignKey(own_users.c.id), primary_key=True),
)

logto = LogtoWebhooks.from_env()
logto.map_users(
    own_users,
    key="logto_id",
    columns={"email": "email", "name": "name", "active": lambda user: not user.is_suspended},
    when_deleted="delete",
)
logto.map_organizations(own_teams, key="logto_id", columns={"name": "name"}, when_deleted="delete")
logto.map_members(own_members, organization="team_id", user="user_id")


def count_unsettled(connection: sa.Connection) -> int:
    """Count the rows that wait, conflict or are owed."""
    settled = mapped_rows.c.state.in_(["ok", "former"])
    query = sa.select(sa.func.count()).select_from(mapped_rows).where(~settled)
    return int(connection.scalar(query) or 0)


def count_wrong_rows(connection: sa.Connection) -> int:
    """Count the rows that are missing, left over, there twice, or have other values."""
    own_pairs = sa.select(own_teams.c.logto_id, own_users.c.logto_id)
    own_pairs = own_pairs.select_from(own_members.join(own_teams).join(own_users))
    pairs = sa.select(members.c.logto_organization_id, members.c.logto_user_id)
    pairs = pairs.join(organizations, _is_same(members, organizations, "logto_organization_id"))
    pairs = pairs.join(users, _is_same(members, users, "logto_user_id"))
    user_columns = (users.c.logto_user_id, users.c.email, users.c.name, ~users.c.is_suspended)
    team_columns = (organizations.c.logto_organization_id, organizations.c.name)
    comparisons: list[tuple[sa.Select[Any], sa.Select[Any]]] = [
        (sa.select(*list(own_users.c)[1:]), sa.select(*user_columns).where(_is_here(users))),
        (
            sa.select(*list(own_teams.c)[1:]),
            sa.select(*team_columns).where(_is_here(organizations)),
        ),
        (own_pairs, pairs.where(_is_here(users), _is_here(organizations))),
    ]
    wrong = 0
    for own, mirror in comparisons:
        ours = Counter(tuple(row) for row in connection.execute(own))
        theirs = Counter(tuple(row) for row in connection.execute(mirror))
        wrong += ((ours - theirs) + (theirs - ours)).total()
    return wrong


def _is_here(table: sa.Table) -> sa.ColumnElement[bool]:
    return table.c.deleted_at.is_(None)


def _is_same(one: sa.Table, other: sa.Table, name: str) -> sa.ColumnElement[bool]:
    return one.c[name] == other.c[name]
