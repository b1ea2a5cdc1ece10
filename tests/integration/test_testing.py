"""What users test their handlers with: an application on a connection that the test opened."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import Delivery, Discard, LogtoWebhooks, UserRow, events, testing
from logto_webhooks.database import runner
from logto_webhooks.errors import (
    HandlerNotAwaited,
    HandlerUnknown,
    SchemaMismatch,
    SettingInvalid,
)
from tests.support import postgres

GREETED = sa.Table("greeted_by_test", sa.MetaData(), sa.Column("email", sa.Text))


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """An application's own synchronous engine, migrated, with a table of its own."""
    if request.param == "sqlite":
        made = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    else:
        made = postgres.sync_engine()
    schema = None if request.param == "sqlite" else postgres.emptied_schema()
    made.update_execution_options(schema=schema)
    asyncio.run(LogtoWebhooks(signing_key="x", engine=made, schema=schema).migrate())
    with made.begin() as connection:
        GREETED.create(connection, checkfirst=True)
        connection.execute(sa.delete(GREETED))
    yield made
    made.dispose()


def logto_of(engine: sa.Engine) -> LogtoWebhooks:
    """With a handler that writes, one that doesn't wait for the database, and one that gives up."""
    schema = engine.get_execution_options()["schema"]
    logto = LogtoWebhooks(signing_key="another", engine=engine, schema=schema)

    @logto.on(events.LocalUserCreated, name="greet")
    def greet(event: events.LocalUserCreated, session: Session) -> None:
        session.execute(sa.insert(GREETED).values(email=event.user.email))

    @logto.on(events.PostRegister, name="mail")
    async def mail(delivery: Delivery, user: UserRow | None) -> None:
        await asyncio.sleep(0)

    @logto.on("User.Deleted", name="gives up")
    def gives_up() -> None:
        raise Discard("nothing to do")

    return logto


def greeted(connection: sa.Connection) -> list[str]:
    return list(connection.scalars(sa.select(GREETED.c.email)))


def test_handlers_run_on_the_tests_connection(engine: sa.Engine) -> None:
    """It says which ran; what they wrote is seen on the connection, and gone with its rollback."""
    with engine.connect() as connection:
        app = testing.app(logto_of(engine), connection)
        signed_up = testing.make.sign_up(id="ana", email="ana@example.com", organizations=["acme"])
        delivered = app.deliver(signed_up)
        assert (delivered.status, delivered.outcome) == (200, "applied")
        assert sorted(each.handler for each in app.jobs()) == ["greet", "mail"]
        assert greeted(connection) == ["ana@example.com"]
        [ana] = app.users("ana@example.com")
        assert ana.memberships == ["acme"]
        assert app.deliver(signed_up).outcome == "duplicate"
        assert app.deliver(testing.make.user_deleted(id="ana")).runs[0].state == "discarded"
        assert app.status().jobs == {"waiting": 0, "done": 2, "dead": 0, "discarded": 1}
        connection.rollback()
        assert greeted(connection) == []
    with engine.connect() as connection:
        app = testing.app(logto_of(engine), connection)
        assert (app.users(), app.jobs(), app.status().deliveries["done"]) == ([], [], 0)


def test_a_mapping_waits_for_no_transaction(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Not for the test's own, which stays open: only the test sees its mappings."""
    monkeypatch.setattr(runner, "OPEN_S", 1.0)
    logto = logto_of(engine)
    mapped = sa.Table(
        "mapped_by_test",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text, unique=True),
        sa.Column("email", sa.Text),
    )
    columns = {"email": lambda user: user.email.upper()}
    logto.map_users(mapped, key="logto_id", columns=columns, when_deleted="delete")
    with engine.connect() as connection:
        mapped.create(connection)
        app = testing.app(logto, connection)
        app.deliver(testing.make.user_created(id="ana", email="ana@example.com"))
        assert connection.scalars(sa.select(mapped.c.email)).all() == ["ANA@EXAMPLE.COM"]
        assert "left out" not in caplog.text
        connection.rollback()


