"""The application's tables of roles follow the roles that users and members have in Logto."""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import Span
from logto_webhooks.mapping.apply import apply_all, retry_unsettled
from logto_webhooks.mapping.check import find_differences
from logto_webhooks.mapping.declare_pairs import (
    declare_member_roles,
    declare_members,
    declare_user_roles,
)
from logto_webhooks.records.record import Absent, Change, Key, membership
from logto_webhooks.testing import make
from tests.support.mapped_application import KINDS, Application, counts_of, learn
from tests.support.stores import Copy, StoreKind

Roles = Mapping[str, str]  # id -> name
ANA = make.user_created(id="ana", email="ana@x.example", at=1_000).body
BO = make.user_created(id="bo", email="bo@x.example", at=1_000).body
ACME = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
JOINED = make.organization_membership_updated(id="acme", at=1_500, addedUserIds=["ana"]).body
LEFT = make.organization_membership_updated(id="acme", at=9_000, removedUserIds=["ana"]).body
EDITOR, VIEWER = {"r1": "editor"}, {"r2": "viewer"}


class Rank(enum.Enum):
    """A member's role, as the application knows it."""

    OWNER = "owner"
    GUEST = "guest"


class Level(enum.IntEnum):
    """Roles with an alias, and with one that is false."""

    GUEST = 0
    OWNER = 1
    BOSS = 1


class RoleApplication(Application):
    """Users refer to roles by their primary keys, and members' rows have the names of roles."""

    def __init__(self, kind: StoreKind, folder: Path) -> None:
        super().__init__(kind, folder)
        self.roles = sa.Table(
            "roles",
            self.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("name", sa.Text, nullable=False),
        )
        self.user_roles = sa.Table(
            "user_roles",
            self.metadata,
            sa.Column("user_id", sa.ForeignKey(self.users.c.id), primary_key=True),
            sa.Column("role_id", sa.ForeignKey(self.roles.c.id), primary_key=True),
            sa.Column("logto_role", sa.Text),
            sa.Column("source", sa.Text),
        )
        self.member_roles = sa.Table(
            "member_roles",
            self.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("member_id", sa.ForeignKey(self.members.c.id), nullable=False),
            sa.Column("role", sa.Text, nullable=False),
            sa.UniqueConstraint("member_id", "role"),
            sa.CheckConstraint("role <> 'forbidden'"),
        )
        with self.engine.begin() as connection:
            self.metadata.create_all(connection)
            names = [{"name": name} for name in ("editor", "viewer")]
            connection.execute(sa.insert(self.roles), names)

    async def map_roles(
        self, of_users: Mapping[str, Any] | None = None, **changes: Any
    ) -> HandlerRunner:
        """Map all five tables; `changes` are those to the mapping of users' roles, `of_users`
        those to that of users."""
        await self.map(**of_users or {})
        own = self.user_roles.c
        options: dict[str, Any] = {
            "user": own.user_id,
            "role": own.role_id,
            "columns": {own.logto_role: "role_id"},
            "create_defaults": {own.source: "logto"},
        }
        members: dict[str, Any] = {"member": "member_id", "role": "role", "role_by": "name"}
        self.mappings.add(declare_user_roles(self.user_roles, **options | changes))
        self.mappings.add(declare_member_roles(self.member_roles, **members))
        await self.host.run(lambda store: store.mappings.register(self.mappings.registered))
        return self.host

    def insert(self, table: sa.Table, **values: Any) -> None:
        """Insert a row of the application's own."""
        with self.engine.begin() as connection:
            connection.execute(sa.insert(table).values(values))

    def delete(self, table: sa.Table, *where: sa.ColumnElement[bool]) -> None:
        """Delete rows, as the application does."""
        with self.engine.begin() as connection:
            connection.execute(sa.delete(table).where(*where))

    @property
    def user_role_names(self) -> list[tuple[str, str]]:
        """The Logto id of each user with a role, and the role's name."""
        own = sa.select(self.users.c.logto_user_id, self.roles.c.name)
        own = own.select_from(self.user_roles.join(self.users).join(self.roles))
        with self.engine.connect() as connection:
            return sorted((user, role) for user, role in connection.execute(own))

    @property
    def member_role_names(self) -> list[tuple[str, str]]:
        """The Logto id of each member with a role, and the role's name."""
        own = sa.select(self.users.c.logto_user_id, self.member_roles.c.role)
        own = own.select_from(self.member_roles.join(self.members).join(self.users))
        with self.engine.connect() as connection:
            return sorted((user, role) for user, role in connection.execute(own))

    async def problems(self) -> list[tuple[str, str, str | None]]:
        """What `mapping check` lists."""
        return [
            (each.mapping, each.problem, each.logto_id)
            async for page in find_differences(self.host, self.mappings)
            for each in page
        ]


