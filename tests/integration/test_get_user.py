"""A request gets the application's own object, whatever arrived before."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fastapi
import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from logto_webhooks import LogtoWebhooks, UserHasNoRow, UserIsDeletedError, UserNotReady, events
from logto_webhooks.apply import batch
from logto_webhooks.errors import ClaimsUnusable, SettingInvalid
from logto_webhooks.fastapi import exception_handlers as fastapi_handlers
from logto_webhooks.records.record import ApiRead, Key, Tombstone
from logto_webhooks.starlette import exception_handlers as starlette_handlers
from logto_webhooks.testing import make
from logto_webhooks.testing.fake import FakeLogto
from tests.support.mounted import all_over, live, send, soon, until
from tests.support.own_tables import KINDS, Application, EngineKind, Note, Team, User
from tests.support.waiting import eventually

CLAIMS = {"sub": "ana", "email": "ana@example.com", "name": "Ana", "iat": 5}
Seen = tuple[int, str | None, str]


async def get(app: Application, claims: Mapping[str, Any], ends: str = "commit") -> Seen:
    """Get a user in a session of the application's engine, and end its transaction."""
    if isinstance(app.engine, AsyncEngine):
        async with AsyncSession(app.engine) as session:
            user = await app.logto.get_user(User, claims, session=session)
            seen = (user.id, user.logto_id, user.email)
            await getattr(session, ends)()
            return seen
    return await asyncio.to_thread(get_in_thread, app, app.engine, claims, ends)


def get_in_thread(
    app: Application, engine: sa.Engine, claims: Mapping[str, Any], ends: str
) -> Seen:
    with Session(engine) as session:
        user = app.logto.call(app.logto.get_user(User, claims, session=session))
        assert user in session
        seen = (user.id, user.logto_id, user.email)
        getattr(session, ends)()
        return seen


