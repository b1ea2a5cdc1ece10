"""Mappings that can't work for any record are refused when they are registered."""

from __future__ import annotations

import functools
import itertools
import time
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Literal

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from logto_webhooks import InvalidMapping
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import declare_members, declare_user_roles


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: sa.JSON}


class Money(sa.TypeDecorator[Any]):
    """A type of the application's own, which takes what it likes."""

    impl = sa.Integer
    cache_ok = True


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_id: Mapped[str | None] = mapped_column(unique=True)
    email: Mapped[str | None]
    plan: Mapped[str] = mapped_column(default="free")
    active: Mapped[bool | None]
    logins: Mapped[int | None]
    balance: Mapped[Decimal | None]
    seen_at: Mapped[datetime | None]
    born_on: Mapped[date | None]
    profile: Mapped[dict[str, Any] | None]
    profile_b: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    tags: Mapped[list[str] | None] = mapped_column(ARRAY(sa.Text))
    kind: Mapped[str | None] = mapped_column(sa.Enum("a", "b"))
    ref: Mapped[uuid.UUID | None]
    own: Mapped[Any] = mapped_column(Money, nullable=True)


class Team(Base):
    __tablename__ = "teams"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_id: Mapped[str] = mapped_column(unique=True)


class Member(Base):
    __tablename__ = "members"

    id: Mapped[int] = mapped_column(primary_key=True)
    team_id: Mapped[int] = mapped_column(sa.ForeignKey(Team.id))
    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id))
    number: Mapped[int | None]


class Grant(Base):
    """A role of a user, whose table of roles is one of users by mistake."""

    __tablename__ = "grants"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id))
    role_id: Mapped[int] = mapped_column(sa.ForeignKey(Team.id))


async def wait(row: Any) -> str:
    return "x"


class Waits:
    async def __call__(self, row: Any) -> str:
        return "x"


class Plain:
    def __call__(self, row: Any) -> str:
        return "x"


def declare(**options: Any) -> Any:
    """Map users; `options` are those to the mapping."""
    usual: dict[str, Any] = {"key": User.logto_id, "columns": {}, "when_deleted": "keep"}
    return declare_entities("user", User, **usual | options)


def map_user(mappings: Mappings) -> None:
    mappings.add(declare())


def map_team(mappings: Mappings) -> None:
    mappings.add(
        declare_entities("organization", Team, key="logto_id", columns={}, when_deleted="keep")
    )


def refused(**options: Any) -> str:
    with pytest.raises(InvalidMapping) as error:
        declare(**options)
    return str(error.value)


def test_nothing_else_writes_the_document_of_the_key() -> None:
    """It would erase Logto's ID, and the next change would make a second row."""
    key = User.profile["logtoUserId"]
    for name in ("columns", "fill"):
        problem = refused(key=key, **{name: {User.profile: "custom_data"}})
        assert "profile holds Logto's ID, so profile can't be in columns, fill or when_" in problem
    problem = refused(when_deleted={User.logto_id: None})
    assert "when_deleted can't set logto_id, which holds Logto's ID: use \"unlink\"" in problem
    problem = refused(key=key, when_deleted={User.profile: {}})
    assert "profile holds Logto's ID, so profile can't be in columns, fill or when_" in problem
    problem = refused(key=key, create_defaults={User.profile: []})
    assert "profile holds Logto's ID, so its default must be an object" in problem
    declare(key=key, create_defaults={User.profile: {"theme": "dark"}})


def test_a_path_with_an_empty_part_is_refused() -> None:
    """Nothing would ever be found there."""
    for source in ("profile.", "custom_data..plan"):
        assert f"can't be filled by {source!r}" in refused(columns={User.email: source})
    assert "an empty part" in refused(key=User.profile[""])


