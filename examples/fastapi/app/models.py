"""The application's own tables, and the one of Logto's users that it joins with them."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from logto_webhooks import tables

# Written by logto-webhooks alone, and made by its migrations: no model, so not in Base.metadata.
logto_users = tables.users


class Base(DeclarativeBase):
    """Of all models, and what Alembic compares with the database."""


class Workspace(Base):
    """Where a user works; `owner` is Logto's id of the user."""

    __tablename__ = "workspaces"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(unique=True)
    title: Mapped[str]


class SignIn(Base):
    """The audit: who signed in, when and from where."""

    __tablename__ = "sign_ins"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_user_id: Mapped[str] = mapped_column(index=True)
    at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))
    ip: Mapped[str | None]


class Greeting(Base):
    """A mail that was sent; the key makes it one."""

    __tablename__ = "greetings"

    key: Mapped[str] = mapped_column(primary_key=True)
    logto_user_id: Mapped[str] = mapped_column(index=True)
    text: Mapped[str]


class Note(Base):
    """What a user wrote; `author` is Logto's id of the user."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    author: Mapped[str] = mapped_column(index=True)
    text: Mapped[str]