def test_changes_have_the_types_of_the_row(tmp_path: Path) -> None:
    """Times, too, although the event of a job is stored as JSON."""
    logto = LogtoWebhooks(signing_key="x", database_url=f"sqlite:///{tmp_path / 'a.db'}")
    changes: list[tuple[Any, Any]] = []

    @logto.on(events.LocalUserUpdated)
    def note(event: events.LocalUserUpdated) -> None:
        old, new = event.changes["last_sign_in_at"]
        assert new == event.user.last_sign_in_at
        changes.append((old, new))

    app = testing.app(logto)
    at = 1_795_485_335_917
    for signed_in in (None, at + 1_000, at + 2_000):
        app.deliver(testing.make.user_data_updated(id="ana", at=at, lastSignInAt=signed_in))
        at += 10_000
    first, second = changes
    assert first[0] is None
    assert second[0] == first[1]
    assert second[1] - second[0] == timedelta(seconds=1)


def test_a_handler_that_fails_is_tried_again_when_time_passes(engine: sa.Engine) -> None:
    """Made to fail, it waits; the next retry is a tick away; what it wrote is there once."""
    with engine.connect() as connection:
        app = testing.app(logto_of(engine), connection)
        app.fail("greet", ConnectionError("gone"), times=2)
        delivered = app.deliver(testing.make.user_created(email="bo@example.com"))
        [run] = delivered.runs
        assert (run.handler, run.state, str(run.error)) == ("greet", "waiting", "gone")
        assert (delivered.ran, greeted(connection), app.work()) == ([], [], [])
        assert [each.state for each in app.tick()] == ["waiting"]
        assert app.tick(0.5) == []
        assert [each.state for each in app.tick()] == ["done"]
        assert greeted(connection) == ["bo@example.com"]
        [job] = app.jobs()
        assert (job.state, job.failures, job.attempts) == ("done", 2, 3)


def test_what_a_handler_raises_fails_the_test(engine: sa.Engine) -> None:
    """As the bug that it is, unless the test wants to look at it; its writes are gone."""
    logto = logto_of(engine)

    @logto.on(events.LocalUserCreated, name="buggy")
    def buggy(connection: sa.Connection) -> None:
        connection.execute(sa.insert(GREETED).values(email="half"))
        raise ZeroDivisionError

    with engine.connect() as connection:
        with pytest.raises(ZeroDivisionError):
            testing.app(logto, connection).deliver(testing.make.user_created(email="e"))
        assert greeted(connection) == ["e"]
        quiet = testing.app(logto, connection, raise_errors=False)
        runs = {each.handler: each for each in quiet.deliver(testing.make.user_created()).runs}
        assert isinstance(runs["buggy"].error, ZeroDivisionError)
        assert runs["buggy"].state == "waiting"


def test_a_handler_that_commits_by_itself_is_told(engine: sa.Engine) -> None:
    """The test's own transaction is rolled back, too: the error says what not to do."""
    logto = logto_of(engine)

    @logto.on(events.OrganizationCreated, name="commits")
    def commits(connection: sa.Connection) -> None:
        connection.execute(sa.insert(GREETED).values(email="committed"))
        connection.commit()

    @logto.on(events.OrganizationDeleted, name="commits its session")
    def commits_its_session(session: Session) -> None:
        session.execute(sa.insert(GREETED).values(email="kept"))
        session.commit()
        session.rollback()

    with engine.connect() as connection:
        app = testing.app(logto, connection)
        assert app.deliver(testing.make.organization_deleted()).ran == ["commits its session"]
        assert greeted(connection) == ["kept"]
        connection.rollback()
        assert greeted(connection) == []
        with pytest.raises(Exception, match="committed or rolled back"):
            app.deliver(testing.make.organization_created())
        assert greeted(connection) == []


