"""Being early: a user of a token whom no webhook told of yet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from sqlite3 import Connection, OperationalError, connect
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from logto_webhooks import LogtoWebhooks, UserIsDeletedError, events
from logto_webhooks.apply import batch
from logto_webhooks.ensure_user import UserLookup
from logto_webhooks.errors import (
    ClaimsUnusable,
    SettingInvalid,
    StartedElsewhere,
    StoreUnavailable,
)
from logto_webhooks.records.record import Key, Tombstone
from logto_webhooks.samples.request import sign_request
from logto_webhooks.testing import SIGNING_KEY, make
from logto_webhooks.testing.fake import FakeLogto
from tests.support.healthy_system import answering
from tests.support.mounted import live, on_postgres, on_sqlite, send, soon
from tests.support.postgres import emptied_schema, server_url
from tests.support.stores import WrappedRunner, memory_host
from tests.support.waiting import eventually

CLAIMS = {"sub": "ana", "email": "ana@example.com", "name": "Ana", "iat": 5}


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_user_is_there_at_once_and_logto_wins(kind: str, tmp_path: Path) -> None:
    """Made once; the webhook that comes later, although older, tells what is so."""
    logto = on_sqlite(tmp_path) if kind == "sqlite" else on_postgres()
    told: list[str] = []

    @logto.on(events.LocalUserCreated)
    def created(event: events.LocalUserCreated) -> None:
        told.append(event.source)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        first = await logto.ensure_user(CLAIMS)
        assert (first.email, first.name) == ("ana@example.com", "Ana")
        assert (await logto.ensure_user({"sub": "ana"})).id == first.id
        await send(client, make.user_created(id="ana", email="ana@work.example", at=1_000_000))
        row = await eventually(
            lambda: logto.wait_for_user("ana"),
            lambda row: row.email == "ana@work.example" and bool(told),
        )
        assert row.id == first.id
        assert told == ["ensure_user"]
        threaded = await asyncio.to_thread(lambda: logto.call(logto.ensure_user(CLAIMS)))
        assert threaded == row

    live(logto, body)


def test_claims_do_not_complete_what_logto_sent_in_part(tmp_path: Path) -> None:
    """The row is there for the request, and the record still waits for a refetch."""
    logto = on_sqlite(tmp_path)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        part = {
            "event": "User.Data.Updated",
            "createdAt": "1970-01-01T00:16:40.000Z",
            "path": "/users/ana/custom-data",
            "method": "PATCH",
            "status": 200,
            "params": {"userId": "ana"},
            "matchedRoute": "/users/:userId/custom-data",
            "data": {"plan": "pro"},
        }
        await send(client, sign_request(part, SIGNING_KEY))
        await eventually(logto.status, lambda status: status.refetch == 1)
        row = await logto.ensure_user({"sub": "ana", "name": "Ana"})
        assert (row.name, row.custom_data["plan"]) == ("Ana", "pro")
        [user] = await logto.users("ana")
        assert (user.waiting_for, (await logto.status()).refetch) == ("incomplete", 1)
        await send(client, make.user_created(id="ana", email="ana@x.example", at=900_000))
        await eventually(logto.status, lambda status: status.refetch == 0)
        [user] = await logto.users("ana")
        assert (user.waiting_for, user.row["email"]) == (None, "ana@x.example")
        await logto.ensure_user({"sub": "bo"})
        assert (await logto.status()).refetch == 0, "a webhook will come"

    live(logto, body)


@pytest.mark.parametrize("in_session", [False, True])
def test_claims_that_have_more_complete_the_user(in_session: bool, tmp_path: Path) -> None:
    """Until Logto tells of the user: an access token has only an ID. Nothing is in doubt, and what
    was claimed first stays."""
    logto = on_sqlite(tmp_path)
    changed: list[tuple[str, ...]] = []

    @logto.on(events.LocalUserUpdated)
    def updated(event: events.LocalUserUpdated) -> None:
        changed.append(tuple(sorted(event.changes)))

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        engine = logto._engine
        assert isinstance(engine, sa.Engine)

        async def ensure(**claims: str) -> tuple[str | None, str | None, str | None]:
            if in_session:
                with Session(engine) as session:
                    row = await logto.ensure_user({"sub": "ana"} | claims, session=session)
                    session.commit()
            else:
                row = await logto.ensure_user({"sub": "ana"} | claims)
            return row.email, row.name, row.phone

        assert await ensure() == (None, None, None)
        assert await ensure(email="a@x.example") == ("a@x.example", None, None)
        assert await ensure(name="Ana") == ("a@x.example", "Ana", None)
        both = ("a@x.example", "Ana", None)
        assert await ensure(email="other@x.example", name="Other") == both
        assert await ensure() == both
        status = await logto.status()
        assert (status.doubtful, status.refetch) == (0, 0)
        await send(client, make.user_created(id="ana", email=None, name=None, at=1_000_000))
        await eventually(lambda: logto.wait_for_user("ana"), lambda row: row.email is None)
        assert await ensure(phone_number="123") == (None, None, None)
        await eventually(lambda: asyncio.sleep(0, len(changed)), lambda count: count >= 2)

    live(logto, body)
    assert changed[:2] == [("email",), ("name",)]


def test_claims_that_have_more_complete_the_user_at_the_same_time(tmp_path: Path) -> None:
    """A browser's first two requests come at once, one with an access token."""
    logto = on_sqlite(tmp_path)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        less, more = {"sub": "ana"}, {"sub": "ana", "email": "a@x.example"}
        rows = await asyncio.gather(*(logto.ensure_user(each) for each in (less, more, less)))
        assert rows[1].email == "a@x.example"

    live(logto, body)


