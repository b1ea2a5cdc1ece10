"""The application's own tables. Its users are older than its Logto."""

from __future__ import annotations

import os

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

url = sa.make_url(os.environ["DATABASE_URL"])
engine = create_async_engine(url.set(drivername="postgresql+asyncpg"))


class Base(DeclarativeBase):
    """Of all models."""


class User(Base):
    """Somebody who signs in with Logto. `logto_user_id` is null until then."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_user_id: Mapped[str | None] = mapped_column(unique=True)
    email: Mapped[str | None] = mapped_column(unique=True)
    first_name: Mapped[str | None]
    plan: Mapped[str]
    active: Mapped[bool]


class Team(Base):
    """An organization of Logto."""

    __tablename__ = "teams"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]


class TeamMember(Base):
    """A member of a team. Foreign keys refer to this application's own IDs."""

    __tablename__ = "team_members"

    team_id: Mapped[int] = mapped_column(sa.ForeignKey(Team.id), primary_key=True)
    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id), primary_key=True)
    role: Mapped[str]


class Role(Base):
    """A role that this application knows, by the name that it has in Logto."""

    __tablename__ = "roles"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class UserRole(Base):
    """A role of a user."""

    __tablename__ = "user_roles"

    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id), primary_key=True)
    role_id: Mapped[int] = mapped_column(sa.ForeignKey(Role.id), primary_key=True)


class Welcome(Base):
    """A message for a new user. Two rows for one user would be two messages."""

    __tablename__ = "welcomes"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id, ondelete="CASCADE"))
    text: Mapped[str]
