"""Mapped tables whose rows the database would delete or change with those of other tables."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.cascades import OneMapping
from logto_webhooks.mapping.declare import EntityMapping, declare_entities
from logto_webhooks.mapping.declare_pairs import (
    declare_member_roles,
    declare_members,
    declare_user_roles,
)


def own_id() -> sa.Column[Any]:
    return sa.Column("id", sa.Integer, primary_key=True)


def refer(name: str, referred: Any, on_delete: str | None = "CASCADE") -> sa.Column[Any]:
    """A column with a foreign key."""
    return sa.Column(name, sa.ForeignKey(referred, ondelete=on_delete))


def make_users(metadata: sa.MetaData, *columns: sa.Column[Any]) -> sa.Table:
    key: sa.Column[Any] = sa.Column("logto_id", sa.Text, unique=True)
    return sa.Table("users", metadata, own_id(), key, *columns)


def make_teams(metadata: sa.MetaData, **options: Any) -> sa.Table:
    key: sa.Column[Any] = sa.Column("logto_id", sa.Text, unique=True)
    return sa.Table("teams", metadata, own_id(), key, **options)


def map_users(table: sa.Table, when_deleted: Any = "delete") -> EntityMapping:
    return declare_entities("user", table, key="logto_id", columns={}, when_deleted=when_deleted)


def map_teams(table: sa.Table) -> EntityMapping:
    return declare_entities(
        "organization", table, key="logto_id", columns={}, when_deleted="delete"
    )


def add_all(*mappings: OneMapping) -> None:
    added = Mappings()
    for mapping in mappings:
        added.add(mapping)


def refuse(problem: str, *mappings: OneMapping) -> None:
    """The last of the mappings is refused, and also the first one, if it comes last."""
    for ordered in (mappings, mappings[::-1]):
        with pytest.raises(InvalidMapping, match=problem):
            add_all(*ordered)


def test_a_role_that_would_go_with_an_organization_is_refused() -> None:
    """Although no end of the role is an organization."""
    metadata = sa.MetaData()
    teams = make_teams(metadata)
    roles = sa.Table(
        "user_roles",
        metadata,
        own_id(),
        sa.Column("user_id", sa.Text),
        sa.Column("role", sa.Text),
        refer("team_id", teams.c.id),
    )
    mapping = declare_user_roles(roles, user="user_id", role="role")
    problem = "of user_roles can't be registered: because of ON DELETE CASCADE on team_id, .* teams"
    refuse(f"{problem} is, .*: use ON DELETE SET NULL, or another", map_teams(teams), mapping)


def test_a_role_that_would_go_with_another_role_is_refused() -> None:
    """Such as one by which it was granted."""
    metadata = sa.MetaData()
    granting = sa.Table(
        "user_roles", metadata, own_id(), sa.Column("user", sa.Text), sa.Column("role", sa.Text)
    )
    granted = sa.Table(
        "member_roles",
        metadata,
        own_id(),
        *(sa.Column(name, sa.Text) for name in ("team", "user", "role")),
        refer("granted_by", granting.c.id),
    )
    refuse(
        "ON DELETE CASCADE on granted_by, .* still exists: use ON DELETE SET NULL.$",
        declare_user_roles(granting, user="user", role="role"),
        declare_member_roles(granted, organization="team", user="user", role="role"),
    )


def test_a_column_that_must_have_a_value_cannot_be_emptied_instead() -> None:
    """So the action must go."""
    metadata = sa.MetaData()
    teams = make_teams(metadata)
    key = sa.ForeignKey(teams.c.id, ondelete="CASCADE")
    users = make_users(metadata, sa.Column("team", key, nullable=False, server_default="1"))
    problem = "on team, .* still exists: drop this action, or another when_deleted, if"
    refuse(problem, map_teams(teams), map_users(users))


@pytest.mark.parametrize("is_end", [True, False])
def test_a_membership_that_would_go_by_way_of_another_table_is_refused(is_end: bool) -> None:
    """Such as with the user who has sent an invitation."""
    metadata = sa.MetaData()
    users = make_users(metadata)
    between = sa.Table(
        "invitations",
        metadata,
        sa.Column("id", sa.Text, primary_key=True),
        refer("sent_by", users.c.id),
    )
    members = sa.Table(
        "members",
        metadata,
        own_id(),
        sa.Column("team", sa.Text),
        sa.Column("user", sa.Text),
        refer("invitation", between.c.id),
    )
    user = "invitation" if is_end else "user"
    refuse(
        f"CASCADE on invitation, .*: {'drop this action' if is_end else 'use ON DELETE SET NULL'}",
        map_users(users),
        declare_members(members, organization="team", user=user),
    )


def test_a_row_may_go_with_its_own_user_or_membership() -> None:
    """Also by way of a table with the same values, or of a foreign key of two columns."""
    metadata = sa.MetaData()
    users, teams = make_users(metadata), make_teams(metadata)
    key = sa.ForeignKey(users.c.logto_id, ondelete="CASCADE")
    accounts = sa.Table("accounts", metadata, sa.Column("logto_id", sa.Text, key, primary_key=True))
    members = sa.Table(
        "members",
        metadata,
        sa.Column("team", sa.ForeignKey(teams.c.id, ondelete="CASCADE"), primary_key=True),
        sa.Column("user", sa.ForeignKey(accounts.c[0], ondelete="CASCADE"), primary_key=True),
    )
    roles = sa.Table(
        "member_roles",
        metadata,
        own_id(),
        *(sa.Column(name, members.c[name].type) for name in ("team", "user")),
        sa.Column("role", sa.Text),
        sa.ForeignKeyConstraint(["team", "user"], [*members.c], ondelete="CASCADE"),
    )
    pairs: dict[str, Any] = {"organization": "team", "user": "user"}
    member_roles = declare_member_roles(roles, **pairs, role="role")
    add_all(map_users(users), map_teams(teams), declare_members(members, **pairs), member_roles)
    add_all(map_users(users), map_teams(teams), member_roles)


@pytest.mark.parametrize("referred", ["object", "name"])
@pytest.mark.parametrize("schema", [None, "public", "app"])
def test_a_row_that_would_go_with_that_of_another_base_is_refused(
    schema: str | None, referred: str
) -> None:
    """Whether the foreign key has the other base's table, or only its name."""
    teams = make_teams(sa.MetaData(schema=schema))
    name = "app.teams.id" if schema == "app" else "teams.id"
    users = make_users(sa.MetaData(), refer("team", teams.c.id if referred == "object" else name))
    refuse("of users .* ON DELETE CASCADE on team,", map_teams(teams), map_users(users))


