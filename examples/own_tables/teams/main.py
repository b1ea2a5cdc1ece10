"""The application: it reads its own tables alone, and Logto's webhook fills them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI

from logto_webhooks.fastapi import router
from teams.logto import logto
from teams.models import Base, Role, Team, TeamMember, User, UserRole, Welcome, engine


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Create the application's tables. Yours has migrations: see docs/how-to/alembic.md."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.include_router(router(logto))  # POST /api/webhooks/logto


@app.get("/users")
async def list_users() -> list[dict[str, Any]]:
    """List users with their messages."""
    query = sa.select(User.__table__, sa.func.array_agg(Welcome.text).label("welcomes"))
    query = query.outerjoin(Welcome).group_by(User.id).order_by(User.id)
    async with engine.connect() as connection:
        return [dict(row) for row in (await connection.execute(query)).mappings()]


@app.get("/members")
async def list_members() -> list[dict[str, Any]]:
    """List the members of all teams."""
    query = sa.select(Team.name, User.email, TeamMember.role).join_from(TeamMember, Team).join(User)
    async with engine.connect() as connection:
        rows = await connection.execute(query.order_by(Team.name, User.email))
        return [dict(row) for row in rows.mappings()]


@app.get("/roles")
async def list_roles() -> list[dict[str, Any]]:
    """List the roles of all users."""
    query = sa.select(User.email, Role.name).join_from(UserRole, User).join(Role)
    async with engine.connect() as connection:
        rows = await connection.execute(query.order_by(User.email, Role.name))
        return [dict(row) for row in rows.mappings()]