@pytest.mark.postgres
def test_within_an_async_session(tmp_path: Path) -> None:
    """It is there with what the application writes, or not at all."""
    logto = on_postgres()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        engine = create_async_engine(server_url().set(drivername="postgresql+asyncpg"))
        async with AsyncSession(engine) as session:
            await logto.ensure_user(CLAIMS, session=session)
            await session.rollback()
            with pytest.raises(TimeoutError):
                await logto.wait_for_user("ana", 0.2)
            made = await logto.ensure_user(CLAIMS, session=session)
            await session.commit()
        assert await logto.wait_for_user("ana", 1) == made
        with pytest.raises(SettingInvalid, match="AsyncSession"):
            await logto.ensure_user(CLAIMS, session=Session())
        await engine.dispose()

    live(logto, body)


def test_within_a_session_of_aiosqlite(tmp_path: Path) -> None:
    """As FastAPI's tutorials use it: after the request has written, and without doing so."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        async with AsyncSession(engine) as session:
            await session.execute(sa.text("CREATE TABLE notes (text TEXT)"))
            await session.execute(sa.text("INSERT INTO notes VALUES ('a')"))
            async with asyncio.timeout(2):
                made = await logto.ensure_user(CLAIMS, session=session)
            await session.commit()
        assert await logto.wait_for_user("ana", 1) == made
        async with AsyncSession(engine) as session:
            await logto.ensure_user({"sub": "bo"}, session=session)
            await session.rollback()
        with pytest.raises(TimeoutError):
            await logto.wait_for_user("bo", 0)

    live(logto, body)


def test_within_a_session_on_sqlite(tmp_path: Path) -> None:
    """The application's own, on the same file."""
    logto = on_sqlite(tmp_path)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
        with Session(engine) as session:
            made = await logto.ensure_user(CLAIMS, session=session)
            session.commit()
        assert await logto.wait_for_user("ana", 1) == made
        engine.dispose()

    live(logto, body)


def test_a_deleted_user_stays_deleted(tmp_path: Path) -> None:
    """The token outlived the user."""
    logto = on_sqlite(tmp_path)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        drop = Tombstone(Key("user", "ana"), soon())
        await logto.database.host.run(lambda store: batch.apply_reads(store, [drop], None))
        with pytest.raises(UserIsDeletedError):
            await logto.ensure_user(CLAIMS)
        with pytest.raises(UserIsDeletedError):
            await logto.wait_for_user("ana", 1)

    live(logto, body)


NAMELESS: list[Any] = [{}, None, "ana", ["sub"], {5: "ana"}]
SUBS: list[Any] = [5, None, "", "a:b", "a\0b", "\ud800", "x" * 257, ["ana"]]
OF_AN_APPLICATION = {"sub": "m2m", "client_id": "m2m"}
ODD = [
    *NAMELESS,
    *({"sub": sub} for sub in SUBS),
    {"sub": "ana", "name": "\udfff"},
    OF_AN_APPLICATION,
]


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_claims_that_no_user_can_have_are_refused(kind: str, tmp_path: Path) -> None:
    """Before the database would refuse them."""
    logto = on_sqlite(tmp_path) if kind == "sqlite" else on_postgres()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        for claims in ODD:
            with pytest.raises(ClaimsUnusable):
                await logto.ensure_user(claims)
        for sub in SUBS:
            with pytest.raises(ClaimsUnusable):
                await logto.wait_for_user(sub, 0)
        row = await logto.ensure_user({"sub": "ana", "name": "A\0na"})
        assert row.logto_user_id == "ana"

    live(logto, body)