@pytest.mark.parametrize(
    ("column", "value"),
    [("email", {"a": 1}), ("email", ["a"]), ("logins", []), ("seen_at", 1), ("seen_at", 0.5)],
)
def test_a_constant_that_a_column_cannot_hold_is_refused(column: str, value: Any) -> None:
    """When it is registered, not when each row is written."""
    kind = type(value).__name__
    for option in ("create_defaults", "when_deleted"):
        problem = refused(**{option: {column: value}})
        assert f"{option} sets {column} to a value of type {kind}, which" in problem


@pytest.mark.parametrize(
    ("column", "value"), [("email", 1), ("logins", "1"), ("seen_at", "2030-01-01"), ("logins", 0.0)]
)
def test_a_constant_that_some_driver_converts_is_accepted(column: str, value: Any) -> None:
    """Where the driver doesn't, each row is a conflict that names the column."""
    for option in ("create_defaults", "when_deleted"):
        declare(**{option: {column: value}})


@pytest.mark.parametrize("name", ["columns", "fill", "where", "link"])
@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (wait, " is async, but it is called within the database's transaction"),
        (Waits(), " is async, but"),
        (functools.partial(wait), " is async, but"),
        (lambda: "x", " must take one argument, the row of Logto's record"),
        (lambda row, other: "x", " must take one argument, the row"),
        (lambda *, row: "x", " must take one argument, the row"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(
    function: Any, problem: str, name: str
) -> None:
    """Whatever it is for, and by its name."""
    is_source = name in ("columns", "fill")
    shown = "the function of email" if is_source else f"`{name}`"
    option = {User.email: function} if is_source else function
    assert shown + problem in refused(**{name: option})


@pytest.mark.parametrize(
    "function", [lambda row: "x", lambda row, more=1: "x", lambda *rows: "x", str, Plain()]
)
def test_a_function_of_the_row_is_accepted(function: Any) -> None:
    """Also a class, or an object that can be called."""
    declare(columns={User.email: function}, where=function)


def test_where_must_be_a_function() -> None:
    """A name isn't one."""
    assert "`where` must be a function of the row that returns true or false" in refused(
        where="email"
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"when_deleted": {User.plan: None}}, "when_deleted sets plan to null, but it is NOT NULL"),
        ({"create_defaults": {"plan": None}}, "create_defaults sets plan to null, but it is"),
        ({"when_deleted": {User.plan: str}}, "when_deleted needs a value for plan, not a function"),
        (
            {"when_deleted": {User.plan: sa.func.now()}},
            "when_deleted needs a value for plan, not SQL",
        ),
        (
            {"create_defaults": {User.plan: User.email}},
            "create_defaults needs a value for plan, not SQL",
        ),
        (
            {"columns": {User.plan: "name"}, "create_defaults": {User.plan: "free"}},
            "create_defaults would have no effect on plan, which is in columns: leave it out of ",
        ),
        ({"key": User.id}, "id is of type Integer(), which can't hold Logto's ID"),
        ({"key": User.seen_at}, "seen_at is of type DateTime(), which can't hold Logto's ID"),
    ],
)
def test_a_value_that_cannot_be_set_is_refused(options: dict[str, Any], problem: str) -> None:
    """It would be for every record."""
    assert problem in refused(**options)


@pytest.mark.parametrize(
    ("column", "source"),
    [
        *itertools.product(["active", "logins", "balance", "seen_at", "born_on"], ["name"]),
        *itertools.product(["logins", "active", "balance", "tags"], ["created_at"]),
        *itertools.product(["email", "logins", "seen_at", "tags"], ["custom_data"]),
        ("seen_at", "is_suspended"),
    ],
)
def test_a_column_that_takes_no_value_of_the_source_is_refused(column: str, source: str) -> None:
    """With what to write instead."""
    said = refused(columns={column: source})
    assert f"{column} can't be filled by {source!r}, because that is " in said
    assert said.endswith("use a function of the row.")
    assert said == refused(fill={column: source})