def test_a_row_that_would_go_by_way_of_another_base_is_refused() -> None:
    """The table in between is declared beside neither of them."""
    teams = make_teams(sa.MetaData())
    rooms = sa.Table("rooms", sa.MetaData(), own_id(), refer("team", teams.c.id))
    users = make_users(sa.MetaData(), refer("room", rooms.c.id))
    refuse("of users .* ON DELETE CASCADE on room,", map_teams(teams), map_users(users))


def test_a_table_of_another_schema_is_another_one() -> None:
    """Although it has the same name."""
    metadata = sa.MetaData()
    teams, others = make_teams(metadata), make_teams(metadata, schema="old")
    users = make_users(metadata, refer("team", others.c.id))
    add_all(map_teams(teams), map_users(users))
    refuse("of users .* ON DELETE CASCADE on team,", map_teams(others), map_users(users))


def make_profiles(metadata: sa.MetaData, referred: sa.Column[Any], **actions: Any) -> sa.Table:
    key: sa.Column[Any] = sa.Column("logto_id", sa.ForeignKey(referred, **actions), unique=True)
    return sa.Table("profiles", metadata, own_id(), key, sa.Column("phone", sa.Text))


@pytest.mark.parametrize(
    ("action", "when_deleted", "is_refused"),
    [
        ("ON DELETE SET NULL", "delete", True),
        ("ON DELETE SET DEFAULT", "delete", True),
        ("ON DELETE CASCADE", "delete", True),
        ("ON DELETE SET NULL", "unlink", False),
        ("ON UPDATE CASCADE", "unlink", True),
        ("ON UPDATE SET NULL", "unlink", True),
        ("ON UPDATE SET DEFAULT", "unlink", True),
        ("ON UPDATE CASCADE", "delete", False),
        ("ON UPDATE CASCADE", "keep", False),
        ("ON DELETE NO ACTION", "delete", False),
    ],
)
@pytest.mark.parametrize("is_far", [True, False])
def test_a_key_that_the_database_would_change_is_refused(
    is_far: bool, action: str, when_deleted: Any, is_refused: bool
) -> None:
    """The row would stay, and nobody would know whose it was."""
    metadata = sa.MetaData()
    users = make_users(metadata)
    _, event, what = action.split(" ", 2)
    actions: dict[str, Any] = {f"on{event.lower()}": what}
    referred = users.c.logto_id
    if is_far:  # by way of a table that isn't mapped
        follows: dict[str, Any] = {f"on{event.lower()}": "CASCADE"}
        own = sa.Column("own", sa.Text, sa.ForeignKey(referred, **follows), primary_key=True)
        referred = sa.Table("accounts", metadata, own).c.own
    mappings = (
        map_users(users, when_deleted),
        map_users(make_profiles(metadata, referred, **actions)),
    )
    if is_refused:
        refuse(f"of profiles can't be registered: because of {action} on logto_id,", *mappings)
    else:
        add_all(*mappings)


