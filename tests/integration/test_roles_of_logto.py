"""The roles that a Logto answers become rows of the application, on each kind of engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from logto_webhooks.testing.fake import FakeLogto
from tests.support.own_tables import (
    KINDS,
    Application,
    EngineKind,
    MemberRole,
    Role,
    Team,
    TeamMember,
    User,
    UserRole,
)


def names_of_roles(application: Application) -> list[tuple[str, str]]:
    """The email of each user with a role, and its name; likewise for members."""
    of_users = sa.select(User.email, Role.name).select_from(UserRole).join(User).join(Role)
    of_members = sa.select(User.email, MemberRole.role).select_from(MemberRole)
    of_members = of_members.join(TeamMember).join(User)
    with Session(application.beside) as session:
        rows = [*session.execute(of_users), *session.execute(of_members)]
    return sorted((email, name) for email, name in rows)


@pytest.mark.postgres
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_roles_follow_logto(kind: EngineKind, tmp_path: Path) -> None:
    """A backfill or a reconciliation brings them, also if the application hasn't started, and takes
    them away: no webhook tells of them."""

    async def live(application: Application, fake: FakeLogto) -> None:
        logto = application.logto
        application.map_users()
        application.map_teams()
        logto.map_members(TeamMember, organization=TeamMember.team_id, user=TeamMember.user_id)
        logto.map_user_roles(UserRole, user=UserRole.user_id, role=UserRole.role_id)
        logto.map_member_roles(
            MemberRole, member=MemberRole.member_id, role=MemberRole.role, role_by="name"
        )
        await logto.migrate()
        application.write(lambda session: session.add_all([Role(name="editor")]))
        ana = fake.create_user(primaryEmail="ana@x", name="Ana")["id"]
        acme = fake.create_organization(name="Acme")["id"]
        fake.add_members(acme, [ana])
        fake.assign_role(ana, "editor")
        fake.assign_organization_role(acme, ana, "admin")
        await fake.settle()
        await logto.backfill()
        assert names_of_roles(application) == [("ana@x", "admin"), ("ana@x", "editor")]
        assert [each.created for each in await logto.apply_mappings()] == [0, 0, 0, 0, 0]
        assert await logto.check_mappings() == []
        await asyncio.sleep(1.1)  # a Date has whole seconds
        fake.remove_role(ana, "editor")
        fake.assign_organization_role(acme, ana, "billing")
        await logto.reconcile()
        assert names_of_roles(application) == [("ana@x", "admin"), ("ana@x", "billing")]
        await asyncio.sleep(1.1)
        fake.remove_members(acme, [ana])
        await logto.reconcile()
        assert names_of_roles(application) == []
        assert application.all(Team.name) == ["Acme"]
        assert await logto.check_mappings() == []
        await logto.close()

    async def run() -> None:
        async with FakeLogto() as fake:
            api: Any = {
                "endpoint": fake.url,
                "app_id": fake.app_id,
                "app_secret": fake.app_secret,
            }
            with Application(kind, tmp_path, **api).opened() as application:
                await live(application, fake)
                if isinstance(application.engine, AsyncEngine):
                    await application.engine.dispose()

    asyncio.run(run())
