"""The rows of memberships and roles are known by what the columns of their ends hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.mapping.apply import retry_unsettled
from logto_webhooks.mapping.declare_pairs import declare_members, declare_user_roles
from logto_webhooks.testing import make
from tests.integration.test_mapping_deletions import (
    created,
    deleted,
    founded,
    joined,
    states_of,
)
from tests.integration.test_mapping_roles import (
    RoleApplication,
    read_member_roles,
    read_user_roles,
)
from tests.support.mapped_application import KINDS, PLAN, Application, learn
from tests.support.stores import Copy, StoreKind

OWN = {"id": 77, **PLAN}  # a user of the application's own
LEFT = make.organization_membership_updated(
    id="acme", at=2_000, addedUserIds=[], removedUserIds=["u1"]
).body


async def start(application: Application) -> Copy:
    """A user is a member of a team."""
    copy = Copy(await application.map())
    await copy.take([founded("acme"), created("u1"), joined("acme", ["u1"])])
    assert len(application.rows(application.members, "id")) == 1
    return copy


def write(application: Application, *statements: sa.Executable) -> None:
    with application.engine.begin() as connection:
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_with_a_former_primary_key_is_the_applications_own(
    kind: StoreKind, tmp_path: Path
) -> None:
    """As SQLite uses one again once the application has deleted the row."""

    async def live(application: Application) -> None:
        copy, own = await start(application), application.members
        [(row_id, team)] = application.rows(own, "id", "team_id")
        row = {"id": row_id, "team_id": team, "user_id": 77, "role": "guest"}
        add = sa.insert(application.users).values(OWN)
        write(application, add, sa.delete(own), sa.insert(own).values(row))
        await copy.take([LEFT])
        assert application.rows(own, "id", "user_id") == [(row_id, 77)]
        assert await states_of(application.host, own) == {}

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("is_over", [True, False], ids=["over", "goes on"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_the_application_gave_to_others_is_its_own(
    kind: StoreKind, is_over: bool, tmp_path: Path
) -> None:
    """A membership that goes on gets another row."""

    async def live(application: Application) -> None:
        copy, own = await start(application), application.members
        [(row_id, user_id)] = application.rows(own, "id", "user_id")
        add = sa.insert(application.users).values(OWN)
        write(application, add, sa.update(own).values(user_id=77))
        if is_over:
            await copy.take([LEFT])
            assert application.rows(own, "id", "user_id") == [(row_id, 77)]
        else:
            await application.apply_again()
            assert dict(application.rows(own, "user_id", "id"))[77] == row_id
            assert [i for (i,) in application.rows(own, "user_id")] == sorted([user_id, 77])

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("is_reused", [True, False], ids=["reused", "emptied"])
@pytest.mark.parametrize("when_deleted", ["delete", "unlink"])
@pytest.mark.parametrize("then", ["goes on", "is over", "its user is deleted"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_user_of_the_applications_own_with_a_former_primary_key(
    kind: StoreKind, then: str, when_deleted: str, is_reused: bool, tmp_path: Path
) -> None:
    """Or one whose key the application has emptied, because the link was wrong. Nothing tells such
    a user's membership from that of Logto's user, except that the user wasn't unlinked by us."""

    async def live(application: Application) -> None:
        own, users = application.members, application.users
        copy = Copy(await application.map(when_deleted=when_deleted))
        await copy.take([founded("acme"), created("u1"), joined("acme", ["u1"])])
        [(row_id, team, user_id)] = application.rows(own, "id", "team_id", "user_id")
        row = {"id": row_id, "team_id": team, "user_id": user_id, "role": "guest"}
        if is_reused:
            new_user = sa.insert(users).values(OWN | {"id": user_id})
            write(application, sa.delete(own), sa.delete(users), new_user)
        else:
            emptied = sa.update(users).values(logto_user_id=None, email=None)
            write(application, sa.delete(own), emptied)
        write(application, sa.insert(own).values(row))
        if then == "goes on":
            new = PLAN | {"id": user_id + 1, "logto_user_id": "u1"}
            write(application, sa.insert(users).values(new))
            await application.apply_again()
            assert application.rows(own, "user_id") == [(user_id,), (user_id + 1,)]
        else:
            await copy.take([LEFT if then == "is over" else deleted("u1", 400_000)])
            assert application.rows(own, "user_id") == [(user_id,)]
        assert (row_id, user_id, "guest") in application.rows(own, "id", "user_id", "role")

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_whose_users_row_is_gone(kind: StoreKind, tmp_path: Path) -> None:
    """The row of the membership is still Logto's, where no foreign key has deleted it."""

    async def live(application: Application) -> None:
        seats = sa.Table(
            "seats",
            application.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("team", sa.Text),
            sa.Column("user_id", sa.ForeignKey(application.users.c.id)),
        )
        seats.create(application.engine)
        if kind != "sqlite":
            drop = "ALTER TABLE app.seats DROP CONSTRAINT seats_user_id_fkey"
            write(application, sa.text(drop))
        users, teams, _ = application.declare().all
        members = declare_members(seats, organization="team", user="user_id")
        copy = Copy(await application.map_tables(users, teams, members))
        await application.apply_all()
        await copy.take([founded("acme"), created("u1"), joined("acme", ["u1"])])
        before = application.rows(seats, "id")
        change = sa.update(application.users).values(id=500)
        write(application, change)
        await application.apply_again()
        assert application.rows(seats, "id") == before
        assert application.rows(seats, "user_id") == [(500,)]
        write(application, sa.delete(application.users))
        await copy.take([LEFT])
        assert application.rows(seats, "id") == []

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_role_of_the_application_that_got_another_primary_key(
    kind: StoreKind, tmp_path: Path
) -> None:
    """With ON UPDATE CASCADE, the rows of users have it, too. They are found by the role's name."""

    async def live(application: RoleApplication) -> None:
        metadata = application.metadata
        ranks = sa.Table(
            "ranks",
            metadata,
            sa.Column("code", sa.Text, primary_key=True),
            sa.Column("name", sa.Text, unique=True),
        )
        key = sa.ForeignKey(ranks.c.code, onupdate="CASCADE")
        of_users = sa.Table(
            "user_ranks",
            metadata,
            sa.Column("user_id", sa.ForeignKey(application.users.c.id), primary_key=True),
            sa.Column("code", key, primary_key=True),
        )
        metadata.create_all(application.engine)
        write(application, sa.insert(ranks).values(code="adm", name="admin"))
        users, *_ = application.declare().all
        roles = declare_user_roles(of_users, user="user_id", role="code")
        host = await application.map_tables(users, roles)
        await application.apply_all()
        if kind == "sqlite":
            application.enforce_foreign_keys()
        await Copy(host).take([created("ana")])
        await learn(host, read_user_roles("ana", {"r1": "admin"}, 300_000))
        write(application, sa.update(ranks).values(code="administrator"))
        assert application.rows(of_users, "code") == [("administrator",)]
        await learn(host, read_user_roles("ana", {}, 400_000))
        assert application.rows(of_users, "code") == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("is_over", [True, False], ids=["over", "goes on"])
