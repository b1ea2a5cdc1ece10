"""Mappings of roles are checked when they are registered."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from logto_webhooks import InvalidMapping, LogtoWebhooks
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.declare import EntityMapping, declare_entities
from logto_webhooks.mapping.declare_pairs import (
    PairMapping,
    RoleEnd,
    declare_member_roles,
    declare_members,
    declare_user_roles,
)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)


class Role(Base):
    __tablename__ = "roles"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    title: Mapped[str]


class Plain(Base):
    """A table of roles without names."""

    __tablename__ = "plain_roles"

    id: Mapped[str] = mapped_column(primary_key=True)


class Member(Base):
    __tablename__ = "members"

    id: Mapped[int] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id))


class Pair(Base):
    """A table of members whose primary key has two columns."""

    __tablename__ = "pairs"

    team_id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id), primary_key=True)


class UserRole(Base):
    __tablename__ = "user_roles"

    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id), primary_key=True)
    role_id: Mapped[int] = mapped_column(sa.ForeignKey(Role.id), primary_key=True)
    plain_id: Mapped[str | None] = mapped_column(sa.ForeignKey(Plain.id))
    by_name: Mapped[str | None] = mapped_column(sa.ForeignKey(Role.name))
    role: Mapped[str | None]
    since: Mapped[str | None]


class MemberRole(Base):
    __tablename__ = "member_roles"
    __table_args__ = (
        sa.ForeignKeyConstraint(["team_id", "user_id"], [Pair.team_id, Pair.user_id]),
    )

    member_id: Mapped[int] = mapped_column(sa.ForeignKey(Member.id), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str | None]
    user_id: Mapped[int | None]


def declare(**options: Any) -> PairMapping:
    return declare_user_roles(UserRole, **{"user": "user_id", "role": "role_id"} | options)


@pytest.mark.parametrize(
    ("role", "role_by", "by", "match", "referred"),
    [
        ("role_id", None, "name", "roles.name", ["roles.id"]),
        ("role_id", "name", "name", "roles.name", ["roles.id"]),
        ("role_id", Role.title, "name", "roles.title", ["roles.id"]),
        ("by_name", None, "name", "roles.name", ["roles.name"]),
        ("plain_id", "id", "id", "plain_roles.id", ["plain_roles.id"]),
        ("plain_id", Plain.id, "name", "plain_roles.id", ["plain_roles.id"]),
        ("role", None, "id", "None", []),
        ("role", "name", "name", "None", []),
    ],
)
def test_role_by_says_what_a_role_is_found_by(
    role: str, role_by: Any, by: str, match: str, referred: list[str]
) -> None:
    """A foreign key by the name of your own role, any other column by Logto's id."""
    defaults = {} if role == "role_id" else {"role_id": 1}
    end = declare(role=role, role_by=role_by, create_defaults=defaults).ends[-1]
    assert isinstance(end, RoleEnd)
    assert (end.by, str(end.match), [*map(str, end.referred)]) == (by, match, referred)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"role": "plain_id"}, "plain_id refers to plain_roles: pass role_by, the column of"),
        ({"role_by": User.id}, "role_id refers to roles: pass role_by, the column of roles that"),
        ({"role_by": "title"}, "role_id refers to roles: pass role_by, the column of roles that"),
        ({"role": "role", "role_by": Role.name}, 'role_by must be "id" or "name"'),
        ({"role": "user_id"}, "user_id refers to users: pass role_by"),
        ({"role": "user_id"}, "If it isn't your table of roles, role must be another column."),
        ({"user": "role_id"}, "role_id would be filled twice"),
        ({"columns": {"role_id": lambda row: 1}}, "role_id would be filled twice"),
        ({"columns": {"since": "joined_at"}}, "use one of user_id, role_id, name"),
        ({"role": "role", "role_by": "name"}, "nothing fills role_id, which is NOT NULL"),
        ({"role": "nothing"}, "it has no column 'nothing'; its columns are"),
        ({"where": "editor"}, "`where` must be a function of the row"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], problem: str) -> None:
    """In one line, which says what to write."""
    with pytest.raises(InvalidMapping) as error:
        declare(**options)
    assert problem in str(error.value)
    assert str(error.value).startswith("The mapping of user_roles can't be registered: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "ends",
    [
        {},
        {"organization": "team_id"},
        {"user": "user_id"},
        {"member": "member_id", "user": "user_id"},
        {"member": "member_id", "organization": "team_id", "user": "user_id"},
    ],
)
def test_a_member_is_said_in_one_way(ends: dict[str, Any]) -> None:
    """By its own row, or by the organization and the user."""
    with pytest.raises(InvalidMapping, match="either member, or both organization and user"):
        declare_member_roles(MemberRole, role="role", **ends)


