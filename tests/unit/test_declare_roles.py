"""Mappings of roles are checked when they are registered."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from logto_webhooks import InvalidMapping, LogtoWebhooks
from logto_webhooks.mapping.declare_pairs import (
    PairMapping,
    RoleEnd,
    declare_member_roles,
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
        ("role_id", None, "name", "roles.name", "roles.id"),
        ("role_id", "name", "name", "roles.name", "roles.id"),
        ("role_id", Role.title, "name", "roles.title", "roles.id"),
        ("by_name", None, "name", "roles.name", "roles.name"),
        ("plain_id", "id", "id", "plain_roles.id", "plain_roles.id"),
        ("plain_id", Plain.id, "name", "plain_roles.id", "plain_roles.id"),
        ("role", None, "id", "None", "None"),
        ("role", "name", "name", "None", "None"),
    ],
)
def test_role_by_says_what_a_role_is_found_by(
    role: str, role_by: Any, by: str, match: str, referred: str
) -> None:
    """A foreign key by the name of your own role, any other column by Logto's id."""
    defaults = {} if role == "role_id" else {"role_id": 1}
    end = declare(role=role, role_by=role_by, create_defaults=defaults).ends[-1]
    assert isinstance(end, RoleEnd)
    assert (end.by, str(end.match), str(end.referred)) == (by, match, referred)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"role": "plain_id"}, "plain_id refers to plain_roles: pass role_by, the column of"),
        ({"role_by": User.id}, "role_id refers to roles: pass role_by, the column of roles that"),
        ({"role_by": "title"}, "role_id refers to roles: pass role_by, the column of roles that"),
        ({"role": "role", "role_by": Role.name}, 'role_by must be "id" or "name"'),
        ({"role": "user_id"}, "user_id refers to users: pass role_by"),
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
    assert [end.refers_to for end in mapping.ends] == [None, User.__table__, None]


def test_another_way_to_find_roles_is_another_mapping() -> None:
    """It is applied to all records again."""
    definitions = {declare(role_by=by).definition for by in (None, "id", Role.title)} | {
        declare(where=lambda role: role.name == "editor").definition
    }
    assert len(definitions) == 4
    assert declare().definition == declare(role_by="name").definition