@pytest.mark.parametrize("kind", ["asyncpg", "postgres-thread"])
def test_rows_that_a_foreign_key_has_emptied(
    kind: StoreKind, is_over: bool, tmp_path: Path
) -> None:
    """The application deleted the users' rows. Their memberships' rows are known all the same."""

    async def live(application: Application) -> None:
        users, teams, _ = application.declare().all
        key = sa.ForeignKey(application.users.c.id, ondelete="SET NULL")
        seats = sa.Table(
            "seats",
            application.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("team", sa.Text),
            sa.Column("user_id", sa.Integer, key),
        )
        seats.create(application.engine)
        members = declare_members(seats, organization="team", user="user_id")
        copy = Copy(await application.map_tables(users, teams, members))
        await application.apply_all()
        names = ["u1", "u2"]
        await copy.take([founded("acme"), *map(created, names), joined("acme", names)])
        before = application.rows(seats, "id")
        write(application, sa.delete(application.users))
        assert application.rows(seats, "user_id") == [(None,), (None,)]
        if is_over:
            await copy.take([LEFT])
            assert len(application.rows(seats, "id")) == 1
        else:
            await application.apply_again()
            assert application.rows(seats, "id") == before
            assert application.rows(seats, "user_id") == application.rows(application.users, "id")

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize(
    ("kind", "ondelete"), [*((kind, None) for kind in KINDS), ("sqlite", "SET NULL")]
)
def test_an_invitation_with_a_former_primary_key(
    kind: StoreKind, ondelete: str | None, tmp_path: Path
) -> None:
    """A member without a user yet is the application's own. With SET NULL, PostgreSQL could take it
    for the former row, but it doesn't use a primary key again."""

    async def live(application: Application) -> None:
        metadata = application.metadata
        seats = sa.Table(
            "seats",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("team", sa.Text),
            sa.Column("user_id", sa.ForeignKey(application.users.c.id, ondelete=ondelete)),
        )
        seats.create(application.engine)
        users, teams, _ = application.declare().all
        members = declare_members(seats, organization="team", user="user_id")
        await application.map_tables(users, teams, members)
        await application.apply_all()
        copy = Copy(application.host)
        await copy.take([founded("acme"), created("u1"), joined("acme", ["u1"])])
        [(row_id, _)] = application.rows(seats, "id", "user_id")
        invite = sa.insert(seats).values(id=row_id, team="acme")
        write(application, sa.delete(seats), invite)
        await application.apply_again()
        assert len(application.rows(seats, "id")) == 2
        await copy.take([LEFT])
        assert application.rows(seats, "id", "user_id") == [(row_id, None)]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_was_emptied_after_its_deletion_was_refused(
    kind: StoreKind, tmp_path: Path
) -> None:
    """It goes as soon as nothing refers to it."""

    async def live(application: Application) -> None:
        users, teams, _ = application.declare(when_deleted="delete").all
        metadata = application.metadata
        key = sa.ForeignKey(application.users.c.id, ondelete="SET NULL")
        seats = sa.Table(
            "seats",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("team", sa.Text),
            sa.Column("user_id", sa.Integer, key),
        )
        tasks = sa.Table("tasks", metadata, sa.Column("seat", sa.ForeignKey(seats.c.id)))
        metadata.create_all(application.engine, [seats, tasks])
        members = declare_members(seats, organization="team", user="user_id")
        copy = Copy(await application.map_tables(users, teams, members))
        await application.apply_all()
        if kind == "sqlite":
            application.enforce_foreign_keys()
        await copy.take([founded("acme"), created("u1"), joined("acme", ["u1"])])
        [(row_id,)] = application.rows(seats, "id")
        write(application, sa.insert(tasks).values(seat=row_id))
        await copy.take([deleted("u1", 400_000)])
        assert application.rows(seats, "user_id") == [(None,)]
        write(application, sa.delete(tasks))
        await retry_unsettled(application.host, application.mappings)
        assert application.rows(seats, "id") == []

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("ondelete", ["CASCADE", None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_row_of_a_renamed_role_stays(
    kind: StoreKind, ondelete: str | None, tmp_path: Path
) -> None:
    """Rows of the application refer to it."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        tasks = sa.Table(
            "tasks",
            application.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("role_id", sa.ForeignKey(application.member_roles.c.id, ondelete=ondelete)),
        )
        tasks.create(application.engine)
        if kind == "sqlite":
            application.enforce_foreign_keys()
        await Copy(host).take([founded("acme"), created("ana"), joined("acme", ["ana"])])
        await learn(host, read_member_roles({"o1": "admin"}, 300_000))
        await learn(host, read_user_roles("ana", {"r1": "editor"}, 300_000))
        [(row_id, _)] = application.rows(application.member_roles, "id", "role")
        write(application, sa.insert(tasks).values(role_id=row_id))
        await learn(host, read_member_roles({"o1": "owner"}, 400_000))
        await learn(host, read_user_roles("ana", {"r1": "viewer"}, 400_000))
        assert application.rows(application.member_roles, "id", "role") == [(row_id, "owner")]
        assert application.user_role_names == [("ana", "viewer")]
        assert application.rows(tasks, "role_id") == [(row_id,)]
        assert await application.problems() == []

    RoleApplication.run(kind, tmp_path, live)


ADMIN_AND_GUEST = {"o1": "admin", "o2": "guest"}


@pytest.mark.parametrize(
    ("roles", "whose"),
    [
        ({"o1": "owner", "o2": "admin"}, {"owner": "admin", "admin": "guest"}),
        ({"o2": "admin"}, {"admin": "guest"}),
        ({"o1": "guest", "o2": "owner"}, {"guest": "admin", "owner": "guest"}),
        ({"o1": "guest", "o2": "admin"}, {"guest": "guest", "admin": "admin"}),
        ({"o3": "admin"}, {"admin": "admin"}),
        ({"o1": "owner", "o3": "admin"}, {"owner": "admin"}),
        ({"o1": "owner", "o2": "admin", "o3": "guest"}, {"owner": "admin", "admin": "guest"}),
    ],
    ids=["chain", "one over", "other chain", "swap", "again", "new one", "chain and new one"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_roles_that_get_names_of_others(
    kind: StoreKind, roles: dict[str, str], whose: dict[str, str], tmp_path: Path
) -> None:
    """Each keeps its row, because others may refer to it; those that swap names take each other's,
    and a new role with the same name takes the row of one that is over."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        await Copy(host).take([founded("acme"), created("ana"), joined("acme", ["ana"])])
        await learn(host, read_member_roles(ADMIN_AND_GUEST, 300_000))
        own = application.member_roles
        before = dict(application.rows(own, "role", "id"))
        tasks = sa.Table(
            "tasks", application.metadata, sa.Column("role_id", sa.ForeignKey(own.c.id))
        )
        tasks.create(application.engine)
        ids = [{"role_id": before[name]} for name in whose.values()]
        write(application, sa.insert(tasks).values(ids))
        await learn(host, read_member_roles(roles, 400_000))
        after = dict(application.rows(own, "role", "id"))
        assert after.keys() == set(roles.values())
        assert (
            whose.items()
            <= {
                name: next((was for was, id_ in before.items() if id_ == after[name]), None)
                for name in after
            }.items()
        )
        assert await application.problems() == []
        await learn(host, read_member_roles(ADMIN_AND_GUEST, 500_000))
        assert set(dict(application.rows(own, "role", "id"))) == {"admin", "guest"}

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_the_row_of_a_role_that_was_inserted_again(kind: StoreKind, tmp_path: Path) -> None:
    """With another primary key."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        await Copy(host).take([founded("acme"), created("ana"), joined("acme", ["ana"])])
        await learn(host, read_member_roles({"o1": "admin"}, 300_000))
        own = application.member_roles
        write(application, sa.update(own).values(id=own.c.id + 100))
        await learn(host, read_member_roles({}, 400_000))
        assert application.rows(own, "role") == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_gets_another_primary_key(kind: StoreKind, tmp_path: Path) -> None:
    """By the application's migration: the mapping is another one, which is applied anew."""

    async def live(application: Application) -> None:
        metadata = application.metadata

        async def map_table(*primary_key: str) -> sa.Table:
            name = metadata.schema + ".seats" if metadata.schema else "seats"
            if name in metadata.tables:
                metadata.remove(metadata.tables[name])
            seats = sa.Table(
                "seats",
                metadata,
                *(
                    sa.Column(key, sa.Text, primary_key=key in primary_key)
                    for key in ("org", "who")
                ),
                sa.Column("id", sa.Integer, primary_key="id" in primary_key, nullable=False),
            )
            has_rows = sa.inspect(application.engine).has_table("seats", metadata.schema)
            seats.drop(application.engine, checkfirst=True)
            seats.create(application.engine)
            if has_rows:
                write(application, sa.insert(seats).values(org="acme", who="u1", id=1))
            defaults = {} if "id" in primary_key else {"id": 1}
            options: dict[str, Any] = {"organization": "org", "user": "who"}
            members = declare_members(seats, **options, create_defaults=defaults)
            await application.map_tables(members)
            return seats

        await map_table("org", "who")
        await application.apply_all()
        copy = Copy(application.host)
        await copy.take([founded("acme"), created("u1"), joined("acme", ["u1"])])
        seats = await map_table("id")
        unapplied = await application.host.read(lambda store: store.mappings.status())
        assert not next(each for each in unapplied if each.mapping == seats.fullname).is_applied
        await application.apply_all()
        assert await states_of(application.host, seats) == {"ok": 1}
        await copy.take([LEFT])
        assert application.rows(seats, "id") == []

    Application.run(kind, tmp_path, live)