def test_a_time_in_a_column_of_text_is_refused() -> None:
    """Some drivers write it, and it differs when it is read again. A function can format it."""
    said = refused(columns={User.email: "created_at"})
    assert "email can't be filled by 'created_at', because that is a time, and " in said
    advice = "lambda row: row.created_at and row.created_at.isoformat()"
    assert said.endswith(f"use a function of the row that formats it, such as {advice}.")
    declare(columns={User.email: lambda row: row.created_at and row.created_at.isoformat()})


@pytest.mark.parametrize(
    ("column", "source"),
    [
        *itertools.product(["email", "kind", "own", "profile", "ref"], ["name"]),
        *itertools.product(["seen_at", "born_on", "own"], ["created_at"]),
        *itertools.product(["profile", "profile_b", "own"], ["custom_data"]),
        *itertools.product(["active", "logins", "email"], ["is_suspended"]),
        *itertools.product(["active", "logins", "seen_at", "tags"], ["custom_data.value"]),
    ],
)
def test_a_column_that_may_take_the_source_is_accepted(column: str, source: str) -> None:
    """Databases convert a lot, and what is in a JSON document isn't known."""
    declare(columns={column: source})


@pytest.mark.parametrize("order", list(itertools.permutations(["user", "team", "member"])))
def test_swapped_columns_of_members_are_refused(order: tuple[str, ...]) -> None:
    """In any order of the calls: by the last one that shows it."""
    mappings = Mappings()
    steps: dict[str, Callable[[], None]] = {
        "user": lambda: map_user(mappings),
        "team": lambda: map_team(mappings),
        "member": lambda: mappings.add(
            declare_members(Member, organization="user_id", user="team_id")
        ),
    }

    def register() -> None:
        for name in order:
            steps[name]()

    with pytest.raises(InvalidMapping) as error:
        register()
    first = next(name for name in order if name != "member")
    by_user = "organization=user_id refers to users, which has the rows of users"
    by_team = "user=team_id refers to teams, which has the rows of organizations"
    swapped = {True: "organization=team_id and user=user_id", False: "user=user_id and "}
    is_by_user = first == "user" or order[2] == "member"
    assert str(error.value).startswith(
        f"The mapping of members can't be registered: {by_user if is_by_user else by_team}: write "
        f"{swapped[is_by_user]}"
    )


def test_columns_of_members_that_refer_to_the_right_tables_are_accepted() -> None:
    """Mapped before or after."""
    for order in itertools.permutations([map_user, map_team, None]):
        mappings = Mappings()
        for step in order:
            if step is not None:
                step(mappings)
            else:
                mappings.add(declare_members(Member, organization="team_id", user="user_id"))
        assert len(mappings.all) == 3


@pytest.mark.parametrize("is_first", [True, False])
def test_a_role_that_refers_to_another_mapped_table_is_refused(is_first: bool) -> None:
    """A table of organizations has no roles."""
    mappings = Mappings()
    roles = declare_user_roles(Grant, user="user_id", role="role_id", role_by="id")
    steps = [lambda: mappings.add(roles), lambda: map_team(mappings)]
    if is_first:
        steps.reverse()
    steps[0]()
    with pytest.raises(InvalidMapping) as error:
        steps[1]()
    assert str(error.value).endswith(
        "role=role_id refers to teams, which has the rows of organizations: pass a column that "
        "refers to your table of roles."
    )


@pytest.mark.parametrize(
    ("ends", "problem"),
    [
        ({"organization": "team_id", "user": "team_id"}, "team_id would be filled twice"),
        ({"organization": "number", "user": "user_id"}, "number is of type Integer(), which can't"),
    ],
)
def test_columns_that_cannot_say_whose_row_it_is_are_refused(
    ends: dict[str, Any], problem: str
) -> None:
    """One column can't be both, and a number that refers to no row of yours isn't Logto's id."""
    with pytest.raises(InvalidMapping) as error:
        declare_members(Member, **ends)
    assert problem in str(error.value)


