"""FastAPI's TestClient, as applications' own tests use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette

from logto_webhooks import Delivery, LogtoWebhooks, events
from logto_webhooks.errors import InvalidMapping, SettingInvalid, StartedElsewhere
from logto_webhooks.fastapi import router
from logto_webhooks.starlette import routes
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.mounted import on_postgres, on_sqlite
from tests.support.waiting import until

NEWS = {
    ("Organization.Created", "organization:acme"),
    ("LocalOrganizationCreated", "organization:acme"),
    ("Organization.Membership.Updated", "organization:acme"),
    ("LocalMemberAdded", "user:ana"),
    ("User.Created", "user:ana"),
    ("PostRegister", "user:ana"),
    ("LocalUserCreated", "user:ana"),
    ("PostSignIn", "user:bo"),
    ("LocalUserCreated", "user:bo"),
    ("PostRegister", "user:cleo"),
    ("LocalUserCreated", "user:cleo"),
}


def mounted(logto: LogtoWebhooks) -> FastAPI:
    """In an application whose own lifespan lets go of its engine, as a loop's connections end
    with the loop."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if isinstance(logto._engine, AsyncEngine):
            await logto._engine.dispose()

    app = FastAPI(lifespan=lifespan)
    app.include_router(router(logto))
    return app


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_it_runs_the_lifespan_as_often_as_it_is_entered(kind: str, tmp_path: Path) -> None:
    """Each test of an application enters it anew: delivery, duplicate, handler, both slashes."""
    logto = on_sqlite(tmp_path) if kind == "sqlite" else on_postgres()
    told: list[str] = []

    @logto.on(events.LocalUserCreated)
    async def created(event: events.LocalUserCreated) -> None:
        told.append(event.user.logto_user_id)

    app = mounted(logto)
    for person in ("ana", "bo"):
        delivery = make.user_created(id=person)
        with TestClient(app, follow_redirects=False) as client:
            answers = [
                client.post(path, content=delivery.body, headers=dict(delivery.headers))
                for path in (logto.path, f"{logto.path}/")
            ]
            assert [each.status_code for each in answers] == [200, 200]
            assert [each.json()["duplicate"] for each in answers] == [False, True]
            until(partial(told.__contains__, person))
    assert told == ["ana", "bo"]


def test_what_make_makes_is_newer_than_the_application(tmp_path: Path) -> None:
    """Although it was made before that started: handlers run, the record's own, too."""
    logto = on_sqlite(tmp_path)
    told: set[tuple[str, str]] = set()

    @logto.on("User.*", "Post*", "Organization.*", events.LocalUserCreated)
    @logto.on(events.LocalOrganizationCreated, events.LocalMemberAdded, name="again")
    def tell(delivery: Delivery) -> None:
        told.add((delivery.event, delivery.subject))

    deliveries = [
        make.organization_created(id="acme"),
        *make.sign_up(id="ana", organizations=["acme"]),
        make.first_sign_in(id="bo"),
        make.post_register(id="cleo"),
    ]
    with TestClient(mounted(logto)) as client:
        for each in deliveries:
            client.post(logto.path, content=each.body, headers=dict(each.headers))
        until(lambda: told >= NEWS, lambda: str(NEWS - told))


def test_without_the_lifespan_it_says_so(tmp_path: Path) -> None:
    """A TestClient that isn't entered starts nothing: 503, not silence."""
    delivery = make.user_created()
    client = TestClient(mounted(on_sqlite(tmp_path)))
    answer = client.post(
        "/api/webhooks/logto", content=delivery.body, headers=dict(delivery.headers)
    )
    assert (answer.status_code, answer.json()) == (503, {"error": "not_started"})