@pytest.mark.postgres
def test_all_is_awaited_on_an_async_connection() -> None:
    """Async handlers get a session on the test's connection; sync ones, too."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url)
    logto = LogtoWebhooks(signing_key="another", engine=engine, schema=schema)

    @logto.on(events.LocalUserCreated)
    async def greet(event: events.LocalUserCreated, session: AsyncSession) -> None:
        await session.execute(sa.insert(GREETED).values(email=event.user.email))

    @logto.on(events.OrganizationCreated)
    async def commits(connection: AsyncConnection) -> None:
        await connection.execute(sa.insert(GREETED).values(email="committed"))
        await connection.commit()

    @logto.on(events.LocalUserCreated, name="sync")
    def sync(event: events.LocalUserCreated, session: Session) -> None:
        session.execute(sa.insert(GREETED).values(email="sync"))

    async def run() -> None:
        await logto.migrate()
        async with engine.connect() as connection:
            await connection.run_sync(lambda sync: GREETED.create(sync, checkfirst=True))
            await connection.commit()
            before = await connection.run_sync(greeted)
            app = testing.app(logto, connection)
            app.fail(greet)
            delivered = await app.deliver(testing.make.user_created(email="ana@example.com"))
            assert delivered.ran == ["sync"]
            assert [each.state for each in await app.tick()] == ["done"]
            assert await connection.run_sync(greeted) == [*before, "sync", "ana@example.com"]
            assert len(await app.users("ana@example.com")) == 1
            await connection.rollback()
            assert await app.users() == []
            with pytest.raises(Exception, match="committed or rolled back"):
                await app.deliver(testing.make.organization_created())
            assert "committed" not in await connection.run_sync(greeted)
        await engine.dispose()

    asyncio.run(run())


def test_a_plain_handler_may_call_what_is_awaited(engine: sa.Engine) -> None:
    """As it does beside a server's event loop, in its own transaction; in an asynchronous test,
    too."""
    logto = logto_of(engine)

    @logto.on("User.Created", name="ensures")
    def ensures(session: Session) -> None:
        logto.call(logto.ensure_user({"sub": "eve"}, session=session))

    @logto.on("User.Created", name="reads")
    def reads() -> None:
        logto.call(logto.status())

    def deliver() -> None:
        with engine.connect() as connection:
            app = testing.app(logto, connection)
            ran = app.deliver(testing.make.user_created(id="ana")).ran
            assert {"ensures", "reads"} <= set(ran)
            assert {each.row["logto_user_id"] for each in app.users()} == {"ana", "eve"}
            connection.rollback()

    async def awaited() -> None:
        deliver()
        assert asyncio.get_running_loop().is_running()

    deliver()
    asyncio.run(awaited())


def test_without_a_connection_it_is_in_memory(tmp_path: Path) -> None:
    """It needs no database of the test's own; handlers have transactions all the same."""
    logto = LogtoWebhooks(signing_key="x", database_url=f"sqlite:///{tmp_path / 'never.db'}")
    told: list[str | None] = []

    @logto.on(events.LocalUserCreated, name="tell")
    async def tell(event: events.LocalUserCreated) -> None:
        await asyncio.sleep(0)
        told.append(event.user.email)

    @logto.on(events.LocalUserDeleted, name="late", max_age=60)
    def late() -> None: ...

    app = testing.app(logto)
    app.fail(tell)
    assert app.deliver(testing.make.user_created(id="ana", email="e")).ran == []
    assert [each.state for each in app.tick()] == ["done"]
    assert told == ["e"]
    app.fail("late")
    assert app.deliver(testing.make.user_deleted(id="ana")).runs[0].state == "waiting"
    assert [each.state for each in app.tick(3600)] == ["discarded"]
    assert app.deliver(testing.make.user_created(key="a key of somebody else")).status == 401
    assert not (tmp_path / "never.db").exists()

    @logto.on(events.OrganizationCreated, name="writes")
    def writes(session: Session) -> None:
        session.execute(sa.insert(GREETED).values(email="acme"))

    other = testing.app(logto)
    GREETED.create(other.connection)
    other.fail("writes")
    assert other.deliver(testing.make.organization_created()).ran == []
    assert greeted(other.connection) == []
    assert [each.state for each in other.tick()] == ["done"]
    assert greeted(other.connection) == ["acme"]
    assert other.users() == []


