"""How Logto's users, organizations, members and roles become rows of the application's tables."""

from __future__ import annotations

import os

from sqlalchemy.ext.asyncio import AsyncSession

from logto_webhooks import LogtoWebhooks, events
from teams.models import Team, TeamMember, User, UserRole, Welcome, engine

logto = LogtoWebhooks(engine=engine, environment=os.environ)

logto.map_users(
    User,
    key=User.logto_user_id,
    link=User.email,  # rows from before Logto
    columns={User.email: "email", User.active: lambda user: not user.is_suspended},
    fill={User.first_name: "profile.givenName"},
    create_defaults={User.plan: "free"},
    when_deleted={User.active: False},
)
logto.map_organizations(Team, key=Team.logto_id, columns={Team.name: "name"}, when_deleted="delete")
logto.map_members(
    TeamMember,
    organization=TeamMember.team_id,
    user=TeamMember.user_id,
    columns={TeamMember.role: lambda member: "admin" if "admin" in member.roles else "member"},
)
logto.map_user_roles(UserRole, user=UserRole.user_id, role=UserRole.role_id)


@logto.on(events.LocalUserCreated)
async def welcome(user: User, session: AsyncSession) -> None:
    """The message commits together with the job, so there is one for each user. A user who was
    deleted and exists again, which `event.restored` tells, gets another one."""
    session.add(Welcome(user_id=user.id, text=f"Welcome, {user.first_name or user.email}!"))