async def until_applied(logto: LogtoWebhooks) -> None:
    """Wait until all records have been compared with the rows that could be linked."""
    await eventually(logto.mapping_counts, lambda counts: all(each.is_applied for each in counts))


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_the_row_is_there_at_once(kind: EngineKind, tmp_path: Path) -> None:
    """With the user, in the session's transaction; then the webhook tells what is so."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users()
        told: list[str] = []

        @app.logto.on(events.LocalUserCreated)
        def created(event: events.LocalUserCreated) -> None:
            told.append(event.source)

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await get(app, CLAIMS, "rollback")
            assert app.all(User.email) == []
            with pytest.raises(TimeoutError):
                await logto.wait_for_user("ana", 0)
            first = await get(app, CLAIMS)
            assert first[1:] == ("ana", "ana@example.com")
            assert await get(app, {"sub": "ana"}) == first
            assert (await logto.wait_for_user("ana", 0)).email == "ana@example.com"
            await until(all_over(1), logto)
            assert told == ["ensure_user"]
            await send(client, make.user_created(id="ana", primaryEmail="new@example.com"))
            seen = await eventually(lambda: get(app, CLAIMS), lambda seen: seen != first)
            assert seen == (first[0], "ana", "new@example.com")

        live(app.logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sqlite"])
def test_a_session_that_keeps_its_snapshot_only_reads(
    kind: EngineKind, level: Any, tmp_path: Path
) -> None:
    """It wouldn't see what others commit while the user is created."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users()
        usual = app.engine

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            app.engine = usual.execution_options(isolation_level=level)
            with pytest.raises(SettingInvalid, match=f"is at {level}"):
                await get(app, CLAIMS)
            app.engine = usual
            made = await get(app, CLAIMS)
            app.engine = usual.execution_options(isolation_level=level)
            assert await get(app, CLAIMS) == made
            app.engine = usual

        live(app.logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_service(kind: EngineKind, tmp_path: Path) -> None:
    """The mapping is registered when it is first used."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users()

        async def run() -> None:
            await app.logto.migrate()
            assert (await get(app, CLAIMS))[1:] == ("ana", "ana@example.com")
            [listed] = await app.logto.mapping_counts()
            assert (listed.mapping, listed.ok) == ("own_users", 1)
            await app.logto.close()
            if isinstance(app.engine, AsyncEngine):
                await app.engine.dispose()

        asyncio.run(run())


@pytest.mark.postgres
@pytest.mark.parametrize("claims", [{"sub": "ana"}, CLAIMS], ids=["access", "id"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_existing_row_is_linked_once_logto_has_sent_the_user(
    kind: EngineKind, claims: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever the claims of the first request have: until then, nothing is written."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users(link=User.email)
        app.write(lambda session: session.add(User(id=7, email="Ana@Example.com", name="old")))

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await until_applied(logto)
            says = (
                "hasn't sent the whole user yet, which `link` needs: usually, its webhook follows"
            )
            for ensures in (False, True):
                if ensures:  # the user is here then, but not the own row
                    await logto.ensure_user(claims)
                for id_ in ("ana", "bo"):
                    with pytest.raises(UserNotReady, match=says):
                        await get(app, claims | {"sub": id_})
            assert app.all(User.logto_id) == [None]
            for id_ in ("ana", "bo"):
                email = f"{id_}@example.com"
                await send(client, make.user_created(id=id_, primaryEmail=email, name=id_))
            await eventually(logto.mapping_counts, lambda counts: counts[0].ok == 2)
            assert await get(app, claims) == (7, "ana", "ana@example.com")
            assert (await get(app, {"sub": "bo"}))[1:] == ("bo", "bo@example.com")

        live(app.logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_an_existing_row_is_linked_at_once_if_logto_can_be_asked(
    kind: EngineKind, tmp_path: Path
) -> None:
    """The object that the session had before is up to date. A new user gets a row, too."""

    async def run() -> None:
        async with FakeLogto() as fake:
            ana = fake.create_user(primaryEmail="ana@example.com", name="Ana")
            bo = fake.create_user(primaryEmail="bo@example.com", name="Bo")
            api: Any = {
                "endpoint": fake.url,
                "app_id": fake.app_id,
                "app_secret": fake.app_secret,
                "reconcile_every_s": 0,
            }
            with Application(kind, tmp_path, **api).opened() as app:
                app.map_users(link=User.email, where=lambda user: not user.custom_data.get("out"))
                old = User(id=7, email="Ana@Example.com", name="old")
                app.write(lambda session: session.add(old))
                await app.logto.migrate()
                async with app.logto.lifespan():
                    await until_applied(app.logto)
                    claims = {"sub": ana["id"]}
                    if isinstance(app.engine, AsyncEngine):
                        async with AsyncSession(app.engine) as session:
                            before = (await session.scalars(sa.select(User))).one()
                            user = await app.logto.get_user(User, claims, session=session)
                            assert user is before
                            assert (user.id, user.logto_id, user.name) == (7, ana["id"], "Ana")
                            await session.commit()
                    assert await get(app, claims) == (7, ana["id"], "ana@example.com")
                    assert (await get(app, {"sub": bo["id"]}))[1:] == (bo["id"], "bo@example.com")
                    with pytest.raises(UserNotReady, match="`link` needs"):
                        await get(app, {"sub": "nobody"})
                if isinstance(app.engine, AsyncEngine):
                    await app.engine.dispose()

    asyncio.run(run())


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_where_is_asked_once_logto_has_sent_the_user(kind: EngineKind, tmp_path: Path) -> None:
    """Claims lack what it may decide by, so it doesn't matter which comes first."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users(where=lambda user: not user.custom_data.get("banned"))

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            for claims in (CLAIMS, CLAIMS | {"sub": "eve", "email": "eve@example.com"}):
                with pytest.raises(UserNotReady, match="which `where` needs"):
                    await get(app, claims)
            banned = {"banned": True}
            eve = make.user_created(id="eve", email="eve@example.com", customData=banned)
            await send(client, eve, make.user_created(id="ana", email="ana@example.com"))
            for id_ in ("ana", "eve"):
                await logto.wait_for_user(id_, 10)
            assert (await get(app, CLAIMS))[1:] == ("ana", "ana@example.com")
            with pytest.raises(UserHasNoRow, match="won't get one, because `where` excludes"):
                await get(app, {"sub": "eve"})
            assert app.all(User.logto_id) == ["ana"]

        live(app.logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_the_application_deleted_is_made_again(kind: EngineKind, tmp_path: Path) -> None:
    """By the next request."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await get(app, CLAIMS)
            # In a thread: it may wait for a transaction that goes on only on this loop.
            await asyncio.to_thread(app.write, lambda session: session.execute(sa.delete(User)))
            assert (await get(app, {"sub": "ana"}))[1:] == ("ana", "ana@example.com")

        live(app.logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_forty_first_requests_of_one_user(kind: EngineKind, tmp_path: Path) -> None:
    """They get one row, more of them than the pool has connections, while the webhook arrives."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            loop = asyncio.get_running_loop()
            with ThreadPoolExecutor(40) as threads:
                if isinstance(app.engine, AsyncEngine):
                    requests = [asyncio.create_task(get(app, CLAIMS)) for _ in range(40)]
                else:
                    one = partial(get_in_thread, app, app.engine, CLAIMS, "commit")
                    requests = [
                        asyncio.ensure_future(loop.run_in_executor(threads, one)) for _ in range(40)
                    ]
                await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))
                seen = await asyncio.gather(*requests)
            assert len(set(seen)) == 1
            assert seen[0][1:] == ("ana", "ana@example.com")

        live(app.logto, body)
        assert app.all(User.logto_id) == ["ana"]


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_what_claims_lack_comes_from_logto(kind: EngineKind, tmp_path: Path) -> None:
    """Many requests at once share one; without an answer, none of them writes anything."""

    async def run() -> None:
        async with FakeLogto() as fake:
            ana = fake.create_user(primaryEmail="ana@example.com")
            bo = fake.create_user(username="bo", primaryEmail=None)
            api: Any = {
                "endpoint": fake.url,
                "app_id": fake.app_id,
                "app_secret": fake.app_secret,
                "reconcile_every_s": 0,
            }
            with Application(kind, tmp_path, **api).opened() as app:
                app.map_users()
                await app.logto.migrate()
                async with app.logto.lifespan():
                    claims = {"sub": ana["id"]}
                    seen = await asyncio.gather(*(get(app, claims) for _ in range(20)))
                    assert {each[1:] for each in seen} == {(ana["id"], "ana@example.com")}
                    for id_ in (bo["id"], "nobody"):
                        with pytest.raises(UserNotReady, match="email is NOT NULL"):
                            await get(app, {"sub": id_})
                    with pytest.raises(TimeoutError):
                        await app.logto.wait_for_user(bo["id"], 0)
                if isinstance(app.engine, AsyncEngine):
                    await app.engine.dispose()

    asyncio.run(run())


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_who_has_no_row(kind: EngineKind, tmp_path: Path) -> None:
    """It is said why, nothing is written, nothing stays locked, and the session can go on."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users()
        app.write(lambda session: session.add(User(email="taken@example.com")))

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            for claims, says in (
                ({"sub": "ana"}, r"user ana has no row in own_users yet: email is NOT NULL"),
                (
                    {"sub": "ana", "email": "taken@example.com"},
                    "another row has the value of email",
                ),
            ):
                with pytest.raises(UserNotReady, match=f"(?i){says}") as raised:
                    await get(app, claims)
                assert "\n" not in str(raised.value)
            drop = Tombstone(Key("user", "old"), soon())
            await logto.database.host.run(lambda store: batch.apply_reads(store, [drop], None))
            with pytest.raises(UserIsDeletedError):
                await get(app, CLAIMS | {"sub": "old"})
            with pytest.raises(ClaimsUnusable):
                await get(app, {})
            if isinstance(app.engine, AsyncEngine):
                async with AsyncSession(app.engine) as session:
                    session.add(Note(text="goes on"))
                    with pytest.raises(UserNotReady):
                        await logto.get_user(User, {"sub": "ana"}, session=session)
                    await get(app, CLAIMS)  # isn't locked by the other session
                    await session.commit()
                assert app.all(Note.text) == ["goes on"]

        live(app.logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", KINDS)
def test_who_has_several_rows(kind: EngineKind, tmp_path: Path) -> None:
    """Nobody gets any of them, neither a request nor a handler."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users(key=User.name, columns={User.email: "email"})
        given: list[str] = []

        @app.logto.on(events.UserDataUpdated, max_attempts=1)
        def updated(event: events.UserDataUpdated, user: User, session: Session) -> None:
            given.append(user.email)

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            app.write(lambda session: session.add(User(email="1@example.com", name="ana")))
            await get(app, CLAIMS)
            app.write(lambda session: session.add(User(email="2@example.com", name="ana")))
            says = "several rows have its ID in name, so none is changed or deleted"
            with pytest.raises(UserNotReady, match=says):
                await get(app, CLAIMS)
            await send(client, make.user_data_updated(id="ana", at=soon()))
            [job] = await until(lambda rows: bool(rows and rows[0].error), logto)
            assert job.error is not None
            assert says in job.error
            assert given == []

        live(app.logto, body)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sqlite"])
