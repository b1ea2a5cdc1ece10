"""An application with tables of its own, which map Logto's users and organizations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Unpack

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from logto_webhooks import LogtoWebhooks
from logto_webhooks.settings import MountedSettings
from logto_webhooks.testing import SIGNING_KEY
from tests.support import postgres

EngineKind = Literal["sqlite", "psycopg", "asyncpg", "psycopg awaited"]
KINDS: tuple[EngineKind, ...] = ("sqlite", "psycopg", "asyncpg", "psycopg awaited")


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "own_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_id: Mapped[str | None] = mapped_column(unique=True)
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str | None]


class Team(Base):
    __tablename__ = "own_teams"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]


class TeamMember(Base):
    __tablename__ = "own_members"

    id: Mapped[int] = mapped_column(primary_key=True)
    team_id: Mapped[int] = mapped_column(sa.ForeignKey(Team.id))
    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id))


class Role(Base):
    __tablename__ = "own_roles"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class UserRole(Base):
    __tablename__ = "own_user_roles"

    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id), primary_key=True)
    role_id: Mapped[int] = mapped_column(sa.ForeignKey(Role.id), primary_key=True)


class MemberRole(Base):
    __tablename__ = "own_member_roles"

    member_id: Mapped[int] = mapped_column(sa.ForeignKey(TeamMember.id), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)


class Note(Base):
    """What a handler writes."""

    __tablename__ = "own_notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Application:
    """A LogtoWebhooks object on an engine of a kind, with empty tables."""

    def __init__(self, kind: EngineKind, folder: Path, **settings: Unpack[MountedSettings]) -> None:
        self.kind = kind
        self.is_async = kind in ("asyncpg", "psycopg awaited")
        self.engine: sa.Engine | AsyncEngine
        if kind == "sqlite":
            self.engine = self.beside = sa.create_engine(f"sqlite:///{folder / 'app.db'}")
        else:
            settings["schema"] = postgres.emptied_schema()
            own = f"{settings['schema']}_own"
            with postgres.sync_engine().begin() as connection:
                connection.execute(sa.text(f"DROP SCHEMA IF EXISTS {own} CASCADE"))
                connection.execute(sa.text(f"CREATE SCHEMA {own}"))
            url = postgres.server_url()
            psycopg = url.set(drivername="postgresql+psycopg")
            options = {"options": f"-csearch_path={own}"}
            self.beside = sa.create_engine(psycopg, connect_args=options)
            if kind == "psycopg":
                self.engine = sa.create_engine(psycopg, connect_args=options)
            elif kind == "asyncpg":
                self.engine = create_async_engine(
                    url.set(drivername="postgresql+asyncpg"),
                    connect_args={"server_settings": {"search_path": own}},
                )
            else:
                self.engine = create_async_engine(psycopg, connect_args=options)
        Base.metadata.create_all(self.beside)
        self.logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=self.engine, **settings)

    def map_users(self, **changes: Any) -> None:
        """Map users; `changes` are those to the mapping."""
        mapping: dict[str, Any] = {
            "key": User.logto_id,
            "columns": {User.email: "email", User.name: "name"},
            "when_deleted": "delete",
        }
        self.logto.map_users(User, **mapping | changes)

    def map_teams(self) -> None:
        """Map organizations."""
        self.logto.map_organizations(
            Team, key=Team.logto_id, columns={Team.name: "name"}, when_deleted="delete"
        )

    def all(self, column: Any) -> list[Any]:
        """The values of a column, in order."""
        with Session(self.beside) as session:
            return sorted(session.scalars(sa.select(column)), key=repr)

    def write(self, work: Callable[[Session], object]) -> None:
        """Write to the application's tables."""
        with Session(self.beside) as session, session.begin():
            work(session)

    @contextmanager
    def opened(self) -> Iterator[Application]:
        """Close the synchronous engines in the end."""
        try:
            yield self
        finally:
            self.beside.dispose()
            if isinstance(self.engine, sa.Engine):
                self.engine.dispose()
