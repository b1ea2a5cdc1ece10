"""A database that isn't there at the start: deliveries are received all the same."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import create_async_engine

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.errors import SchemaMismatch
from logto_webhooks.fastapi import router
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.mounted import all_over, send, soon, until
from tests.support.service import Service, command
from tests.support.waiting import until as until_true

SPOOLED = {"spooled": True, "duplicate": False}


@pytest.mark.process
def test_serve_receives_before_the_schema_is_there(tmp_path: Path) -> None:
    """With a spool directory: it is stored once `migrate` has run, without a restart."""
    with postgres.own_database() as url:
        address = url.set(drivername="postgresql").render_as_string(hide_password=False)
        options = ["--database-url", address, "--spool-dir", str(tmp_path / "spool")]
        with Service(tmp_path, *options) as service:
            answer = service.post(make.user_created())
            assert (answer.status_code, answer.json()) == (200, SPOOLED)
            ready = service.http.get("/readyz")
            assert (ready.status_code, ready.json()["ready"]) == (200, True)
            assert "can't be used" in ready.json()["spooling"]
            assert command("migrate", "--database-url", address, folder=tmp_path).returncode == 0
            service.wait_for_log("stored spooled deliveries")
            until_true(
                lambda: service.http.get("/readyz").json() == {"ready": True}, lambda: service.log
            )
            assert service.post(make.user_created()).json()["duplicate"] is False
            service.process.terminate()
            assert service.process.wait(timeout=30) == 0


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="has no modes")
def test_what_prevents_serve_from_using_its_database_is_told_and_passes(tmp_path: Path) -> None:
    """As where others can write to the spool directory by then. It is tried again."""
    with postgres.own_database() as url:
        address = url.set(drivername="postgresql").render_as_string(hide_password=False)
        options = ["--database-url", address, "--spool-dir", str(tmp_path / "spool")]
        with Service(tmp_path, *options) as service:
            assert service.post(make.user_created()).json() == SPOOLED
            (tmp_path / "spool").chmod(0o777)
            assert command("migrate", "--database-url", address, folder=tmp_path).returncode == 0
            assert "ERROR" in service.wait_for_log("other users can write")
            (tmp_path / "spool").chmod(0o700)
            service.wait_for_log("stored spooled deliveries")
            service.wait_for_log("outcome=applied")
            service.process.terminate()
            assert service.process.wait(timeout=30) == 0


@pytest.mark.process
@pytest.mark.parametrize("spools", [True, False])
def test_serve_starts_without_a_database_only_if_it_can_spool(spools: bool, tmp_path: Path) -> None:
    """Nobody listens at its address. What can never be a database's is an error in any case."""
    away = "postgresql://nobody@127.0.0.1:1/x"
    spool = ["--spool-dir", str(tmp_path / "spool")] if spools else []
    if spools:
        with Service(tmp_path, "--database-url", away, *spool) as service:
            assert service.post(make.user_created()).json() == SPOOLED
            service.process.terminate()
            assert service.process.wait(timeout=30) == 0
        key = {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
        wrong = command("serve", "--database-url", "mysql://a/b", *spool, folder=tmp_path, **key)
        assert wrong.returncode == 2
        assert len(list((tmp_path / "spool").glob("*.json"))) == 1
    else:
        key = {"LOGTO_WEBHOOK_SIGNING_KEY": SIGNING_KEY}
        refused = command("serve", "--database-url", away, folder=tmp_path, **key)
        assert refused.returncode == 2


def mount(logto: LogtoWebhooks) -> tuple[FastAPI, httpx2.AsyncClient]:
    app = FastAPI()
    app.include_router(router(logto))
    return app, httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=app), base_url="http://app", timeout=30
    )


@pytest.mark.parametrize("spools", [True, False])
def test_an_application_starts_before_the_schema_is_there(spools: bool, tmp_path: Path) -> None:
    """Only if it can spool."""

    async def run(url: sa.URL) -> None:
        engine = create_async_engine(url.set(drivername="postgresql+asyncpg"))
        spool_dir = str(tmp_path / "spool") if spools else None
        logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, spool_dir=spool_dir)
        done: list[str] = []

        @logto.on("User.Created")
        async def note(event: events.UserCreated) -> None:
            done.append(event.user_id)

        app, client = mount(logto)
        if not spools:
            with pytest.raises(SchemaMismatch):
                async with app.router.lifespan_context(app):
                    pass
            await engine.dispose()
            return
        async with app.router.lifespan_context(app), client:
            await send(client, make.user_created(id="ana", at=soon() + 60_000))
            assert list((tmp_path / "spool").glob("*.json"))
            await logto.migrate()
            await until(all_over(1), logto)
        assert done == ["ana"]
        await engine.dispose()

    with postgres.own_database() as url:
        asyncio.run(run(url))


def test_handlers_that_cannot_be_registered_yet_hold_back_nobody(tmp_path: Path) -> None:
    """Their table is locked. The delivery is stored, and applied once they are registered."""

    async def run() -> None:
        engine = create_async_engine(postgres.server_url().set(drivername="postgresql+asyncpg"))
        schema = postgres.emptied_schema()
        logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, schema=schema)
        done: list[str] = []

        @logto.on("User.Created")
        async def note(event: events.UserCreated) -> None:
            done.append(event.user_id)

        await logto.migrate()
        app, client = mount(logto)
        async with engine.connect() as locking:
            await locking.execute(sa.text(f"LOCK TABLE {schema}.logto_handlers"))
            async with app.router.lifespan_context(app), client:
                await send(client, make.user_created(id="ana", at=soon() + 60_000))
                assert not done
                await locking.rollback()
                await until(all_over(1), logto)
        assert done == ["ana"]
        await engine.dispose()

    asyncio.run(run())
