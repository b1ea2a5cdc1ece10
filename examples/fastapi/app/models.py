"""The application's own tables, and the table of Logto's users."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from logto_webhooks import tables

# Written by logto-webhooks alone, and made by its migrations: no model, so not in Base.metadata.
logto_users = tables.users


class Base(DeclarativeBase):
    """The base class of all models. Alembic compares its metadata with the database."""


class Workspace(Base):
    """A user's workspace. `owner` is the user's Logto ID."""

    __tablename__ = "workspaces"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(unique=True)
    title: Mapped[str]


class SignIn(Base):
    """A sign-in: who, when and from which address."""

    __tablename__ = "sign_ins"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_user_id: Mapped[str] = mapped_column(index=True)
    at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))
    ip: Mapped[str | None]


class Greeting(Base):
    """A mail that was sent. The key prevents a second one."""

    __tablename__ = "greetings"

    key: Mapped[str] = mapped_column(primary_key=True)
    logto_user_id: Mapped[str] = mapped_column(index=True)
    text: Mapped[str]


class Note(Base):
    """A note. `author` is the Logto ID of the user who wrote it."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    author: Mapped[str] = mapped_column(index=True)
    text: Mapped[str]