def test_who_waits_for_another_session_blocks_nobody(kind: EngineKind, tmp_path: Path) -> None:
    """The event loop goes on, and the other session can use it before its commit."""
    with Application(kind, tmp_path).opened() as app:
        app.map_users()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            engine: Any = app.engine
            session: Any = AsyncSession(engine) if app.is_async else Session(engine)
            user = await logto.get_user(User, CLAIMS, session=session)
            waiting = asyncio.create_task(get(app, CLAIMS))
            await asyncio.wait({waiting}, timeout=0.5)
            assert not waiting.done()
            await send(client, make.organization_created(id="acme"))
            assert await logto.get_user(User, CLAIMS, session=session) is user
            id_ = user.id
            if app.is_async:
                await session.commit()
                await session.close()
            else:
                session.commit()
                session.close()
            assert (await waiting)[0] == id_

        live(app.logto, body)


def test_a_session_of_sqlite_holds_no_lock_afterwards(tmp_path: Path) -> None:
    """Others write while the session of a user who isn't ready is still open."""
    with Application("sqlite", tmp_path).opened() as app:
        app.map_users()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            with Session(app.beside) as session:
                with pytest.raises(UserNotReady):
                    await logto.get_user(User, {"sub": "ana"}, session=session)
                await send(client, make.user_created(id="ana", primaryEmail="ana@example.com"))
                await eventually(lambda: logto.wait_for_user("ana"))
                user = await logto.get_user(User, {"sub": "ana"}, session=session)
                assert user.email == "ana@example.com"
                session.commit()

        live(app.logto, body)


