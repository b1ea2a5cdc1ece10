"""When a user or an organization gets a row, so do its memberships and their roles."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.apply import OWED, apply_step, retry_unsettled
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import (
    MemberRow,
    declare_member_roles,
    declare_members,
    declare_user_roles,
)
from logto_webhooks.mapping.memberships import FEW
from logto_webhooks.testing import make
from tests.integration.test_mapping_roles import (
    ANA,
    EDITOR,
    JOINED,
    RoleApplication,
    read_member_roles,
    read_user_roles,
)
from tests.support.mapped_application import KINDS, learn
from tests.support.stores import Copy, StoreKind

ACME = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
RENAMED = make.event("Organization.Data.Updated", id="acme", name="Acme Inc.", at=5_000).body
NAMED = make.user_data_updated(id="ana", email="ana@x.example", name="Ana Silva", at=5_000).body


def join_roles(member: MemberRow) -> str:
    return ",".join(member.roles)


class Followed(RoleApplication):
    """All five tables are mapped, with other options for users and organizations."""

    async def map_all(self, users: dict[str, Any], teams: dict[str, Any]) -> HandlerRunner:
        """Map the five tables."""
        own, mappings = self.users.c, Mappings()
        mappings.add(
            declare_entities(
                "user",
                self.users,
                **{
                    "key": own.logto_user_id,
                    "columns": {own.email: "email", own.active: lambda u: not u.is_suspended},
                    "create_defaults": {own.plan: "free"},
                    "when_deleted": "delete",
                    **users,
                },
            )
        )
        mappings.add(
            declare_entities(
                "organization",
                self.teams,
                **{
                    "key": "logto_id",
                    "columns": {"name": "name"},
                    "when_deleted": "delete",
                    **teams,
                },
            )
        )
        ends: dict[str, Any] = {"organization": "team_id", "user": "user_id"}
        mappings.add(declare_members(self.members, columns={"role": join_roles}, **ends))
        mappings.add(declare_user_roles(self.user_roles, user="user_id", role="role_id"))
        mappings.add(
            declare_member_roles(self.member_roles, member="member_id", role="role", role_by="name")
        )
        self.mappings = mappings
        self.host.project = mappings.write
        await self.host.run(lambda store: store.mappings.register(mappings.registered))
        await self.apply_all()
        return self.host

    async def retry_owed(self) -> int:
        """Write what is owed."""
        return await retry_unsettled(self.host, self.mappings, OWED)

    @property
    def member_count(self) -> int:
        """How many rows of members there are."""
        return len(self.rows(self.members, "id"))


def _is_named(row: Any) -> bool:
    return bool(row.name == "Ana Silva")


LINKED = {"create": False, "link": "email"}


@pytest.mark.parametrize(
    ("users", "teams", "change"),
    [
        ({"where": _is_named}, {}, NAMED),
        ({"create": False}, {}, NAMED),
        (LINKED, {}, NAMED),
        ({}, {"where": lambda row: row.name != "Acme"}, RENAMED),
        ({}, {"create": False}, RENAMED),
        ({}, {"create": False, "link": "name"}, RENAMED),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_excluded_end_gets_a_row(
    kind: StoreKind,
    users: dict[str, Any],
    teams: dict[str, Any],
    change: bytes,
    tmp_path: Path,
) -> None:
    """Because `where` selects it now, because a row can be linked, or because of a row that the
    application inserted with Logto's ID. Memberships, members' roles and users' roles follow."""

    async def live(application: Followed) -> None:
        host = await application.map_all(users, teams)
        copy = Copy(host)
        await copy.take([ANA, ACME, JOINED])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        await learn(host, read_member_roles({"o1": "admin"}, 3_000))
        assert application.member_count == 0
        assert await application.problems() == []
        email = "ana@x.example"
        if "create" in users:
            key = None if "link" in users else "ana"
            application.insert(
                application.users, logto_user_id=key, email=email, plan="paid", active=True
            )
        if "create" in teams:
            key = None if "link" in teams else "acme"
            application.insert(application.teams, logto_id=key, name="Acme Inc.")
        await copy.take([change])
        assert application.member_count == 1
        assert application.member_role_names == [("ana", "admin")]
        assert application.user_role_names == [("ana", "editor")]
        assert await application.problems() == []

    Followed.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_many_memberships_follow_in_steps(kind: StoreKind, tmp_path: Path) -> None:
    """The transaction that writes the organization only notes it."""

    async def live(application: Followed) -> None:
        host = await application.map_all({}, {"where": lambda row: row.name != "Acme"})
        copy = Copy(host)
        ids = [f"u{n}" for n in range(FEW + 200)]
        await copy.take(
            [make.user_created(id=i, email=f"{i}@x.example", at=1_000).body for i in ids]
        )
        added = make.organization_membership_updated(id="acme", at=1_500, addedUserIds=ids).body
        await copy.take([ACME, added])
        assert application.member_count == 0
        await copy.take([RENAMED])
        assert application.member_count == 0
        counts = {c.mapping: c for c in await host.read(lambda store: store.mappings.status())}
        assert counts[application.members.fullname].owed == 1
        steps = 0
        while await apply_step(host, application.mappings) is not None:
            steps += 1
        assert steps >= 3
        assert application.member_count == FEW + 200
        await application.check()

    Followed.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_the_mapping_of_members_owes_them(
    kind: StoreKind, tmp_path: Path
) -> None:
    """An old release has only the mappings of users and organizations."""

    async def live(application: Followed) -> None:
        host = await application.map_all({"where": _is_named}, {})
        copy = Copy(host)
        await copy.take([ANA, ACME, JOINED])
        await learn(host, read_user_roles("ana", EDITOR, 3_000))
        await learn(host, read_member_roles({"o1": "admin"}, 3_000))
        old = Mappings()
        for mapping in application.mappings.entities:
            old.add(mapping)
        host.project = old.write
        await copy.take([NAMED])
        assert len(application.rows(application.users, "id")) == 1
        assert application.member_count == 0
        host.project = application.mappings.write
        assert await application.retry_owed() > 0
        assert application.member_role_names == [("ana", "admin")]
        assert application.user_role_names == [("ana", "editor")]

    Followed.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_stays_keeps_its_memberships(kind: StoreKind, tmp_path: Path) -> None:
    """`where` selects the user no longer, but the row stays, and new memberships get one, too."""

    async def live(application: Followed) -> None:
        host = await application.map_all({"where": lambda row: row.name != "Ana Silva"}, {})
        copy = Copy(host)
        await copy.take([ANA, ACME, JOINED])
        assert application.member_count == 1
        await copy.take([NAMED])
        assert application.member_count == 1
        new = make.event("Organization.Created", id="new", name="New", at=6_000).body
        added = make.organization_membership_updated(id="new", at=6_500, addedUserIds=["ana"]).body
        await copy.take([new, added])
        assert application.member_count == 2

    Followed.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_come_at_once(kind: StoreKind, tmp_path: Path) -> None:
    """In one transaction, and in two that don't see each other."""

    async def live(application: Followed) -> None:
        users, teams = {"where": _is_named}, {"where": lambda row: row.name != "Acme"}
        host = await application.map_all(users, teams)
        copy = Copy(host)
        await copy.take([ANA, ACME, JOINED])
        await asyncio.gather(copy.take([NAMED]), Copy(host).take([RENAMED]))
        await application.retry_owed()
        assert application.member_count == 1

    Followed.run(kind, tmp_path, live)


def test_a_row_with_the_primary_key_of_a_deleted_one(tmp_path: Path) -> None:
    """SQLite uses primary keys again."""

    async def live(application: Followed) -> None:
        host = await application.map_all({}, {})
        copy = Copy(host)
        await copy.take([ANA, ACME, JOINED])
        before = application.rows(application.users, "id")
        application.delete(application.members)
        application.delete(application.users)
        await copy.take([NAMED])
        assert application.rows(application.users, "id") == before
        assert application.member_count == 1

    Followed.run("sqlite", tmp_path, live)