def test_a_member_is_a_foreign_key_to_a_mapped_table() -> None:
    """Which `map_members` maps before."""
    logto = LogtoWebhooks(signing_key="k", database_url="sqlite:///unused.db")
    with pytest.raises(InvalidMapping, match="pass organization and user instead of member"):
        logto.map_member_roles(MemberRole, member="team_id", role="role")
    with pytest.raises(InvalidMapping, match="call map_members first"):
        logto.map_member_roles(MemberRole, member="member_id", role="role")
    logto.map_members(Member, organization="team_id", user="user_id")
    logto.map_member_roles(MemberRole, member="member_id", role="role")


def test_a_foreign_key_of_several_columns_leads_to_the_user() -> None:
    """By way of the table of members."""
    mapping = declare_member_roles(
        MemberRole,
        organization="team_id",
        user="user_id",
        role="role",
        create_defaults={"member_id": 1},
    )
    referred = [[column.table for column in end.referred] for end in mapping.ends]
    assert referred == [[], [User.__table__], []]


def test_another_way_to_find_roles_is_another_mapping() -> None:
    """It is applied to all records again."""
    definitions = {declare(role_by=by).definition for by in (None, "id", Role.title)} | {
        declare(where=lambda role: role.name == "editor").definition
    }
    assert len(definitions) == 4
    assert declare().definition == declare(role_by="name").definition


tables = sa.MetaData()
USERS, TEAMS, ROLES = (
    sa.Table(
        name,
        tables,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text, unique=True),
        sa.Column("name", sa.Text),
    )
    for name in ("users", "teams", "roles")
)
MEMBERS = sa.Table(
    "members",
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("team_id", sa.ForeignKey(TEAMS.c.id)),
    sa.Column("user_id", sa.ForeignKey(USERS.c.id)),
    sa.Column("name", sa.Text),
)
GRANTS = sa.Table(
    "grants",
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("team_id", sa.ForeignKey(TEAMS.c.id)),
    sa.Column("user_id", sa.ForeignKey(USERS.c.id)),
    sa.Column("member_id", sa.ForeignKey(MEMBERS.c.id)),
    sa.Column("role_id", sa.ForeignKey(ROLES.c.id)),
)


def map_all(order: tuple[str, ...], swapped: Callable[[], PairMapping]) -> None:
    """Register mappings in an order."""
    steps: dict[str, Callable[[], EntityMapping | PairMapping]] = {
        "users": lambda: declare_entities(
            "user", USERS, key="logto_id", columns={}, when_deleted="keep"
        ),
        "teams": lambda: declare_entities(
            "organization", TEAMS, key="logto_id", columns={}, when_deleted="keep"
        ),
        "members": lambda: declare_members(MEMBERS, organization="team_id", user="user_id"),
        "swapped": swapped,
    }
    mappings = Mappings()
    for name in order:
        mappings.add(steps[name]())


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ("user=role_id role=user_id", "write role=role_id and user=user_id"),
        ("member=role_id role=member_id", "write role=role_id and member=member_id"),
        ("organization=user_id user=team_id role=role_id", "write organization=team_id and user="),
        ("organization=team_id user=role_id role=user_id", "write role=role_id and user=user_id"),
        ("organization=role_id user=user_id role=team_id", "write role=role_id and organization="),
        ("member=user_id role=role_id", "pass a column that refers to your table of members"),
    ],
)
def test_swapped_columns_of_roles_are_refused(columns: str, problem: str) -> None:
    """In any order of the calls, by the tables to which they refer."""
    options: Any = dict(part.split("=") for part in columns.split())
    of_users = options.keys() == {"user", "role"}
    declare_roles: Any = declare_user_roles if of_users else declare_member_roles
    for order in itertools.permutations(("users", "teams", "members", "swapped")):
        with pytest.raises(InvalidMapping) as error:
            map_all(order, partial(declare_roles, GRANTS, **options))
        if order[-1] == "swapped":
            assert problem in str(error.value)
