"""Applications whose transactions on PostgreSQL keep their first snapshot. What is written there
would not see what others committed while it waited for their locks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    create_async_engine,
)
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, UserRow, events
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, live, send, soon, until
from tests.support.waiting import eventually

pytestmark = pytest.mark.postgres

LEVELS: Final[Any] = ("REPEATABLE READ", "SERIALIZABLE")
ENGINES: Final = ("asyncpg", "psycopg awaited", "psycopg")
CLAIMS: Final = {"sub": "ana", "name": "Ana"}
BEGINS: Final = sa.text("SELECT count(*) FROM pg_class")  # takes the snapshot


def make_engine(kind: str, level: Any) -> sa.Engine | AsyncEngine:
    """An application's, whose sessions have that level unless they ask for another."""
    driver, _, awaited = kind.partition(" ")
    url = postgres.server_url().set(drivername=f"postgresql+{driver}")
    if awaited or driver == "asyncpg":
        return create_async_engine(url, isolation_level=level)
    return sa.create_engine(url, isolation_level=level)


def mount(engine: sa.Engine | AsyncEngine) -> LogtoWebhooks:
    schema = postgres.emptied_schema()
    return LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)


@contextlib.asynccontextmanager
async def begin(
    engine: sa.Engine | AsyncEngine, *statements: sa.TextClause, connects: bool = False
) -> AsyncIterator[Any]:
    """A session of the engine, or else a connection, that has run the statements. It commits,
    whatever happens."""
    if isinstance(engine, AsyncEngine):
        session: Any = AsyncConnection(engine) if connects else AsyncSession(engine)
        if connects:
            await session.start()
    else:
        session = engine.connect() if connects else Session(engine)
    for statement in statements:
        await settle(session.execute(statement))
    try:
        yield session
    finally:
        await settle(session.execute(BEGINS))  # it can be used
        await settle(session.commit())
        await settle(session.close())


async def settle(result: Any) -> None:
    if inspect.isawaitable(result):
        await result


@pytest.mark.parametrize("connects", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ENGINES)
def test_nothing_is_written_with_an_old_snapshot(kind: str, level: str, connects: bool) -> None:
    """It says what to do, and that works. A user who is here is only read."""
    engine = make_engine(kind, level)
    other = engine.execution_options(isolation_level="READ COMMITTED")
    set_level = sa.text(f"SET TRANSACTION ISOLATION LEVEL {level}")

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        async def ensure(engine: Any, *statements: sa.TextClause) -> UserRow:
            async with begin(engine, *statements, connects=connects) as session:
                return await logto.ensure_user(CLAIMS, session=session)

        refused = f"is at {level}, .*READ COMMITTED"
        for used, statements in ((engine, ()), (engine, (BEGINS,)), (other, (set_level,))):
            with pytest.raises(SettingInvalid, match=refused) as raised:
                await ensure(used, *statements)
            assert len(str(raised.value).splitlines()) == 1
        with pytest.raises(TimeoutError):
            await logto.wait_for_user("ana", 0)
        made = await ensure(other, BEGINS)
        assert await logto.wait_for_user("ana", 0) == made
        assert await ensure(engine) == made
        assert (await logto.ensure_user({"sub": "bo"})).logto_user_id == "bo"

    live(mount(engine), body)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ENGINES)
def test_a_handler_writes_in_its_session(kind: str, level: str) -> None:
    """Its transaction is at READ COMMITTED, whatever the engine's level."""
    engine = make_engine(kind, level)
    logto = mount(engine)

    async def awaited(event: events.UserCreated, session: AsyncSession) -> None:
        await logto.ensure_user(CLAIMS, session=session)

    def plain(event: events.UserCreated, session: Session) -> None:
        logto.call(logto.ensure_user(CLAIMS, session=session))

    logto.on("User.Created", max_attempts=1)(awaited if kind != "psycopg" else plain)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="bo", at=soon()))
        [job] = await until(all_over(1), logto)
        assert (job.state, job.error) == ("done", None)
        assert (await logto.wait_for_user("ana", 0)).name == "Ana"

    live(logto, body)


@pytest.mark.parametrize("level", ["READ COMMITTED", *LEVELS])
@pytest.mark.parametrize("kind", ENGINES)
def test_a_member_whose_organization_comes_meanwhile_is_told_of(kind: str, level: str) -> None:
    """The request began before the organization was created. Once, whether the user is created in
    its transaction or, after that is refused, in one of the package's own."""
    engine = make_engine(kind, level)
    logto = mount(engine)
    told: list[str] = []

    @logto.on(events.LocalMemberAdded)
    async def added(event: events.LocalMemberAdded) -> None:
        told.append(event.user_id)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        joined = make.organization_membership_updated(id="acme", addedUserIds=["ana"], at=soon())
        await send(client, joined)
        await eventually(logto.status, lambda status: status.deliveries["done"] == 1)
        async with begin(engine, BEGINS) as session:
            await send(client, make.organization_created(id="acme", at=soon()))
            await eventually(logto.status, lambda status: status.deliveries["done"] == 2)
            try:
                await logto.ensure_user(CLAIMS, session=session)
            except SettingInvalid:
                assert level in LEVELS
                await logto.ensure_user(CLAIMS)
        await until(all_over(1), logto)
        await send(client, make.user_created(id="ana", at=soon()))
        await eventually(logto.status, lambda status: status.deliveries["done"] == 3)
        await until(all_over(1), logto)
        assert told == ["ana"]

    live(logto, body)