def test_what_columns_of_members_refer_to_must_be_mapped_at_the_start() -> None:
    """A number can't hold Logto's id. Until the start, it can be mapped later."""
    mappings = Mappings()
    mappings.add(declare_members(Member, organization="team_id", user="user_id"))
    map_user(mappings)
    with pytest.raises(InvalidMapping) as error:
        mappings.check_complete()
    assert str(error.value) == (
        "The mapping of members can't be registered: organization=team_id refers to teams, which "
        "isn't mapped: call map_organizations with it, too."
    )
    map_team(mappings)
    mappings.check_complete()


def test_a_key_that_the_database_pads_is_refused() -> None:
    """It would never equal Logto's id."""
    padded = sa.Table(
        "padded",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.CHAR(40)),
        sa.Column("team_id", sa.Text),
    )
    problem = "logto_id is of type CHAR(length=40), in which a database may add spaces to"
    options: dict[str, Any] = {"key": "logto_id", "columns": {}, "when_deleted": "keep"}
    with pytest.raises(InvalidMapping) as of_user:
        declare_entities("user", padded, **options)
    with pytest.raises(InvalidMapping) as of_member:
        declare_members(padded, organization="team_id", user="logto_id")
    assert problem in str(of_user.value)
    assert problem in str(of_member.value)


def test_rows_cannot_be_linked_if_each_has_a_key() -> None:
    """Those to be linked have none."""
    options: dict[str, Any] = {"key": "logto_id", "columns": {}, "when_deleted": "keep"}
    with pytest.raises(InvalidMapping) as error:
        declare_entities("organization", Team, link=lambda team: Team.id == 1, **options)
    assert "link takes over rows in which logto_id is null, but it is NOT NULL" in str(error.value)


@pytest.mark.parametrize("is_far", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("when_deleted", ["delete", "keep"])
def test_a_row_that_would_go_with_that_of_another_record_is_refused(
    when_deleted: Literal["delete", "keep"], is_first: bool, is_far: bool
) -> None:
    """Whichever is mapped first."""
    metadata = sa.MetaData(schema="app")
    own_id = sa.Column("id", sa.Integer, primary_key=True)
    teams = sa.Table("teams", metadata, own_id, sa.Column("logto_id", sa.Text))
    referred = "app.teams.id"
    if is_far:  # by way of a table that isn't mapped
        key = sa.ForeignKey(referred, ondelete="CASCADE")
        sa.Table("rooms", metadata, sa.Column("id", sa.Integer, key, primary_key=True))
        referred = "app.rooms.id"
    people = sa.Table(
        "people",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text),
        sa.Column("team_id", sa.ForeignKey(referred, ondelete="CASCADE")),
    )
    options: dict[str, Any] = {"key": "logto_id", "columns": {}, "when_deleted": when_deleted}
    declared = [
        declare_entities("organization", teams, **options),
        declare_entities("user", people, **options),
    ]
    if not is_first:
        declared.reverse()
    mappings = Mappings()
    mappings.add(declared[0])
    if when_deleted == "keep":
        mappings.add(declared[1])
        return
    with pytest.raises(InvalidMapping) as error:
        mappings.add(declared[1])
    assert str(error.value).startswith(
        "The mapping of app.people can't be registered: because of ON DELETE CASCADE on team_id, a "
        "row would also be deleted when one of app.teams is"
    )


