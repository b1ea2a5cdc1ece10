"""Where the functions of mappings run, and how long: never on the event loop that answers
deliveries, and nobody waits long for one that is slow."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.database.mapped_rows import UnwrittenRows
from logto_webhooks.database.records import FoundRow
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.store import Store
from logto_webhooks.mapping import functions
from logto_webhooks.mapping.apply import OWED, UNSETTLED, SlowRows, retry_unsettled
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.file_values import FieldValue
from logto_webhooks.testing import make
from tests.support.mapped_application import KINDS, Application
from tests.support.stores import Copy, StoreKind, delivery
from tests.support.waiting import eventually


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_of_a_mapping_blocks_no_event_loop(kind: StoreKind, tmp_path: Path) -> None:
    """For deliveries, for a new mapping, by the command, and for what is tried again."""
    threads: list[threading.Thread] = []

    def choose_plan(user: Any) -> None:  # so the row waits
        threads.append(threading.current_thread())

    async def live(application: Application) -> None:
        own = application.users.c
        columns = {own.email: "email", own.active: lambda user: True, own.plan: choose_plan}
        host = await application.map(columns=columns, create_defaults={})
        steps: list[Callable[[], Awaitable[object]]] = [
            partial(Copy(host).take, [make.user_created(id="ana").body]),
            application.apply_all,
            application.apply_again,
            partial(retry_unsettled, host, application.mappings, UNSETTLED),
        ]
        for number, step in enumerate(steps):
            threads.clear()
            await step()
            assert threads, f"step {number} calls no function"
            assert threading.main_thread() not in threads, f"step {number}"

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_no_thread_is_started_for_a_mapping_without_functions(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are written faster."""
    monkeypatch.setattr(functions, "DetachedCall", None)

    async def live(application: Application) -> None:
        own = application.users.c
        columns = {own.email: "email", own.first_name: "profile.givenName"}
        defaults = {own.plan: "free", own.active: True}
        host = await application.map(columns=columns, create_defaults=defaults, link=own.email)
        await Copy(host).take([make.user_created(id="ana").body])
        assert application.rows(application.users, "logto_user_id") == [("ana",)]

    Application.run(kind, tmp_path, live)


# Global, because a mapping's function can't be compared if it holds them.
MAY_RETURN = threading.Event()
CALLS: list[str] = []


@pytest.fixture(autouse=True)
def function_is_slow() -> Iterator[None]:
    """Let `is_true` wait for the user bo, until it may return."""
    MAY_RETURN.clear()
    CALLS.clear()
    yield
    MAY_RETURN.set()


def is_true(user: Any) -> bool:
    """Is true for each user, but for one it takes long."""
    if user.username == "bo":
        CALLS.append(user.username)
        MAY_RETURN.wait(60)
    return True


async def was_called() -> bool:
    """Whether it was called for that one."""
    return bool(CALLS)


NAMES = ("ana", "bo", "cy")


async def none_is_stuck() -> bool:
    """Whether all functions have returned."""
    return functions.list_stuck() == []


async def find_owed(host: HandlerRunner) -> list[UnwrittenRows]:
    """Find what is owed, by its reason."""
    return await host.read(lambda store: store.mappings.list_unwritten(OWED))


def find_in_mirror(store: Store, name: str) -> list[FoundRow]:
    """Find a user in the mirror."""
    return store.find("user", name, 2)