def test_what_a_handler_returns_unrun_is_told(engine: sa.Engine) -> None:
    """As in production, with a transaction or without: such a call isn't counted as done."""
    logto = logto_of(engine)

    async def later() -> None: ...

    @logto.on(events.OrganizationCreated, name="returns")
    def returns() -> object:
        return later()

    @logto.on(events.OrganizationDeleted, name="returns, with a session")
    def returns_with_a_session(session: Session) -> object:
        return later()

    @logto.on(events.RoleCreated, name="awaits")
    async def awaits() -> None:
        await asyncio.sleep(0)

    with engine.connect() as connection:
        app = testing.app(logto, connection)
        assert app.deliver(testing.make.role_created()).ran == ["awaits"]
        for made in (testing.make.organization_created(), testing.make.organization_deleted()):
            with pytest.raises(HandlerNotAwaited, match="async def"):
                app.deliver(made)


@pytest.mark.parametrize("is_awaited", [False, True])
def test_an_error_comes_without_others(engine: sa.Engine, is_awaited: bool) -> None:
    """Its traceback shows what the test is about, with an event loop or without."""
    logto = logto_of(engine)

    @logto.on(events.RoleCreated, name="fails")
    def fails() -> None:
        raise KeyError("of the handler")

    def deliver(app: testing.App) -> None:
        with pytest.raises(KeyError, match="of the handler") as raised:
            app.deliver(testing.make.role_created())
        assert (raised.value.__context__, raised.value.__cause__) == (None, None)
        with pytest.raises(SettingInvalid, match="pass seconds") as refused:
            app.tick(-1)
        assert (refused.value.__context__, refused.value.__cause__) == (None, None)

    async def deliver_in_loop(app: testing.App) -> None:
        deliver(app)

    with engine.connect() as connection:
        app = testing.app(logto, connection)
        if is_awaited:
            asyncio.run(deliver_in_loop(app))
        else:
            deliver(app)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    """A database without our schema, a connection that is none, a handler that isn't there."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    logto = LogtoWebhooks(signing_key="x", engine=engine)
    with engine.connect() as connection:
        with pytest.raises(SchemaMismatch, match=r"none of the tables.* migrate"):
            testing.app(logto, connection).deliver(testing.make.user_created())
        with pytest.raises(HandlerUnknown, match=r"'nobody'\. No handlers are registered\."):
            testing.app(logto, connection).fail("nobody")
    with pytest.raises(SettingInvalid, match="not Engine"):
        testing.app(logto, engine)  # type: ignore[call-overload]
    engine.dispose()


pytest_plugins = ["pytester"]


@pytest.mark.process
def test_the_fixture_is_imported_beside_ones_own(pytester: pytest.Pytester) -> None:
    """In memory by default; on the connection of a fixture of the user's, rolled back by it."""
    pytester.makeconftest(
        """
import pytest, sqlalchemy as sa
from sqlalchemy.orm import Session
from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.testing.pytest_plugin import logto_app, logto_connection

engine = sa.create_engine("sqlite:///app.db")
mounted = LogtoWebhooks(signing_key="x", engine=engine)

@mounted.on(events.LocalUserCreated, name="tell")
def tell(event): ...

@pytest.fixture
def logto():
    return mounted
"""
    )
    pytester.makepyfile(
        """
import pytest
from conftest import engine, mounted
from logto_webhooks import testing

def test_in_memory(logto_app):
    assert logto_app.deliver(testing.make.sign_up(id="ana")).ran == ["tell"]

class TestOnAConnection:
    @pytest.fixture
    def logto_connection(self):
        mounted.call(mounted.migrate())
        with engine.connect() as connection:
            yield connection
            connection.rollback()

    @pytest.mark.parametrize("again", range(2))
    def test_on_a_connection(self, logto_app, again):
        assert logto_app.users() == []
        assert logto_app.deliver(testing.make.sign_up(id="ana")).ran == ["tell"]
"""
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=3)