@pytest.mark.parametrize(
    ("column", "on_delete", "is_refused"),
    [("invited_by", "CASCADE", True), ("invited_by", "SET NULL", False), ("id", None, False)],
)
def test_a_membership_that_would_go_with_another_user_is_refused(
    column: str, on_delete: str | None, is_refused: bool
) -> None:
    """The user who invited the member, for example. Its own user's row may take it along."""
    people = sa.Table(
        "people",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text),
        sa.Column("boss", sa.ForeignKey("people.id", ondelete="SET NULL")),
    )
    seats = sa.Table(
        "seats",
        people.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("team", sa.Text),
        sa.Column("person", sa.ForeignKey(people.c.id, ondelete="CASCADE")),
        sa.Column("invited_by", sa.ForeignKey(people.c.id, ondelete=on_delete)),
    )
    mappings = Mappings()
    options: dict[str, Any] = {"key": "logto_id", "columns": {}, "when_deleted": "delete"}
    mappings.add(declare_entities("user", people, **options))
    members = declare_members(seats, organization="team", user="person")
    if is_refused:
        with pytest.raises(InvalidMapping, match=f"ON DELETE CASCADE on {column}"):
            mappings.add(members)
    else:
        mappings.add(members)


def test_a_row_that_would_go_with_another_of_its_table_is_refused() -> None:
    """Such as that of a manager."""
    people = sa.Table(
        "people",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text),
        sa.Column("boss", sa.ForeignKey("people.id", ondelete="CASCADE")),
    )
    options: dict[str, Any] = {"key": "logto_id", "columns": {}, "when_deleted": "delete"}
    with pytest.raises(InvalidMapping, match="ON DELETE CASCADE on boss"):
        Mappings().add(declare_entities("user", people, **options))


@pytest.mark.parametrize("is_first", [True, False])
def test_members_cannot_refer_to_what_logto_changes(is_first: bool) -> None:
    """Their rows would keep the former value."""
    people = sa.Table(
        "people",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text),
        sa.Column("email", sa.Text, unique=True),
    )
    seats = sa.Table(
        "seats",
        people.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("team", sa.Text),
        sa.Column("person", sa.ForeignKey(people.c.email)),
    )
    options: dict[str, Any] = {"columns": {"email": "email"}, "when_deleted": "delete"}
    users = declare_entities("user", people, key="logto_id", **options)
    members = declare_members(seats, organization="team", user="person")
    first, second = (users, members) if is_first else (members, users)
    mappings = Mappings()
    mappings.add(first)
    with pytest.raises(InvalidMapping, match=r"person refers to people.email, which changes when"):
        mappings.add(second)


def test_members_can_refer_to_a_primary_key_that_is_filled() -> None:
    """It never changes."""
    people = sa.Table(
        "people",
        sa.MetaData(),
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("logto_id", sa.Text),
    )
    seats = sa.Table(
        "seats",
        people.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("team", sa.Text),
        sa.Column("person", sa.ForeignKey(people.c.id)),
    )
    mappings = Mappings()
    options: dict[str, Any] = {"columns": {}, "fill": {"id": "id"}, "when_deleted": "delete"}
    mappings.add(declare_entities("user", people, key="logto_id", **options))
    mappings.add(declare_members(seats, organization="team", user="person"))
    assert [mapping.name for mapping in mappings.all] == ["people", "seats"]


def make_tenants(*, is_unique: bool) -> tuple[sa.Table, sa.Table]:
    """Make tables of people and of seats that refer to them by two columns."""
    metadata = sa.MetaData()
    people = sa.Table(
        "people",
        metadata,
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, primary_key=True, unique=is_unique),
        sa.Column("logto_id", sa.Text),
    )
    seats = sa.Table(
        "seats",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("tenant", sa.Text),
        sa.Column("team", sa.Text),
        sa.Column("person", sa.Text),
        sa.ForeignKeyConstraint(["tenant", "person"], [people.c.tenant, people.c.id]),
    )
    return people, seats