def test_who_does_not_wait_looks_once(tmp_path: Path) -> None:
    """A user who is known is found in no time."""
    logto = on_sqlite(tmp_path)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        made = await logto.ensure_user(CLAIMS)
        for timeout_s in (0, -1, float("nan")):
            assert await logto.wait_for_user("ana", timeout_s) == made
            with pytest.raises(TimeoutError):
                await logto.wait_for_user("bo", timeout_s)

    live(logto, body)


@pytest.mark.slow
def test_logto_is_asked_for_what_claims_lack(tmp_path: Path) -> None:
    """If there are credentials; a Logto that can't be asked costs nothing."""

    async def run() -> None:
        async with FakeLogto() as fake:
            ana = fake.create_user(primaryEmail="ana@example.com", username="ana")
            for endpoint, username in ((fake.url, "ana"), ("http://127.0.0.1:9", None)):
                logto = LogtoWebhooks(
                    signing_key=SIGNING_KEY,
                    database_url=f"sqlite:///{tmp_path / (username or 'other')}.db",
                    endpoint=endpoint,
                    app_id=fake.app_id,
                    app_secret=fake.app_secret,
                    reconcile_every_s=0,
                )
                async with logto.lifespan():
                    row = await logto.ensure_user({"sub": ana["id"]})
                    assert row.username == username

    asyncio.run(run())


def test_a_logto_that_does_not_answer_holds_up_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claims are enough for a row; the webhook or a refetch brings the rest."""
    monkeypatch.setattr("logto_webhooks.ensure_user.ASK_S", 0.2)

    async def run() -> None:
        async with answering(200, after_s=600) as url:
            logto = LogtoWebhooks(
                signing_key=SIGNING_KEY,
                database_url=f"sqlite:///{tmp_path / 'app.db'}",
                endpoint=url.rpartition("/api/")[0],
                app_id="id",
                app_secret="secret",
                reconcile_every_s=0,
            )
            async with logto.lifespan(), asyncio.timeout(20):
                assert (await logto.ensure_user(CLAIMS)).email == CLAIMS["email"]

    asyncio.run(run())


@pytest.mark.postgres
def test_however_many_ask_the_pool_is_left_to_others() -> None:
    """They read with one of the package's own connections, and write with two."""

    async def run() -> None:
        schema = emptied_schema()
        named = {"server_settings": {"application_name": schema}}
        url = server_url().set(drivername="postgresql+asyncpg")
        engine = create_async_engine(url, connect_args=named)
        logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
        await logto.migrate()
        await logto.ensure_user({"sub": "first"})
        taken: list[object] = []
        sa.event.listen(engine.sync_engine, "checkout", lambda *_: taken.append(_))
        ids = [f"user{number}" for number in range(200)]
        waiting = [asyncio.create_task(logto.wait_for_user(id_, 30)) for id_ in ids]
        looked = [asyncio.create_task(logto.wait_for_user(id_, 0)) for id_ in ids]
        for each in await asyncio.gather(*looked, return_exceptions=True):
            assert isinstance(each, TimeoutError)
        made = await asyncio.gather(*(logto.ensure_user({"sub": id_}) for id_ in ids))
        assert await asyncio.gather(*waiting) == made
        assert await asyncio.gather(*(logto.ensure_user({"sub": id_}) for id_ in ids)) == made
        assert not taken
        count = sa.text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")
        async with engine.connect() as connection:
            opened = await connection.scalar(count, {"name": schema})
        assert opened <= 1 + 3  # the application's, and ours
        await logto.close()
        await engine.dispose()

    asyncio.run(run())


