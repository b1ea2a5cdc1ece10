"""The `schema_translate_map` of the application's engine holds for its mapped tables, and for the
sessions of handlers; this package's tables are elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from logto_webhooks import LogtoWebhooks, events, testing
from logto_webhooks.database.schema import mapped_rows
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, live, send, soon, until

Kind = Literal["sqlite", "psycopg", "asyncpg"]
KINDS: tuple[Kind, ...] = ("sqlite", "psycopg", "asyncpg")


class Base(DeclarativeBase):
    metadata = sa.MetaData(schema="app")


class Plan(Base):
    __tablename__ = "plans"

    name: Mapped[str] = mapped_column(primary_key=True)


class User(Base):
    __tablename__ = "own_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_id: Mapped[str | None] = mapped_column(unique=True)
    email: Mapped[str | None]
    plan: Mapped[str | None] = mapped_column(
        sa.ForeignKey(Plan.name, deferrable=True, initially="DEFERRED")
    )


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@contextmanager
def opened(kind: Kind, folder: Path) -> Iterator[tuple[sa.Engine | AsyncEngine, sa.Engine]]:
    """An application's engine, and one for what the test does beside it. In PostgreSQL, its schema
    `app` is called `theirs`. In SQLite, there is none."""
    if kind == "sqlite":
        url = sa.make_url(f"sqlite:///{folder / 'app.db'}")
        engine = sa.create_engine(url).execution_options(schema_translate_map={"app": None})
        Base.metadata.create_all(engine)
        yield engine, engine
        engine.dispose()
        return
    schemas = {"app": "theirs"}
    with postgres.own_database() as url:
        beside = sa.create_engine(url.set(drivername="postgresql+psycopg"))
        beside = beside.execution_options(schema_translate_map=schemas)
        with beside.begin() as connection:
            connection.execute(sa.schema.CreateSchema("theirs"))
            Base.metadata.create_all(connection)
        if kind == "psycopg":
            yield beside, beside
        else:
            own = create_async_engine(url.set(drivername="postgresql+asyncpg"))
            yield own.execution_options(schema_translate_map=schemas), beside
        beside.dispose()


def map_users(engine: sa.Engine | AsyncEngine) -> LogtoWebhooks:
    """Map users, and welcome them."""
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine)
    columns: dict[Any, str] = {User.email: "email", User.plan: "custom_data.plan"}
    logto.map_users(User, key=User.logto_id, columns=columns, when_deleted="delete")

    def welcome(user: User, session: Session) -> None:
        session.add(Note(text=f"welcome, {user.email}"))

    async def welcome_awaited(user: User, session: AsyncSession) -> None:
        session.add(Note(text=f"welcome, {user.email}"))

    is_async = isinstance(engine, AsyncEngine)
    logto.on(events.LocalUserCreated, name="welcome")(welcome_awaited if is_async else welcome)
    return logto


def read_notes(connection: sa.Connection) -> list[str]:
    return list(connection.scalars(sa.select(Note.text)))


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_mounted_application(kind: Kind, tmp_path: Path) -> None:
    with opened(kind, tmp_path) as (engine, beside):

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            created = make.user_created(id="ana", email="ana@example.com", at=soon())
            await send(client, created)
            [job] = await until(all_over(1), logto)
            assert (job.state, job.error) == ("done", None)

        live(map_users(engine), body)
        with beside.connect() as connection:
            assert read_notes(connection) == ["welcome, ana@example.com"]


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_connection_of_a_test(kind: Kind, tmp_path: Path) -> None:
    created = make.user_created(id="ana", email="ana@example.com")

    async def deliver(engine: AsyncEngine) -> None:
        logto = map_users(engine)
        await logto.migrate()
        async with engine.connect() as connection:
            delivered = await testing.app(logto, connection).deliver(created)
            assert delivered.ran == ["welcome"]
            assert await connection.run_sync(read_notes) == ["welcome, ana@example.com"]
        await engine.dispose()

    with opened(kind, tmp_path) as (engine, _):
        if isinstance(engine, AsyncEngine):
            asyncio.run(deliver(engine))
            return
        logto = map_users(engine)
        logto.call(logto.migrate())
        with engine.connect() as connection:
            assert testing.app(logto, connection).deliver(created).ran == ["welcome"]
            assert read_notes(connection) == ["welcome, ana@example.com"]


def test_of_a_connection_in_memory(tmp_path: Path) -> None:
    """It can be set after the application was created."""
    app = testing.app(map_users(sa.create_engine(f"sqlite:///{tmp_path / 'never.db'}")))
    app.connection.execution_options(schema_translate_map={"app": None})
    Base.metadata.create_all(app.connection)
    assert app.deliver(make.user_created(email="ana@example.com")).ran == ["welcome"]
    assert read_notes(app.connection) == ["welcome, ana@example.com"]


@pytest.mark.postgres
def test_what_a_handler_calls_leaves_nothing_on_the_connection_of_a_test(tmp_path: Path) -> None:
    """After `ensure_user` in its session, rows are still checked before they count as written."""
    with opened("psycopg", tmp_path) as (engine, beside):
        logto = map_users(engine)
        logto.call(logto.migrate())

        @logto.on("Organization.Created", name="ensures")
        def ensures(session: Session) -> None:
            logto.call(logto.ensure_user({"sub": "eve"}, session=session))

        with beside.connect() as connection:
            app = testing.app(logto, connection)
            assert "ensures" in app.deliver(make.organization_created()).ran
            app.deliver(make.user_created(id="ana", customData={"plan": "none"}))
            assert "ana" not in connection.scalars(sa.select(User.logto_id)).all()
            of_ana = sa.select(mapped_rows.c.state).where(mapped_rows.c.logto_id == "ana")
            assert connection.scalars(of_ana).all() == ["conflict"]