def test_in_a_handler(tmp_path: Path) -> None:
    """In its session, which holds SQLite's only writer."""
    with Application("sqlite", tmp_path).opened() as app:
        app.map_users()

        @app.logto.on(events.OrganizationCreated)
        def created(session: Session) -> None:
            user = app.logto.call(app.logto.get_user(User, CLAIMS, session=session))
            session.add(Note(text=user.email))

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            await send(client, make.organization_created(id="acme"))
            [job] = await until(all_over(1), logto)
            assert job.state == "done", job.error

        live(app.logto, body)
        assert app.all(Note.text) == ["ana@example.com"]


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """A class that isn't mapped, or is no class; a session of another kind."""
    with Application("sqlite", tmp_path).opened() as app:
        app.map_users()
        app.map_teams()

        async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
            with Session(app.beside) as session:
                unmapped: list[Any] = [Note, Team, User.__table__, "User", int]
                for odd in unmapped:
                    with pytest.raises(SettingInvalid, match="call map_users with it first"):
                        await logto.get_user(odd, CLAIMS, session=session)
            with app.beside.connect() as connection:
                others: list[Any] = [connection, None]
                for other in others:
                    with pytest.raises(SettingInvalid, match="Session"):
                        await logto.get_user(User, CLAIMS, session=other)

        live(app.logto, body)


@pytest.mark.parametrize("framework", ["fastapi", "starlette"])
def test_a_framework_answers_503_or_403_or_401(framework: str, tmp_path: Path) -> None:
    """With Retry-After for a user who isn't there yet, 403 for one who gets no row, and 401 for one
    who was deleted."""
    with Application("sqlite", tmp_path).opened() as app:
        app.map_users(where=lambda user: user.name != "Eve")

        async def show(request: Request) -> JSONResponse:
            with Session(app.beside) as session:
                claims = {"sub": request.query_params["user"]}
                user = await app.logto.get_user(User, claims, session=session)
                return JSONResponse({"email": user.email})

        async def refuse(request: Request) -> JSONResponse:
            raise UserIsDeletedError(id="ana")

        async def run() -> None:
            await app.logto.migrate()
            name = {"name": "Eve", "primaryEmail": None}
            eve = ApiRead(Key("user", "eve"), {"own": name}, 1_000, 1_000)
            await app.logto.database.host.run(lambda store: batch.apply_reads(store, [eve], None))
            served: Starlette
            if framework == "fastapi":
                served = fastapi.FastAPI(exception_handlers=fastapi_handlers)
                served.add_route("/me", show)
                served.add_route("/deleted", refuse)
            else:
                served = Starlette(
                    routes=[Route("/me", show), Route("/deleted", refuse)],
                    exception_handlers=starlette_handlers,
                )
            transport = httpx2.ASGITransport(app=served)
            async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
                answer = await client.get("/me?user=ana")
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "5"
                assert answer.json() == {"error": "user_not_ready"}
                deleted = await client.get("/deleted")
                excluded = await client.get("/me?user=eve")
            assert deleted.status_code == 401
            assert deleted.json() == {"error": "user_is_deleted"}
            assert (excluded.status_code, excluded.json()) == (403, {"error": "user_has_no_row"})
            assert "retry-after" not in excluded.headers

        asyncio.run(run())
