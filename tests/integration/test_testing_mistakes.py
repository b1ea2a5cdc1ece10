"""What a test gives `testing.app` by mistake: each error says what to give instead."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, events, testing
from logto_webhooks.errors import (
    HandlerUnknown,
    InvalidHandler,
    InvalidMapping,
    SchemaMismatch,
    SettingInvalid,
)
from logto_webhooks.testing import make
from tests.support import postgres


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    """An application's own engine, migrated."""
    made = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    asyncio.run(LogtoWebhooks(signing_key="x", engine=made).migrate())
    yield made
    made.dispose()


@pytest.fixture
def logto(engine: sa.Engine) -> LogtoWebhooks:
    """With a handler that asks for a session."""
    logto = LogtoWebhooks(signing_key="x", engine=engine)

    @logto.on(events.LocalUserCreated, name="ours")
    def ours(session: Session) -> None: ...

    return logto


def test_a_mapping_with_which_the_application_would_not_start(logto: LogtoWebhooks) -> None:
    """Its members refer to users that aren't mapped."""
    metadata = sa.MetaData()
    key = sa.Column("id", sa.Integer, primary_key=True)
    sa.Table("people", metadata, key)
    members = sa.Table(
        "members",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("team", sa.String),
        sa.Column("person", sa.ForeignKey("people.id")),
    )
    logto.map_members(members, organization="team", user="person")
    with pytest.raises(InvalidMapping, match="person refers to people, which isn't mapped") as here:
        testing.app(logto)
    with pytest.raises(InvalidMapping) as there:
        asyncio.run(start(logto))
    assert str(here.value) == str(there.value)


async def start(logto: LogtoWebhooks) -> None:
    async with logto.lifespan():
        pass


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ((), "nothing"),
        (([],), "nothing"),
        ((None,), "NoneType"),
        (("x",), "str"),
        ((make.user_created(), b"x"), "int"),
        ((make.user_created,), "partial"),
    ],
)
def test_only_what_make_made_is_delivered(given: tuple[Any, ...], what: str) -> None:
    """Nothing of it is delivered, and it says what was given."""
    app = testing.App()
    with pytest.raises(SettingInvalid, match=rf"deliveries from testing\.make.* not {what}"):
        app.deliver(*given)
    assert app.status().deliveries["done"] == 0


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1, -0.001, "5", True, 1e300])
def test_time_passes_by_a_number_of_seconds(seconds: Any) -> None:
    """Never back, and no time passes for what is none."""
    app = testing.App()
    before = app.clock.now()
    with pytest.raises(SettingInvalid, match="tick can't be used: pass seconds"):
        app.tick(seconds)
    assert app.clock.now() == before


def test_a_handler_is_made_to_fail_by_its_name_or_itself(
    logto: LogtoWebhooks, engine: sa.Engine
) -> None:
    """Who isn't there is told who is; an error is an exception, some times."""
    with engine.connect() as connection:
        app = testing.app(logto, connection)
        for handler in ("theirs", print):
            with pytest.raises(HandlerUnknown, match="Known handlers: ours"):
                app.fail(handler)
        with pytest.raises(SettingInvalid, match="pass an exception, such as"):
            app.fail("ours", ConnectionError)  # type: ignore[arg-type]
        with pytest.raises(SettingInvalid, match="times can't be used"):
            app.fail("ours", times=0)
        assert app.deliver(make.user_created()).ran == ["ours"]


def test_what_is_no_open_connection_is_told(logto: LogtoWebhooks, engine: sa.Engine) -> None:
    """An engine, a session, a connection that is closed, a database without our schema."""
    with engine.connect() as connection:
        for what, told in (
            (engine, r"not Engine, which engine\.connect\(\) opens"),
            (Session(connection), r"not Session; pass session\.connection\(\)"),
            ("sqlite://", "must be a Connection or an AsyncConnection, not str"),
        ):
            with pytest.raises(SettingInvalid, match=told):
                testing.app(logto, what)  # type: ignore[call-overload]
    with pytest.raises(SettingInvalid, match=r"isn't open; use it inside `with engine\.connect"):
        testing.app(logto, connection)
    with sa.create_engine("sqlite://", poolclass=sa.NullPool).connect() as elsewhere:
        app = testing.app(logto, elsewhere)
        with pytest.raises(SchemaMismatch, match="migrate"):
            app.deliver(make.user_created())
    url = "postgresql://postgres@127.0.0.1/never-asked"
    schemed = LogtoWebhooks(signing_key="x", database_url=url, schema="mine")
    with (
        engine.connect() as connection,
        pytest.raises(SettingInvalid, match="SQLite, which has no schema 'mine'"),
    ):
        testing.app(schemed, connection)


@pytest.mark.postgres
def test_a_transaction_is_of_the_connections_kind(logto: LogtoWebhooks, engine: sa.Engine) -> None:
    """What is awaited needs an AsyncConnection, opened."""
    url = postgres.server_url().set(drivername="postgresql+asyncpg")
    awaited = LogtoWebhooks(signing_key="x", engine=create_async_engine(url))

    @awaited.on(events.LocalUserCreated, name="awaits")
    async def awaits(session: AsyncSession) -> None: ...

    with pytest.raises(InvalidHandler, match=r"'session'.*an AsyncConnection"):
        testing.app(awaited)
    with engine.connect() as connection, pytest.raises(InvalidHandler, match="an AsyncConnection"):
        testing.app(awaited, connection)

    async def run() -> None:
        unopened = create_async_engine(url).connect()
        with pytest.raises(SettingInvalid, match="`async with"):
            testing.app(awaited, unopened)
        with pytest.raises(SettingInvalid, match=r"await session\.connection\(\)"):
            testing.app(awaited, AsyncSession())  # type: ignore[call-overload]

    asyncio.run(run())


def test_jobs_of_handlers_without_code_here_are_left_alone(
    logto: LogtoWebhooks, engine: sa.Engine
) -> None:
    """Those in the database already: `tick` goes on to the next retry of ours, whatever is due."""
    other = LogtoWebhooks(signing_key="x", engine=engine)

    @other.on(events.LocalUserCreated, name="theirs")
    def theirs() -> None: ...

    with engine.connect() as connection:
        testing.app(other, connection).deliver(make.user_created(id="bo"))
        app = testing.app(logto, connection)
        app.fail("ours", times=2)
        assert app.deliver(make.user_created(id="ana")).runs[0].state == "waiting"
        assert [each.state for each in app.tick()] == ["waiting"]
        assert [each.state for each in app.tick()] == ["done"]
        assert app.tick() == []
        states = {(each.handler, each.subject): each.state for each in app.jobs()}
        assert states == {
            ("theirs", "user:bo"): "done",
            ("theirs", "user:ana"): "waiting",
            ("ours", "user:ana"): "done",
        }