def test_a_lifespan_within_another_ends_alone(tmp_path: Path) -> None:
    """Who entered first goes on."""
    logto = on_sqlite(tmp_path)

    @asynccontextmanager
    async def twice(app: Starlette) -> AsyncIterator[None]:
        async with logto.lifespan():
            async with logto.lifespan():
                pass
            yield

    with TestClient(Starlette(lifespan=twice, routes=routes(logto))) as client:
        assert sent(client, "/api/webhooks/logto") == 200


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_it_is_started_on_one_event_loop(kind: str, tmp_path: Path) -> None:
    """Each TestClient has its own: the second is refused, the first goes on, and another can be
    entered after it."""
    app = mounted(on_sqlite(tmp_path) if kind == "sqlite" else on_postgres())
    with TestClient(app) as client:
        with pytest.raises(StartedElsewhere, match="another event loop"), TestClient(app):
            pass
        assert sent(client, "/api/webhooks/logto") == 200
    with TestClient(app) as client:
        assert sent(client, "/api/webhooks/logto/") == 200


def test_an_event_loop_that_was_closed_is_no_other(tmp_path: Path) -> None:
    """It was left without ending its lifespan: the next one may start."""
    logto = on_sqlite(tmp_path)
    loop, left = asyncio.new_event_loop(), logto.lifespan()
    loop.run_until_complete(left.__aenter__())
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.wait(tasks))
    loop.close()
    with TestClient(mounted(logto)) as client:
        assert sent(client, "/api/webhooks/logto") == 200


def test_a_table_that_is_mapped_after_the_start_is_refused(tmp_path: Path) -> None:
    """Like a handler: the rows of others wouldn't follow. Afterwards, it can be mapped."""
    logto = on_sqlite(tmp_path)
    table = sa.Table("people", sa.MetaData(), sa.Column("id", sa.String, primary_key=True))

    def map_people() -> None:
        logto.map_users(table, key="id", columns={}, when_deleted="delete")

    with TestClient(mounted(logto)), pytest.raises(InvalidMapping, match="has already started"):
        map_people()
    assert not logto.mappings
    map_people()


@pytest.mark.parametrize("given", [None, "/given"])
def test_the_path_is_read_from_the_environment(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by `from_env`, for routes and as an application; an argument wins over it."""
    monkeypatch.setenv("LOGTO_WEBHOOKS_PATH", "/hooks/logto")
    monkeypatch.setenv("LOGTO_WEBHOOK_SIGNING_KEY", SIGNING_KEY)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'app.db'}")
    logto = LogtoWebhooks.from_env(path=given)
    delivery = make.user_created()
    headers = dict(delivery.headers)
    path = given or "/hooks/logto"
    asyncio.run(logto.migrate())
    routed = FastAPI()
    routed.include_router(router(logto))
    for app in (routed, Starlette(routes=routes(logto), lifespan=logto.lifespan), logto):
        with TestClient(app) as client:
            for each in (path, f"{path}/"):
                assert client.post(each, content=delivery.body, headers=headers).status_code == 200
            assert client.post("/api/webhooks/logto", content=b"").status_code == 404


def test_a_path_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of its variable."""
    monkeypatch.setenv("LOGTO_WEBHOOKS_PATH", "no path")
    with pytest.raises(
        SettingInvalid, match="LOGTO_WEBHOOKS_PATH can't be used: it must be a path"
    ):
        router(LogtoWebhooks.from_env())


@pytest.mark.parametrize("root_path", ["", "/behind/a/proxy", "/behind/"])
def test_as_an_application_it_may_be_below_a_path(root_path: str, tmp_path: Path) -> None:
    """Mounted there, or served there by uvicorn's --root-path."""
    logto = on_sqlite(tmp_path)
    with TestClient(logto, root_path=root_path) as client:
        for path in ("/api/webhooks/logto", "/api/webhooks/logto/"):
            assert sent(client, root_path.rstrip("/") + path) == 200
            assert sent(client, path) == 200, "a server that leaves out the root"
        assert sent(client, f"{root_path}/elsewhere") == 404
    app = FastAPI(lifespan=logto.lifespan)
    app.mount("/hooks", logto)
    with TestClient(app) as client:
        assert sent(client, "/hooks/api/webhooks/logto") == 200
        assert sent(client, "/hooks/elsewhere") == 404


def sent(client: TestClient, path: str) -> int:
    """The status of an answer to a delivery there."""
    delivery = make.user_created(id=path)
    return client.post(path, content=delivery.body, headers=dict(delivery.headers)).status_code