def read_user_roles(user: str, roles: Roles, at: int) -> list[Change]:
    """Logto's answer to `GET /users/:id/roles`."""
    items = [{"id": id_, "name": name} for id_, name in roles.items()]
    return [api_responses.read_roles(user, items, Span(at, at))]


def read_member_roles(roles: Roles, at: int, user: str = "ana") -> list[Change]:
    """Logto's answer to `GET /users/:id/organizations`."""
    pair = membership("acme", user)
    return api_responses.read_pairs([pair], {pair: dict(roles)}, Span(at, at))


@pytest.mark.parametrize("kind", KINDS)
def test_roles_come_and_go_with_the_answers_of_logto(kind: StoreKind, tmp_path: Path) -> None:
    """Other columns are filled like those of any mapping."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        await Copy(host).take([ANA, BO, ACME, JOINED])
        await learn(host, read_user_roles("ana", EDITOR | VIEWER, 3_000))
        await learn(host, read_user_roles("bo", VIEWER, 3_000))
        await learn(host, read_member_roles({"o1": "admin", "o2": "billing"}, 3_000))
        expected = [("ana", "editor"), ("ana", "viewer"), ("bo", "viewer")]
        assert application.user_role_names == expected
        assert application.member_role_names == [("ana", "admin"), ("ana", "billing")]
        rows = application.rows(application.user_roles, "logto_role", "source")
        assert rows == [("r1", "logto"), ("r2", "logto"), ("r2", "logto")]
        assert await application.problems() == []
        await learn(host, read_user_roles("ana", VIEWER, 4_000))
        await learn(host, read_member_roles({"o2": "billing"}, 4_000))
        assert application.user_role_names == expected[1:]
        assert application.member_role_names == [("ana", "billing")]
        assert (await counts_of(host, application.user_roles)).ok == 2
        assert await application.problems() == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_arrival_does_not_matter(kind: StoreKind, tmp_path: Path) -> None:
    """The user, the organization, the membership and both kinds of roles, in every order."""

    async def live(order: tuple[object, ...]) -> None:
        application = RoleApplication(kind, tmp_path)
        host = await application.map_roles()
        copy = Copy(host)
        for step in order:
            if isinstance(step, bytes):
                await copy.take([step])
            else:
                assert isinstance(step, list)
                await learn(host, step)
        assert application.user_role_names == [("ana", "editor")]
        assert application.member_role_names == [("ana", "admin")]
        await application.check()
        await application.close()

    steps = [ANA, ACME, read_user_roles("ana", EDITOR, 3_000)]
    steps.append(read_member_roles({"o1": "admin"}, 3_000))
    for order in itertools.permutations(steps):
        asyncio.run(live(order))


@pytest.mark.parametrize("lost", ["a column", "the table"])
@pytest.mark.parametrize("kind", KINDS)
def test_roles_are_not_refused_because_the_table_of_users_was_changed(
    kind: StoreKind, lost: str, tmp_path: Path
) -> None:
    """`mapping check` says of each mapping that refers to it what is missing, and checks others."""

    async def live(application: RoleApplication) -> None:
        await application.map_roles()
        await Copy(application.host).take([ANA, ACME, JOINED])
        await learn(application.host, read_user_roles("ana", EDITOR, 3_000))
        await learn(application.host, read_member_roles({"o1": "admin"}, 3_000))
        application.delete(application.member_roles)
        application.delete(application.members)
        application.delete(application.teams)
        users = application.users.fullname
        change = "COLUMN first_name TO given_name" if lost == "a column" else "TO people"
        with application.engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {users} RENAME {change}"))
        what = f"column {users}.first_name" if lost == "a column" else f"table {users}"
        missing = f"The {what} doesn't exist. Run your migrations"
        referring = (application.members, application.user_roles, application.member_roles)
        assert [
            (each.mapping, each.problem, each.reason)
            async for page in find_differences(application.host, application.mappings)
            for each in page
        ] == [
            (users, "unchecked", missing),
            (application.teams.fullname, "missing", None),
            *(
                (table.fullname, "unchecked", f"Its rows refer to {users}. {missing}")
                for table in referring
            ),
        ]

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_role_that_is_not_there_is_a_conflict_of_it_alone(
    kind: StoreKind, tmp_path: Path
) -> None:
    """It is written once the application has added the role."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        await Copy(host).take([ANA])
        await learn(host, read_user_roles("ana", EDITOR | {"r3": "author"}, 3_000))
        assert application.user_role_names == [("ana", "editor")]
        counts = await counts_of(host, application.user_roles)
        assert (counts.ok, counts.conflict) == (1, 1)
        conflict = await host.read(lambda store: store.mappings.find_oldest("conflict"))
        assert conflict is not None
        assert conflict.reason == "no row has the role's name 'author' in roles"
        name = application.user_roles.fullname
        assert await application.problems() == [(name, "refused", "ana:r3")]
        application.insert(application.roles, name="author")
        assert await retry_unsettled(host, application.mappings) == 1
        assert application.user_role_names == [("ana", "author"), ("ana", "editor")]
        assert await application.problems() == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_rows_with_a_role_s_name_none_is_taken(kind: StoreKind, tmp_path: Path) -> None:
    """The application has to say which one it is."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        application.insert(application.roles, name="editor")
        await Copy(host).take([ANA])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        assert application.user_role_names == []
        conflict = await host.read(lambda store: store.mappings.find_oldest("conflict"))
        assert conflict is not None
        assert conflict.reason == "several rows have the role's name 'editor' in roles"

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_role_that_is_renamed_in_logto_is_another_row(kind: StoreKind, tmp_path: Path) -> None:
    """The former row stays until the application has a role with the new name."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        await Copy(host).take([ANA, ACME, JOINED])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        await learn(host, read_member_roles({"o1": "admin"}, 3_000))
        await learn(host, read_user_roles("ana", {"r1": "viewer"}, 4_000))
        await learn(host, read_member_roles({"o1": "owner"}, 4_000))
        assert application.user_role_names == [("ana", "viewer")]
        assert application.member_role_names == [("ana", "owner")]
        await learn(host, read_user_roles("ana", {"r1": "author"}, 5_000))
        assert application.user_role_names == [("ana", "viewer")]
        assert (await counts_of(host, application.user_roles)).conflict == 1
        application.insert(application.roles, name="author")
        await retry_unsettled(host, application.mappings)
        assert application.user_role_names == [("ana", "author")]
        assert await application.problems() == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_could_not_be_changed_goes_with_its_role(
    kind: StoreKind, tmp_path: Path
) -> None:
    """The database refused the new name, or the mapping raised."""

    async def live(application: RoleApplication) -> None:
        is_broken = False

        def read_id(role: Any) -> str:
            if is_broken:
                raise ValueError("a mapping's own error")
            return str(role.role_id)

        host = await application.map_roles(columns={"logto_role": read_id})
        await Copy(host).take([ANA, ACME, JOINED])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        await learn(host, read_member_roles({"o1": "admin"}, 3_000))
        is_broken = True
        await learn(host, read_user_roles("ana", EDITOR | VIEWER, 4_000))
        await learn(host, read_member_roles({"o1": "forbidden"}, 4_000))
        assert application.user_role_names == [("ana", "editor")]
        assert application.member_role_names == [("ana", "admin")]
        assert (await counts_of(host, application.user_roles)).conflict == 2
        assert (await counts_of(host, application.member_roles)).conflict == 1
        await learn(host, read_user_roles("ana", {}, 5_000))
        await learn(host, read_member_roles({}, 5_000))
        assert application.user_role_names == []
        assert application.member_role_names == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize(
    "names", [("viewer", "editor"), ("viewer", "author"), ("viewer", "viewer")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_renamed_roles_can_have_each_other_s_names(
    kind: StoreKind, names: tuple[str, str], tmp_path: Path
) -> None:
    """Two names are swapped or move up; or, for a while, both have one name."""

    async def live(application: RoleApplication) -> None:
        application.insert(application.roles, name="author")
        host = await application.map_roles(columns={})
        await Copy(host).take([ANA])
        await learn(host, read_user_roles("ana", EDITOR | VIEWER, 3_000))
        renamed = dict(zip(("r1", "r2"), names, strict=True))
        await learn(host, read_user_roles("ana", renamed, 4_000))
        assert application.user_role_names == [("ana", name) for name in sorted({*names})]
        await learn(host, read_user_roles("ana", {"r1": "author", "r2": "editor"}, 5_000))
        assert application.user_role_names == [("ana", "author"), ("ana", "editor")]
        await learn(host, read_user_roles("ana", {}, 6_000))
        assert application.user_role_names == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_roles_go_with_their_user_and_membership(kind: StoreKind, tmp_path: Path) -> None:
    """Before the rows that they refer to. Logto says nothing of the roles."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        copy = Copy(host)
        await copy.take([ANA, ACME, JOINED])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        await learn(host, read_member_roles({"o1": "admin"}, 3_000))
        await copy.take([LEFT])
        assert application.rows(application.member_roles, "role") == []
        assert application.rows(application.members, "id") == []
        assert application.user_role_names == [("ana", "editor")]
        await copy.take([make.user_deleted(id="ana", at=10_000).body])
        assert application.rows(application.user_roles, "user_id") == []
        assert application.rows(application.users, "id") == []
        await application.check()
        for table in (application.user_roles, application.member_roles):
            counts = await counts_of(host, table)
            assert (counts.ok, counts.waiting, counts.conflict, counts.owed) == (0, 0, 0, 0)

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_roles_stay_as_long_as_the_row_of_their_user(kind: StoreKind, tmp_path: Path) -> None:
    """One answer that the user is gone deletes nothing. The second one, a minute later, does."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        await Copy(host).take([ANA, ACME, JOINED])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        await learn(host, read_member_roles({"o1": "admin"}, 3_000))
        await learn(host, [Absent(Key("user", "ana"), 5_000, 5_000)])
        assert application.user_role_names == [("ana", "editor")]
        assert application.member_role_names == [("ana", "admin")]
        for table in (application.user_roles, application.member_roles):
            assert (await counts_of(host, table)).waiting == 1
        await learn(host, [Absent(Key("user", "ana"), 70_000, 70_000)])
        for table in (application.user_roles, application.member_roles, application.users):
            assert application.rows(table, table.primary_key.columns[0].name) == []
        await application.check()

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_users_can_lose_a_role(kind: StoreKind, tmp_path: Path) -> None:
    """What it permits ends at once, and no row is held."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        users = [f"u{n}" for n in range(60)]
        created = [make.user_created(id=user, email=f"{user}@x", at=1_000) for user in users]
        await Copy(host).take([each.body for each in created])
        for roles, at in ((EDITOR | VIEWER, 3_000), (VIEWER, 4_000)):
            answers = [read_user_roles(user, roles, at) for user in users]
            await learn(host, list(itertools.chain(*answers)))
        assert application.user_role_names == sorted((user, "viewer") for user in users)
        counts = await counts_of(host, application.user_roles)
        assert (counts.ok, counts.held) == (60, 0)

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_the_application_added_stay(kind: StoreKind, tmp_path: Path) -> None:
    """A row for a role that the user has in Logto, too, is the mapping's from then on."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        await Copy(host).take([ANA])
        own = application.user_roles
        [(ana,)] = application.rows(application.users, "id")
        ids = dict(application.rows(application.roles, "name", "id"))
        for name in ("editor", "viewer"):
            application.insert(own, user_id=ana, role_id=ids[name], source="own")
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        assert application.rows(own, "logto_role", "source") == [("r1", "own"), (None, "own")]
        assert await application.problems() == [(own.fullname, "extra", "ana:viewer")]
        await learn(host, read_user_roles("ana", {}, 4_000))
        assert application.user_role_names == [("ana", "viewer")]

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_where_selects_roles(kind: StoreKind, tmp_path: Path) -> None:
    """Roles for other applications are no conflicts. A renamed one may be selected no longer."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles(where=lambda role: not role.name.startswith("other:"))
        await Copy(host).take([ANA])
        await learn(host, read_user_roles("ana", EDITOR | {"r9": "other:x"}, 3_000))
        counts = await counts_of(host, application.user_roles)
        assert (counts.ok, counts.conflict) == (1, 0)
        assert await application.problems() == []
        await learn(host, read_user_roles("ana", {"r1": "other:editor"}, 4_000))
        assert application.user_role_names == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_mapping_is_applied_to_all_roles(kind: StoreKind, tmp_path: Path) -> None:
    """In the background, and by the command, which counts the rows."""

    async def live(application: RoleApplication) -> None:
        host = application.host
        await Copy(host).take([ANA, BO, ACME, JOINED])
        for user in ("ana", "bo"):
            await learn(host, read_user_roles(user, EDITOR | VIEWER, 3_000))
        await learn(host, read_member_roles({"o1": "admin"}, 3_000))
        await application.map_roles()
        await application.apply_all()
        assert len(application.user_role_names) == 4
        assert application.member_role_names == [("ana", "admin")]
        application.delete(application.user_roles, application.user_roles.c.logto_role == "r1")
        application.delete(application.member_roles)
        names = [table.fullname for table in (application.user_roles, application.member_roles)]
        assert await application.problems() == [
            (names[0], "missing", "ana:r1"),
            (names[0], "missing", "bo:r1"),
            (names[1], "missing", "acme:ana:o1"),
        ]
        applied = {each.mapping: each for each in await application.apply_again()}
        assert [applied[name].created for name in names] == [2, 1]
        assert await application.problems() == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("links", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_tries_the_roles_of_members_that_it_would_create(
    kind: StoreKind, links: bool, tmp_path: Path
) -> None:
    """One is refused by a constraint of the application. Users are created or linked."""

    async def live(application: RoleApplication) -> None:
        host = application.host
        await Copy(host).take([ANA, BO, ACME, JOINED])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        await learn(host, read_member_roles({"o1": "admin", "o2": "forbidden"}, 3_000))
        if links:
            existing = {"email": "ana@x.example", "plan": "paid", "active": True}
            application.insert(application.users, **existing)
        await application.map_roles({"link": application.users.c.email})
        found = {
            each.logto_id: (each.problem, each.state)
            async for page in find_differences(host, application.mappings)
            for each in page
            if each.mapping == application.member_roles.fullname
        }
        assert found == {
            "acme:ana:o1": ("missing", None),
            "acme:ana:o2": ("missing", "refused"),
        }
        dry = await apply_all(host, application.mappings, dry_run=True)
        assert dry == await apply_all(host, application.mappings)
        by_name = {each.mapping: each for each in dry}
        assert by_name[application.users.fullname].linked == int(links)
        roles = by_name[application.member_roles.fullname]
        assert (roles.created, roles.refused) == (1, 1)
        assert by_name[application.user_roles.fullname].created == 1

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_the_code_owes_the_roles(kind: StoreKind, tmp_path: Path) -> None:
    """New ones as well as those that are over."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        await Copy(host).take([ANA, BO])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        host.project = None
        await learn(host, read_user_roles("ana", VIEWER, 4_000))
        assert application.user_role_names == [("ana", "editor")]
        assert (await counts_of(host, application.user_roles)).owed == 1
        host.project = application.mappings.write
        await retry_unsettled(host, application.mappings, ["owed"])
        assert application.user_role_names == [("ana", "viewer")]
        counts = await counts_of(host, application.user_roles)
        assert (counts.ok, counts.owed) == (1, 0)

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_table_of_roles_pauses_the_mapping(kind: StoreKind, tmp_path: Path) -> None:
    """The rows are owed, and written when the table is there. All else is written at once."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        with application.engine.begin() as connection:
            application.user_roles.drop(connection)
        await Copy(host).take([ANA])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        assert (await counts_of(host, application.user_roles)).owed == 1
        with application.engine.begin() as connection:
            application.user_roles.create(connection)
        await retry_unsettled(host, application.mappings, ["owed"])
        assert application.user_role_names == [("ana", "editor")]
        assert (await counts_of(host, application.user_roles)).owed == 0

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sqlite"])
def test_a_locked_row_of_a_role_that_is_over_is_owed(kind: StoreKind, tmp_path: Path) -> None:
    """It goes when it is free."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles()
        await Copy(host).take([ANA])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        with application.engine.begin() as connection:
            connection.execute(sa.select(application.user_roles).with_for_update())
            await learn(host, read_user_roles("ana", VIEWER, 4_000))
            assert (await counts_of(host, application.user_roles)).owed == 1
        assert application.user_role_names == [("ana", "editor"), ("ana", "viewer")]
        await retry_unsettled(host, application.mappings, ["owed"])
        assert application.user_role_names == [("ana", "viewer")]

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_members_without_rows_have_no_roles(kind: StoreKind, tmp_path: Path) -> None:
    """The mapping of users excludes them, so nothing waits."""

    async def live(application: RoleApplication) -> None:
        host = await application.map_roles({"where": lambda user: user.logto_user_id != "ana"})
        await Copy(host).take([ANA, ACME, JOINED])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        await learn(host, read_member_roles({"o1": "admin"}, 3_000))
        for table in (application.members, application.user_roles, application.member_roles):
            assert (await counts_of(host, table)).waiting == 0
        assert await application.problems() == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_logto_s_ids_and_enumerations(kind: StoreKind, tmp_path: Path) -> None:
    """A table without foreign keys has Logto's ids; of an enumeration, others are conflicts."""

    async def live(application: RoleApplication) -> None:
        await application.map()
        plain = sa.Table(
            "plain",
            application.metadata,
            sa.Column("user", sa.Text, primary_key=True),
            sa.Column("role", sa.Text, primary_key=True),
        )
        ranks = sa.Table(
            "ranks",
            application.metadata,
            sa.Column("team", sa.Text, primary_key=True),
            sa.Column("user", sa.Text, primary_key=True),
            sa.Column(
                "rank",
                sa.Enum(Rank, values_callable=lambda ranks: [rank.value for rank in ranks]),
                primary_key=True,
            ),
        )
        with application.engine.begin() as connection:
            application.metadata.create_all(connection)
        application.mappings.add(declare_user_roles(plain, user="user", role="role"))
        ends: dict[str, Any] = {"organization": "team", "user": "user", "role": "rank"}
        application.mappings.add(declare_member_roles(ranks, **ends, role_by="name"))
        host, registered = application.host, application.mappings.registered
        await host.run(lambda store: store.mappings.register(registered))
        await Copy(host).take([ANA, ACME])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        await learn(host, read_member_roles({"o1": "owner", "o2": "pilot"}, 3_000))
        assert application.rows(plain, "user", "role") == [("ana", "r1")]
        assert application.rows(ranks, "team", "user", "rank") == [("acme", "ana", Rank.OWNER)]
        counts = await counts_of(host, ranks)
        assert (counts.ok, counts.conflict) == (1, 1)
        await learn(host, read_member_roles({"o1": "guest"}, 4_000))
        assert application.rows(ranks, "rank") == [(Rank.GUEST,)]
        assert await application.problems() == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_own_roles_can_have_logto_s_ids(kind: StoreKind, tmp_path: Path) -> None:
    """Or the name in another column. Members can be rows with a key of two columns."""

    async def live(application: RoleApplication) -> None:
        await application.map()
        metadata, teams, users = application.metadata, application.teams, application.users
        titles = sa.Table(
            "titles",
            metadata,
            sa.Column("logto_id", sa.Text, primary_key=True),
            sa.Column("title", sa.Text),
        )
        user_titles = sa.Table(
            "user_titles",
            metadata,
            sa.Column("user_id", sa.ForeignKey(users.c.id), primary_key=True),
            sa.Column("title", sa.ForeignKey(titles.c.logto_id), primary_key=True),
        )
        pairs = sa.Table(
            "pairs",
            metadata,
            sa.Column("team_id", sa.ForeignKey(teams.c.id), primary_key=True),
            sa.Column("user_id", sa.ForeignKey(users.c.id), primary_key=True),
        )
        pair_titles = sa.Table(
            "pair_titles",
            metadata,
            sa.Column("team_id", sa.Integer, primary_key=True),
            sa.Column("user_id", sa.Integer, primary_key=True),
            sa.Column("title", sa.ForeignKey(titles.c.logto_id), primary_key=True),
            sa.ForeignKeyConstraint(["team_id", "user_id"], [pairs.c.team_id, pairs.c.user_id]),
        )
        with application.engine.begin() as connection:
            metadata.create_all(connection)
        ends: dict[str, Any] = {"organization": "team_id", "user": "user_id"}
        by_title = declare_member_roles(pair_titles, **ends, role="title", role_by=titles.c.title)
        application.mappings.add(by_title)
        application.mappings.add(declare_members(pairs, **ends))
        application.mappings.add(
            declare_user_roles(user_titles, user="user_id", role="title", role_by="id")
        )
        host, registered = application.host, application.mappings.registered
        await host.run(lambda store: store.mappings.register(registered))
        application.insert(titles, logto_id="r1", title="admin")
        await learn(host, read_member_roles({"o1": "admin", "o2": "r1"}, 3_000))
        await Copy(host).take([ACME, ANA])
        await learn(host, read_user_roles("ana", EDITOR | VIEWER, 3_000))
        [(team, ana)] = application.rows(pairs, "team_id", "user_id")
        assert application.rows(user_titles, "user_id", "title") == [(ana, "r1")]
        names = ("team_id", "user_id", "title")
        assert application.rows(pair_titles, *names) == [(team, ana, "r1")]
        for table in (user_titles, pair_titles):
            counts = await counts_of(host, table)
            assert (counts.ok, counts.conflict) == (1, 1)
        await Copy(host).take([LEFT])
        assert application.rows(pair_titles, *names) == []
        assert application.rows(pairs, "team_id") == []

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_any_member_of_an_enumeration_is_a_role(kind: StoreKind, tmp_path: Path) -> None:
    """Also one that is 0, and beside aliases."""

    async def live(application: RoleApplication) -> None:
        levels = sa.Table(
            "levels",
            application.metadata,
            sa.Column("person", sa.Text, primary_key=True),
            sa.Column("level", sa.Enum(Level, native_enum=False), primary_key=True),
        )
        levels.create(application.engine)
        options: dict[str, Any] = {"user": "person", "role": "level", "role_by": "name"}
        await application.map_tables(declare_user_roles(levels, **options))
        await application.apply_all()
        await Copy(application.host).take([ANA])
        await learn(application.host, read_user_roles("ana", {"r1": "GUEST", "r2": "OWNER"}, 3_000))
        assert application.rows(levels, "level") == [(Level.GUEST,), (Level.OWNER,)]
        await learn(application.host, read_user_roles("ana", {"r2": "OWNER"}, 4_000))
        assert application.rows(levels, "level") == [(Level.OWNER,)]

    RoleApplication.run(kind, tmp_path, live)