@pytest.mark.parametrize("option", ["columns", "fill", "where", "link"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_does_not_return_holds_back_its_row_alone(
    kind: StoreKind, option: str, tmp_path: Path
) -> None:
    """The mirror has the record, the rows of others are written, and deliveries are accepted
    meanwhile. The row is written once the function returns."""

    async def live(application: Application) -> None:
        own = application.users.c
        columns: dict[Any, Any] = {own.email: "email"}
        options: dict[str, Any] = {"create_defaults": {own.plan: "free", own.active: True}}
        if option == "columns":
            columns[own.active] = is_true
            options["create_defaults"] = {own.plan: "free"}
        elif option == "fill":
            options["fill"] = {own.first_name: lambda user: "Bo" if is_true(user) else None}
        elif option == "where":
            options["where"] = is_true
        else:
            options["link"] = lambda user: (own.email == user.email) & is_true(user)
        host = await application.map(columns=columns, **options)
        started = time.monotonic()
        bodies = [make.user_created(id=n, username=n, email=f"{n}@x.example").body for n in NAMES]
        taking = asyncio.create_task(Copy(host).take(bodies))
        await eventually(was_called)
        stored = await host.accept(
            lambda store: store.add([delivery(make.user_created(id="di").body)]), 8
        )
        assert stored
        await taking
        await retry_unsettled(host, application.mappings, OWED)
        assert time.monotonic() - started < 10
        for name in NAMES:
            assert await host.read(partial(find_in_mirror, name=name))
        rows = application.rows(application.users, "logto_user_id")
        assert {("ana",), ("cy",)} <= set(rows)
        assert ("bo",) not in rows
        [owed] = await find_owed(host)
        assert owed.count == 1
        assert "a function of the mapping takes longer than 2 s" in str(owed.reason)
        MAY_RETURN.set()
        await eventually(none_is_stuck)
        await SlowRows(host, application.mappings).write_due()
        assert ("bo",) in application.rows(application.users, "logto_user_id")
        assert not await find_owed(host)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_many_functions_that_do_not_return_are_called_no_more(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each keeps a thread. Everything else goes on, and it ends when they return."""
    monkeypatch.setattr(functions, "MOST_STUCK", 1)

    async def live(application: Application) -> None:
        own = application.users.c
        host = await application.map(columns={own.email: "email", own.active: is_true})
        copy = Copy(host)
        await copy.take([make.user_created(id="bo", username="bo", email="bo@x.example").body])
        await copy.take([make.user_created(id="ana", username="ana", email="a@x.example").body])
        reasons = [str(owed.reason) for owed in await find_owed(host)]
        assert len(reasons) == 2
        assert any("haven't returned in 1 threads" in reason for reason in reasons)
        assert len(CALLS) == 1
        MAY_RETURN.set()
        await eventually(none_is_stuck)
        await retry_unsettled(host, application.mappings, OWED)
        await SlowRows(host, application.mappings).write_due()
        assert len(application.rows(application.users, "logto_user_id")) == 2

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_whose_function_does_not_return_keeps_one_thread(
    kind: StoreKind, tmp_path: Path
) -> None:
    """However often it is tried: many would let the functions of all others wait."""

    async def live(application: Application) -> None:
        own = application.users.c
        host = await application.map(columns={own.email: "email", own.active: is_true})
        await Copy(host).take([make.user_created(id="bo", username="bo", email="b@x.example").body])
        for _ in "12":
            await SlowRows(host, application.mappings).write_due()
        assert len(CALLS) == 1
        [owed] = await find_owed(host)
        assert "takes longer than" in str(owed.reason)

    Application.run(kind, tmp_path, live)


def sleep_long(user: Any) -> str:
    """Take most of the time that a transaction has for functions."""
    time.sleep(0.35)
    return "Ana"


def sleep_briefly(user: Any) -> str:
    """Take less than a fourth of that time."""
    time.sleep(0.09)
    return "a"


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_one_record_take_no_time_from_each_other_for_ever(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of another mapping is written alone."""
    monkeypatch.setattr(functions, "SHARED_S", 0.4)
    monkeypatch.setattr(functions, "ALONE_S", 0.4)

    async def live(application: Application) -> None:
        own, schema = application.users.c, application.users.schema
        profiles = sa.Table(
            "profiles",
            sa.MetaData(),
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("logto_id", sa.Text, unique=True),
            sa.Column("word", sa.Text),
            schema=schema,
        )
        profiles.create(application.engine)
        host = await application.map(
            columns={own.first_name: sleep_long},
            create_defaults={own.plan: "free", own.active: True},
        )
        application.mappings.add(
            declare_entities(
                "user",
                profiles,
                key="logto_id",
                columns={"word": sleep_briefly},
                when_deleted="delete",
            )
        )
        await host.run(lambda store: store.mappings.register(application.mappings.registered))
        await Copy(host).take([make.user_created(id="ana", at=1_000).body])
        [owed] = await find_owed(host)
        assert "take too long together" in str(owed.reason)
        assert await retry_unsettled(host, application.mappings, OWED) == 0
        await eventually(none_is_stuck)
        await SlowRows(host, application.mappings).write_due()
        assert application.rows(profiles, "logto_id", "word") == [("ana", "a")]
        assert application.rows(application.users, "first_name") == [("Ana",)]
        assert not await find_owed(host)

    Application.run(kind, tmp_path, live)


def sleep_for_one(user: Any) -> str | None:
    """Take too long for one user."""
    if user.logto_user_id == "slow":
        time.sleep(1.0)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_function_keeps_nobody_elses_row_from_being_linked(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the slow user wants is known, because that is another column."""
    monkeypatch.setattr(functions, "SHARED_S", 0.4)
    monkeypatch.setattr(functions, "ALONE_S", 0.4)

    async def live(application: Application) -> None:
        own = application.users
        columns = {own.c.email: "email", own.c.first_name: sleep_for_one}
        defaults = {own.c.plan: "free", own.c.active: True}
        rows = [{"email": f"{name}@x", "plan": "paid", "active": True} for name in ("ana", "both")]
        with application.engine.begin() as connection:
            connection.execute(sa.insert(own), rows)
        host = await application.map(columns=columns, create_defaults=defaults, link="email")
        await application.apply_all()
        copy = Copy(host)
        people = {"slow": "both@x", "ana": "ana@x", "bo": "both@x"}
        for name, email in people.items():
            await copy.take([make.user_created(id=name, email=email, at=1_000).body])
        await retry_unsettled(host, application.mappings, OWED)
        linked = application.rows(own, "logto_user_id", "email")
        assert linked == [("ana", "ana@x"), (None, "both@x")]
        await eventually(none_is_stuck)

    Application.run(kind, tmp_path, live)


def test_a_map_file_has_no_functions() -> None:
    """What it says takes no time, so no thread is started for it."""
    users = sa.Table(
        "users",
        sa.MetaData(),
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("email", sa.Text),
    )
    given: dict[str, Any] = {"key": "id", "when_deleted": "delete"}
    source = FieldValue("email")
    assert not declare_entities("user", users, columns={"email": source}, **given).has_functions
    assert declare_entities("user", users, columns={"email": lambda row: ""}, **given).has_functions