def test_a_key_that_refers_to_what_a_deletion_clears_is_refused() -> None:
    """`when_deleted` sets another column than the key of the row to which it refers."""
    metadata = sa.MetaData()
    users = make_users(metadata, sa.Column("subject", sa.Text, unique=True))
    profiles = make_profiles(metadata, users.c.subject, onupdate="CASCADE")
    mapping = declare_entities(
        "user",
        users,
        key="logto_id",
        columns={"subject": "logto_user_id"},
        when_deleted={"subject": None},
    )
    refuse("of profiles .* ON UPDATE CASCADE on logto_id,", mapping, map_users(profiles))


def test_a_key_that_would_be_emptied_says_what_to_do() -> None:
    """In one line."""
    metadata = sa.MetaData()
    users = make_users(metadata)
    profiles = make_profiles(metadata, users.c.logto_id, ondelete="SET NULL")
    with pytest.raises(InvalidMapping) as error:
        add_all(map_users(users), map_users(profiles))
    assert str(error.value) == (
        "The mapping of profiles can't be registered: because of ON DELETE SET NULL on logto_id, "
        "the database would change a row's key together with a row of users, and the row would "
        "stay, with a deleted user's data: drop this action."
    )


def test_tables_that_refer_to_each_other_are_followed_once() -> None:
    """Their actions lead to no mapped table, or to one."""
    metadata = sa.MetaData()
    users = make_users(metadata)
    names: dict[str, Any] = {"ondelete": "CASCADE", "onupdate": "CASCADE"}
    for own, other in (("threads", "letters"), ("letters", "threads")):
        key = sa.ForeignKey(f"{other}.id", **names, use_alter=True)
        sa.Table(own, metadata, sa.Column("id", sa.Text, key, primary_key=True))
    threads, letters = metadata.tables["threads"], metadata.tables["letters"]
    profiles = make_profiles(metadata, threads.c.id, **names)
    add_all(map_users(users), map_users(profiles))
    letters.append_column(refer("sender", users.c.id))
    refuse("of profiles .* ON DELETE CASCADE on logto_id,", map_users(users), map_users(profiles))
