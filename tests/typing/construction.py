"""Making one, and what it answers."""

from __future__ import annotations

from typing import assert_type

import sqlalchemy as sa
from fastapi import APIRouter, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from starlette.applications import Starlette
from starlette.routing import Route

from logto_webhooks import LogtoWebhooks, UserIsDeletedError, UserNotReady, UserRoleRow, UserRow
from logto_webhooks.fastapi import exception_handlers as fastapi_handlers
from logto_webhooks.fastapi import router
from logto_webhooks.starlette import exception_handlers, routes

by_url = LogtoWebhooks(signing_key="k", database_url="sqlite:///app.db", worker=False)
by_engine = LogtoWebhooks(signing_key="k", engine=sa.create_engine("sqlite:///app.db"))
by_async_engine = LogtoWebhooks(
    signing_key="k,older",
    engine=create_async_engine("postgresql+asyncpg://127.0.0.1/app"),
    path="/hooks/logto",
    schema="logto",
    endpoint="https://auth.example.com",
    app_id="app",
    app_secret="secret",
    api_budget=5,
    recover_every_s=60,
)
by_environment = LogtoWebhooks.from_env(path="/hooks/logto")

assert_type(router(by_url), APIRouter)
api = FastAPI(exception_handlers=fastapi_handlers)
api.include_router(router(by_url))
assert_type(routes(by_url), list[Route])
application = Starlette(
    routes=routes(by_url), lifespan=by_url.lifespan, exception_handlers=exception_handlers
)
api.mount("/logto", by_engine)


async def early(session: AsyncSession, sync_session: Session) -> None:
    """A user of a token whom no webhook told of yet."""
    claims = {"sub": "ana", "email": "ana@example.com"}
    assert_type(await by_async_engine.ensure_user(claims), UserRow)
    assert_type(await by_async_engine.ensure_user(claims, session=session), UserRow)
    assert_type(await by_engine.ensure_user(claims, session=sync_session), UserRow)
    try:
        assert_type(await by_url.wait_for_user("ana", timeout_s=1), UserRow)
    except UserIsDeletedError as error:
        assert_type(str(error), str)
    assert_type((await by_url.status()).deliveries, dict[str, int])


class Base(DeclarativeBase):
    """The application's own classes."""


class Account(Base):
    """One of them."""

    __tablename__ = "accounts"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_id: Mapped[str] = mapped_column(unique=True)
    email: Mapped[str | None]


by_engine.map_users(
    Account, key=Account.logto_id, columns={Account.email: "email"}, when_deleted="delete"
)


class Membership(Base):
    """Another."""

    __tablename__ = "memberships"

    id: Mapped[int] = mapped_column(primary_key=True)
    team_id: Mapped[str]
    account_id: Mapped[int] = mapped_column(sa.ForeignKey(Account.id))


class Permission(Base):
    """Somebody's role."""

    __tablename__ = "permissions"

    owner_id: Mapped[int] = mapped_column(primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    is_admin: Mapped[bool]


def is_admin(role: UserRoleRow) -> bool:
    """A function of the mapping."""
    return role.name == "admin" and role.user_id != role.role_id


by_engine.map_members(Membership, organization=Membership.team_id, user=Membership.account_id)
by_engine.map_user_roles(
    Permission,
    user=Permission.owner_id,
    role=Permission.role,
    role_by="name",
    columns={Permission.is_admin: is_admin},
    where=lambda role: role.name != "",
)
by_url.map_members(Membership, organization=Membership.team_id, user=Membership.account_id)
by_url.map_member_roles(
    Permission,
    organization=Permission.owner_id,
    user="user",
    role=Permission.role,
    columns={Permission.is_admin: lambda role: role.organization_id == role.user_id},
)


@by_engine.on("LocalUserCreated")
def own_object(account: Account, session: Session) -> None:
    """A handler gets it."""
    assert_type(account.email, str | None)


async def own(session: AsyncSession, sync_session: Session) -> None:
    """A request gets it."""
    claims = {"sub": "ana"}
    try:
        assert_type(await by_async_engine.get_user(Account, claims, session=session), Account)
    except UserNotReady as error:
        assert_type(error.reason, str)
    assert_type(await by_engine.get_user(Account, claims, session=sync_session), Account)


def own_in_a_thread(session: Session) -> None:
    """Beside the event loop."""
    assert_type(by_url.call(by_url.get_user(Account, {"sub": "ana"}, session=session)), Account)


def in_a_thread() -> str:
    """Beside the event loop."""
    row = by_url.call(by_url.ensure_user({"sub": "ana"}))
    assert_type(row, UserRow)
    return row.id