@pytest.mark.postgres
@pytest.mark.parametrize("engine_of", [create_async_engine, sa.create_engine])
def test_a_locked_user_takes_one_turn(engine_of: Callable[[sa.URL], Any]) -> None:
    """An application holds one user in a transaction: however many requests of that user wait,
    others are created meanwhile."""

    async def run() -> None:
        schema = emptied_schema()
        driver = "asyncpg" if engine_of is create_async_engine else "psycopg"
        engine = engine_of(server_url().set(drivername=f"postgresql+{driver}"))
        logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
        await logto.migrate()
        application = create_async_engine(server_url().set(drivername="postgresql+asyncpg"))
        async with application.connect() as connection:
            stub = sa.text(
                f"INSERT INTO {schema}.logto_records"
                " (kind, logto_id, local_id, data, groups, facts, needs, doubtful)"
                " VALUES ('user', 'ana', gen_random_uuid(), '{}', '{}', '{}', '{}', false)"
            )
            await connection.execute(stub)  # as within its session; not committed yet
            ana = [asyncio.create_task(logto.ensure_user({"sub": "ana"})) for _ in range(12)]
            bo = await logto.ensure_user({"sub": "bo"})
            assert bo.logto_user_id == "bo"
            errors = await asyncio.gather(*ana, return_exceptions=True)
            assert len({id(error) for error in errors}) == 1
            assert isinstance(errors[0], StoreUnavailable)
            await connection.rollback()
        assert (await logto.ensure_user({"sub": "ana"})).logto_user_id == "ana"
        await logto.close()
        await application.dispose()
        await engine.dispose() if engine_of is create_async_engine else engine.dispose()

    asyncio.run(run())


async def begin(connection: Connection) -> None:
    """Begin to write. The worker may be writing something at this moment, too."""
    give_up_at = time.monotonic() + 10
    while True:
        try:
            connection.execute("BEGIN IMMEDIATE")
            return
        except OperationalError:
            if time.monotonic() > give_up_at:
                raise
            await asyncio.sleep(0.01)


def test_nothing_changes_between_what_it_reads_and_writes_on_sqlite(tmp_path: Path) -> None:
    """Python's driver begins no transaction before the first write. A user who is here needs
    none."""
    logto = on_sqlite(tmp_path)

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
        await logto.ensure_user(CLAIMS)
        with Session(engine) as session, closing(connect(tmp_path / "app.db", timeout=0)) as other:
            await logto.ensure_user(CLAIMS, session=session)
            await begin(other)
            other.rollback()
            await logto.ensure_user({"sub": "bo"}, session=session)
            with pytest.raises(OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            session.rollback()
            await begin(other)
        engine.dispose()

    live(logto, body)


@pytest.mark.postgres
def test_requests_of_one_user_lock_nothing() -> None:
    """They can keep their transactions open for long, also beside a delivery of that user."""
    logto = on_postgres()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await logto.ensure_user(CLAIMS)
        engine = create_async_engine(server_url().set(drivername="postgresql+asyncpg"))
        async with AsyncSession(engine) as one, AsyncSession(engine) as other:
            async with asyncio.timeout(20):
                await logto.ensure_user(CLAIMS, session=one)
                await logto.ensure_user(CLAIMS, session=other)
                await send(client, make.user_created(id="ana", username="ana", at=soon()))
                await eventually(
                    lambda: logto.wait_for_user("ana"), lambda row: row.username == "ana"
                )
        await engine.dispose()

    live(logto, body)


@pytest.mark.postgres
def test_a_session_without_a_transaction_is_refused() -> None:
    """In autocommit mode, a lock ends with its statement."""
    logto = on_postgres()

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        for driver in ("asyncpg", "psycopg"):
            url = server_url().set(drivername=f"postgresql+{driver}")
            engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
            async with AsyncSession(engine) as session:
                with pytest.raises(SettingInvalid, match="autocommit"):
                    await logto.ensure_user(CLAIMS, session=session)
            await engine.dispose()

    live(logto, body)


@pytest.mark.postgres
def test_another_event_loop_is_refused() -> None:
    """Connections of an asynchronous engine can't be used there; `call` is for threads."""
    logto = on_postgres()

    def on_another_loop() -> None:
        for wanted in (logto.ensure_user(CLAIMS), logto.wait_for_user("ana")):
            with pytest.raises(StartedElsewhere, match="call"):
                asyncio.run(wanted)
        assert logto.call(logto.ensure_user(CLAIMS)).logto_user_id == "ana"

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await asyncio.to_thread(on_another_loop)

    live(logto, body)


def test_a_silent_database_ends_no_later_than_the_timeout() -> None:
    """Also while it looks for the first time."""

    class Silent(WrappedRunner):
        async def read(self, work: Any) -> Any:
            await asyncio.Event().wait()

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(UserLookup(Silent(memory_host())).wait("ana", 0.1), 30)

    asyncio.run(run())
