"""What isn't an Exception, such as CancelledError, where only an Exception is expected."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import pytest
import sqlalchemy as sa

from logto_webhooks import LogtoWebhooks, events
from logto_webhooks.database.store import Checkpoint, Store
from logto_webhooks.errors import InvalidMapping, StoreUnavailable
from logto_webhooks.instrumentation import Stalled
from logto_webhooks.mapping import sources
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support.mapped_application import KINDS, PLAN, Application, counts_of
from tests.support.mounted import live, send, soon, until
from tests.support.stores import STORES, Copy, StoreKind, open_host

RAISED = (asyncio.CancelledError, GeneratorExit, SystemExit)
Raised = type[BaseException]


@pytest.mark.postgres
@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_function_of_a_mapping_may_raise_anything(
    kind: StoreKind, raised: Raised, tmp_path: Path
) -> None:
    """The user for whom it raises is a conflict, and all others are linked and written."""

    async def body(application: Application) -> None:
        own = application.users.c

        def call(name: str, result: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def function(user: Any) -> Any:
                if user.logto_user_id == name:
                    raise raised
                return result(user)

            return function

        host = await application.map(
            columns={own.email: "email", own.active: call("columns", lambda user: True)},
            where=call("where", lambda user: True),
            fill={own.first_name: call("fill", lambda user: user.name)},
            link=call("link", lambda user: own.email == user.email),
        )
        await application.apply_all()
        existing = [PLAN | {"email": f"{name}@x"} for name in ("ana", "bo", "cleo")]
        with application.engine.begin() as connection:
            connection.execute(sa.insert(application.users), existing)
        names = ("ana", "columns", "where", "bo", "fill", "link", "cleo")
        sent = [make.user_created(id=name, email=f"{name}@x", at=1_000).body for name in names]
        await asyncio.wait_for(Copy(host).take(sent), 30)
        rows = application.rows(application.users, "logto_user_id")
        assert rows == [("ana",), ("bo",), ("cleo",)]
        counts = await counts_of(host, application.users)
        assert (counts.conflict, counts.ok) == (4, 3)

    Application.run(kind, tmp_path, body)


def test_control_c_in_a_function_of_a_mapping_ends_the_process() -> None:
    """It is raised in the main thread. In any other, it is the function's own."""

    def function(row: object) -> NoReturn:
        raise KeyboardInterrupt

    def problem(text: str) -> InvalidMapping:
        return InvalidMapping(table="users", problem=text)

    run = sources.check_function("`where`", function, problem)
    with pytest.raises(KeyboardInterrupt):
        run(None)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            run(None)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert [str(error) for error in errors] == ["`where` raised KeyboardInterrupt"]


@pytest.mark.postgres
@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("kind", STORES)
def test_work_that_raises_it_fails_with_an_error(
    kind: StoreKind, raised: Raised, tmp_path: Path
) -> None:
    """It is neither a cancellation nor a database that doesn't answer, and nothing is written."""
    in_threads = kind in ("sqlite", "postgres-thread")

    async def body() -> None:
        host = open_host(kind, tmp_path)

        def work(store: Store) -> NoReturn:
            store.save_checkpoint("mark", Checkpoint(1, 1))
            raise raised

        def look(store: Store) -> NoReturn:
            raise raised

        calls: list[Callable[[], Coroutine[Any, Any, None]]] = [lambda: host.run_large(work)]
        if in_threads or raised is not SystemExit:  # on the event loop, that ends the process
            calls += [lambda: host.run(work), lambda: host.read(look), lambda: host.read_long(look)]
        for call in calls:
            with pytest.raises(Exception, match=r"raised|CancelledError") as caught:
                await asyncio.wait_for(call(), 20)
            assert not isinstance(caught.value, StoreUnavailable | TimeoutError)
        assert await host.read(lambda store: store.checkpoint("mark")) is None
        await host.close()

    asyncio.run(body())


LOOPS = ("DeliveryWorker.run", "JobWorker.run", "keep_applied", "Quarantine.keep")


def cancel_loops() -> list[str]:
    """Cancel the service's loops, and return their names."""
    tasks = {getattr(task.get_coro(), "__qualname__", ""): task for task in asyncio.all_tasks()}
    found = [name for name in LOOPS if name in tasks]
    for name in found:
        tasks[name].cancel()
    return found


def test_a_loop_that_ended_is_told_and_runs_again(tmp_path: Path) -> None:
    """Although nobody stopped it: deliveries are applied, and handlers run."""
    reports: list[object] = []
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine, observe=reports.append)
    table = sa.Table(
        "people",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text, unique=True),
    )
    table.create(engine)
    logto.map_users(table, key=table.c.logto_id, columns={}, when_deleted="keep")

    @logto.on("User.Created", name="good")
    def good(event: events.UserCreated) -> None:
        """Do nothing."""

    def are_done(count: int) -> Callable[[list[Any]], bool]:
        return lambda rows: [row.state for row in rows] == ["done"] * count

    async def body(logto: LogtoWebhooks, client: httpx2.AsyncClient) -> None:
        await send(client, make.user_created(id="first", at=soon()))
        await until(are_done(1), logto)
        assert cancel_loops() == list(LOOPS)
        await send(client, make.user_created(id="second", at=soon()))
        await until(are_done(2), logto)
        assert cancel_loops() == list(LOOPS)

    live(logto, body)
    problems = [report.problem for report in reports if isinstance(report, Stalled)]
    assert problems == ["a loop was cancelled, although nobody stopped it"] * len(problems)
    assert len(problems) >= len(LOOPS)