def test_a_foreign_key_of_two_columns_refers_to_rows_by_what_is_unique() -> None:
    """The other column doesn't say whose row it is."""
    for is_unique in (True, False):
        people, seats = make_tenants(is_unique=is_unique)
        mappings = Mappings()
        options: dict[str, Any] = {"columns": {}, "when_deleted": "delete"}
        defaults = {"tenant": "a", "id": "b"}
        users = declare_entities(
            "user", people, key="logto_id", create_defaults=defaults, **options
        )
        mappings.add(users)
        members = declare_members(seats, organization="team", user="person")
        if is_unique:
            mappings.add(members)
            assert members.ends[1].find_referred([people]) is people.c.id
        else:
            with pytest.raises(InvalidMapping, match=r"person refers to people.id together with"):
                mappings.add(members)


def test_a_role_that_is_found_by_two_columns_is_refused() -> None:
    """A role of another tenant can have its name."""
    metadata = sa.MetaData()
    roles = sa.Table(
        "roles",
        metadata,
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text),
    )
    user_roles = sa.Table(
        "user_roles",
        metadata,
        sa.Column("person", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, primary_key=True, server_default="a"),
        sa.Column("role", sa.Integer, primary_key=True),
        sa.ForeignKeyConstraint(["tenant", "role"], [roles.c.tenant, roles.c.id]),
    )
    with pytest.raises(InvalidMapping, match="role refers to roles together with other columns"):
        declare_user_roles(user_roles, user="person", role="role")


def test_tables_that_refer_to_each_other_by_two_columns_are_no_loop() -> None:
    """Neither column is unique by itself, so they refer to nothing that is known."""
    metadata = sa.MetaData()
    for name, other in (("a", "b"), ("b", "a")):
        sa.Table(
            name,
            metadata,
            sa.Column("t", sa.Text, primary_key=True),
            sa.Column("u", sa.Text, primary_key=True),
            sa.ForeignKeyConstraint(["t", "u"], [f"{other}.t", f"{other}.u"], use_alter=True),
        )
    mapping = declare_members(metadata.tables["a"], organization="t", user="u")
    assert [end.referred for end in mapping.ends] == [(), ()]


def test_an_index_that_has_an_expression_too_makes_no_column_unique() -> None:
    """Such as one that lets deleted rows have the same email."""
    people = sa.Table(
        "people",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text),
        sa.Column("email", sa.Text),
        sa.Index("one_email", "email", sa.text("coalesce(deleted_at, '')"), unique=True),
    )
    options: dict[str, Any] = {"columns": {"email": "email"}, "when_deleted": "delete"}
    mapping = declare_entities("user", people, key="logto_id", **options)
    assert mapping.list_unique("postgresql") == []


def test_a_column_with_two_foreign_keys_refers_to_the_mapped_table() -> None:
    """Whichever comes first."""
    metadata = sa.MetaData()
    own = sa.Column("id", sa.Integer, primary_key=True)
    people = sa.Table("people", metadata, own, sa.Column("logto_id", sa.Text))
    for name in ("accounts", "z_accounts"):
        sa.Table(name, metadata, sa.Column("id", sa.ForeignKey(own), primary_key=True))
        seats = sa.Table(
            f"seats_of_{name}",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("team", sa.Text),
            sa.Column("person", sa.ForeignKey(own), sa.ForeignKey(f"{name}.id")),
        )
        mapping = declare_members(seats, organization="team", user="person")
        assert mapping.ends[1].find_referred([people]) is own


@pytest.mark.parametrize("is_first", [True, False])
def test_a_row_that_would_go_with_a_membership_is_refused(is_first: bool) -> None:
    """Such as that of a user whose present team is a membership."""
    metadata = sa.MetaData()
    seats = sa.Table(
        "seats",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("team", sa.Text),
        sa.Column("person", sa.Text),
    )
    people = sa.Table(
        "people",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text),
        sa.Column("seat", sa.ForeignKey(seats.c.id, ondelete="CASCADE")),
    )
    options: dict[str, Any] = {"key": "logto_id", "columns": {}, "when_deleted": "keep"}
    users = declare_entities("user", people, **options)
    members = declare_members(seats, organization="team", user="person")
    first, second = (users, members) if is_first else (members, users)
    mappings = Mappings()
    mappings.add(first)
    with pytest.raises(InvalidMapping, match="ON DELETE CASCADE on seat"):
        mappings.add(second)


def test_a_column_of_another_table_is_refused() -> None:
    """Also if it has the name of one of this table."""
    assert "teams.logto_id is a column of teams, another table" in refused(key=Team.logto_id)


def test_a_generated_column_is_refused() -> None:
    """The database fills it itself."""
    table = sa.Table(
        "people",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text),
        sa.Column("shown", sa.Text, sa.Computed("lower(logto_id)")),
    )
    with pytest.raises(InvalidMapping, match="shown is a generated column, which the database"):
        declare_entities(
            "user", table, key="logto_id", columns={"shown": "name"}, when_deleted="keep"
        )


def test_a_foreign_key_of_another_type_is_refused() -> None:
    """Its values would never equal those to which it refers."""
    metadata = sa.MetaData()
    teams = sa.Table("teams", metadata, sa.Column("id", sa.Uuid(), primary_key=True))
    members = sa.Table(
        "members",
        metadata,
        sa.Column("team_id", sa.Uuid(as_uuid=False), sa.ForeignKey(teams.c.id), primary_key=True),
        sa.Column("user_id", sa.Text, primary_key=True),
    )
    with pytest.raises(InvalidMapping, match=r"refers to teams\.id, which is of type Uuid"):
        declare_members(members, organization="team_id", user="user_id")


def test_a_foreign_key_to_another_object_of_a_mapped_table_refers_to_it() -> None:
    """As that of a reflected table."""

    def define() -> sa.Table:
        return sa.Table("teams", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))

    mapped, reflected = define(), define()
    members = sa.Table(
        "members",
        reflected.metadata,
        sa.Column("team_id", sa.ForeignKey(reflected.c.id), primary_key=True),
        sa.Column("user_id", sa.Text, primary_key=True),
    )
    mapping = declare_members(members, organization="team_id", user="user_id")
    assert mapping.ends[0].find_referred([mapped]) is mapped.c.id


@pytest.mark.parametrize(
    ("column_type", "is_naive"),
    [(sa.DateTime(), True), (sa.DateTime(timezone=True), False), (sa.Date(), True)],
)
def test_a_time_without_a_zone_is_in_utc(
    column_type: Any, is_naive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the time zone of this process is."""
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    try:
        table = sa.Table(
            "people",
            sa.MetaData(),
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("logto_id", sa.Text),
            sa.Column("at", column_type),
        )
        moment = datetime(2026, 2, 3, 15, 5)
        options: dict[str, Any] = {"columns": {"at": lambda user: moment}, "when_deleted": "keep"}
        mapping = declare_entities("user", table, key="logto_id", **options)
        value = mapping.columns["at"](None)
    finally:
        monkeypatch.undo()
        time.tzset()
    is_day = isinstance(column_type, sa.Date)
    assert value == (moment.date() if is_day else moment.replace(tzinfo=None if is_naive else UTC))


@pytest.mark.parametrize(
    ("column", "source", "folds"),
    [
        ("mail", "email", True),
        ("email", "email", True),
        ("work_email", lambda user: user.profile.get("work"), True),
        ("login", "custom_data.workEmail", True),
        ("emailing_id", "custom_data.emailingId", False),
        ("email_before", "username", False),
    ],
)
def test_only_the_case_of_emails_does_not_matter(column: str, source: Any, folds: bool) -> None:
    """What fills a column tells that, or else its name."""
    columns = [sa.Column(name, sa.Text) for name in ("logto_id", column)]
    table = sa.Table("p", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), *columns)
    mapping = declare_entities(
        "user", table, key="logto_id", columns={column: source}, link=column, when_deleted="keep"
    )
    assert mapping.link is not None
    assert mapping.link.folds_case is folds
