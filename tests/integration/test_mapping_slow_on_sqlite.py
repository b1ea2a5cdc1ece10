"""SQLite has one writer, so a row whose writing takes long would hold up everybody: it is
interrupted, and the transaction, which SQLite rolls back, is tried again without it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.apply import DeliveryWorker
from logto_webhooks.database import sqlite
from logto_webhooks.database.mapped_rows import UnwrittenRows
from logto_webhooks.database.statement_limits import INTERRUPTER
from logto_webhooks.mapping import apply, row_limits, table_writer
from logto_webhooks.mapping.apply import (
    OWED,
    SlowRows,
    apply_all,
    keep_applied,
    retry_unsettled,
)
from logto_webhooks.testing import FrozenClock, make
from tests.integration.test_mapping_roles import ANA, RoleApplication, read_user_roles
from tests.support.mapped_application import PLAN, Application, counts_of, learn
from tests.support.stores import Copy, delivery
from tests.support.waiting import eventually

LIMIT_S = 0.5
OTHERS = [f"u{n}" for n in range(20)]
FOR_EVER = 10_000_000_000


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten how long a row may hold the only writer."""
    monkeypatch.setattr(row_limits, "WRITER_S", LIMIT_S)
    monkeypatch.setattr(row_limits, "SHORT_STATEMENT_MS", 200)


def slow_down(application: Application, step: str, table: str = "users", who: str = "") -> None:
    """Let a trigger count to a number that `set_speed` sets whenever such a row is written."""
    row = "OLD" if step == "delete" else "NEW"
    who = who or f"{row}.logto_user_id LIKE 'slow%'"
    counting = """
        WITH RECURSIVE counter(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counter
        WHERE n < (SELECT most FROM speed)) SELECT count(*) FROM counter
    """
    with application.engine.begin() as connection:
        for statement in (
            "CREATE TABLE IF NOT EXISTS speed (most INTEGER)",
            "CREATE TABLE IF NOT EXISTS counted (number INTEGER)",
            f"CREATE TRIGGER slow AFTER {step} ON {table} WHEN {who} BEGIN"
            f" INSERT INTO counted SELECT * FROM ({counting}); END",
        ):
            connection.execute(sa.text(statement))
    set_speed(application, FOR_EVER)


def set_speed(application: Application, most: int) -> None:
    with application.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM speed"))
        connection.execute(sa.text("INSERT INTO speed VALUES (:most)"), {"most": most})


def created(*names: str) -> list[bytes]:
    return [make.user_created(id=name, email=f"{name}@x", at=1_000).body for name in names]


def change(step: str, *names: str) -> list[bytes]:
    if step == "delete":
        return [make.user_deleted(id=name, at=3_000).body for name in names]
    if step == "insert":
        return created(*names)
    return [
        make.user_data_updated(id=name, email=f"{name}@y", at=2_000, updatedAt=2_000).body
        for name in names
    ]


async def find_owed(application: Application) -> list[UnwrittenRows]:
    return await application.host.read(lambda store: store.mappings.list_unwritten(OWED))


async def check_done(application: Application) -> None:
    status = await application.host.read(lambda store: store.status())
    assert status.deliveries["pending"] == 0
    assert status.deliveries["dead"] == 0


@pytest.mark.parametrize("step", ["insert", "update", "delete"])
def test_a_slow_row_holds_up_nobody(step: str, tmp_path: Path) -> None:
    """It is owed, and no longer written with others. When it isn't slow any more, it is written."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        names = [*OTHERS[:9], "slow", *OTHERS[9:]]
        if step != "insert":
            await copy.take(created(*names))
        slow_down(application, step)
        await copy.take(change(step, *names[:13]))
        await check_done(application)
        slow = SlowRows(host, application.mappings)
        await slow.write_due()
        [owed] = await find_owed(application)
        assert (owed.mapping, owed.count) == ("users", 1)
        assert owed.reason == table_writer.WRITING.format("0.5s")
        rows = application.rows(application.users, "logto_user_id", "email")
        others = [row for row in rows if row[0] != "slow"]
        assert len(others) == {"insert": 12, "update": 20, "delete": 8}[step]
        assert ("slow", "slow@x") in rows or step == "insert"
        assert await retry_unsettled(host, application.mappings, OWED) == 0
        began = time.monotonic()
        await copy.take(change("update", "slow"))
        assert time.monotonic() - began < LIMIT_S  # it isn't tried
        set_speed(application, 1)
        await SlowRows(host, application.mappings).write_due()
        await application.check()

    Application.run("sqlite", tmp_path, live)


def test_accepting_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does everything else, while slow rows are tried again and again."""
    monkeypatch.setattr(apply, "LOOK_S", 0.05)
    monkeypatch.setattr(apply, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(apply, "LONGEST_PAUSE_S", 2.0)
    monkeypatch.setattr(apply, "RESTS", 2)
    waits: list[float] = []

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        await application.apply_all()
        slow_down(application, "insert")

        async def accept() -> None:
            n = 0
            while True:
                n += 1
                began = time.monotonic()
                body = make.user_created(id=f"a{n}", email=f"a{n}@x", at=1_000 + n).body
                await host.accept(lambda store: store.add([delivery(body)]), 8.0)  # noqa: B023
                waits.append(time.monotonic() - began)
                await asyncio.sleep(0.02)

        async def work() -> None:
            while True:
                await copy.worker.step()
                await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(accept()),
                tasks.create_task(work()),
                tasks.create_task(keep_applied(host, application.mappings)),
            ]
            bodies = created("slow1", *OTHERS, "slow2")
            await host.accept(lambda store: store.add([delivery(b) for b in bodies]), 8.0)

            async def are_others_written() -> bool:
                names = {n for (n,) in application.rows(application.users, "logto_user_id")}
                return names.issuperset(OTHERS) and len(waits) > 50

            await eventually(are_others_written)
            assert (await counts_of(host, application.users)).owed >= 2
            set_speed(application, 1)

            async def are_all_written() -> bool:
                names = {n for (n,) in application.rows(application.users, "logto_user_id")}
                return names.issuperset({"slow1", "slow2"})

            await eventually(are_all_written)
            for task in running:
                task.cancel()
        assert max(waits) < 8 * LIMIT_S

    Application.run("sqlite", tmp_path, live)


def test_after_a_slow_row_the_next_one_takes_less(tmp_path: Path) -> None:
    async def live(application: Application) -> None:
        copy = Copy(await application.map())
        slow_down(application, "insert")
        await copy.take(created("slow1"))
        await copy.take(created("slow2"))
        await copy.take(created(*OTHERS))
        assert {owed.reason for owed in await find_owed(application)} == {
            table_writer.WRITING.format("0.5s"),
            table_writer.WRITING.format("200ms"),
        }
        assert len(application.rows(application.users, "id")) == len(OTHERS)

    Application.run("sqlite", tmp_path, live)


def test_a_row_that_follows_is_found_too(tmp_path: Path) -> None:
    """Such as that of a membership, which is written because its user is, in a transaction of the
    user's own."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        team = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
        added = make.event(
            "Organization.Membership.Updated",
            organizationId="acme",
            addedUserIds=["slow", *OTHERS],
            at=1_500,
        ).body
        slow_down(application, "insert")
        await copy.take([team, added, *created("slow", *OTHERS)])
        with application.engine.begin() as connection:
            connection.execute(sa.text("DROP TRIGGER slow"))
        slow_down(application, "insert", "team_members", "true")
        await SlowRows(host, application.mappings).write_due()
        names = {n for (n,) in application.rows(application.users, "logto_user_id")}
        assert "slow" in names
        await retry_unsettled(host, application.mappings, OWED)
        assert {owed.mapping for owed in await find_owed(application)} == {"team_members"}
        set_speed(application, 1)
        await retry_unsettled(host, application.mappings, OWED)
        await SlowRows(host, application.mappings).write_due()
        await application.check()

    Application.run("sqlite", tmp_path, live)


def test_reading_that_takes_long_holds_up_nobody(tmp_path: Path) -> None:
    """Such as looking for an existing row in a large view or table."""

    async def live(application: Application) -> None:
        host = await application.map(link=slow_link)
        await application.apply_all()
        copy = Copy(host)
        with application.engine.begin() as connection:
            connection.execute(sa.insert(application.users).values(PLAN))
        await copy.take(created(*OTHERS))
        await check_done(application)
        owed = await find_owed(application)
        assert sum(rows.count for rows in owed) == len(OTHERS)
        assert {rows.reason for rows in owed} <= {
            table_writer.READING.format("0.5s"),
            table_writer.READING.format("200ms"),
        }
        assert await retry_unsettled(host, application.mappings, OWED) == 0
        slow_link.most = 1
        await SlowRows(host, application.mappings).write_due()
        with application.engine.begin() as connection:
            is_free = application.users.c.logto_user_id.is_(None)
            connection.execute(sa.delete(application.users).where(is_free))
        await application.check()

    Application.run("sqlite", tmp_path, live)


class SlowLink:
    """A condition of a link that counts up to a number."""

    most = FOR_EVER

    def __call__(self, user: object) -> sa.ColumnElement[bool]:
        text = (
            "(WITH RECURSIVE counter(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counter"
            f" WHERE n < {self.most}) SELECT count(*) FROM counter) < 0"
        )
        return sa.literal_column(text, sa.Boolean)


slow_link = SlowLink()


def test_batches_fit_the_time_that_the_rows_take(tmp_path: Path) -> None:
    """Accepting waits for them, too."""

    async def live(application: Application) -> None:
        host = await application.map()
        worker = DeliveryWorker(host, FrozenClock(), print, lambda: 0.0, budget_s=0.02)
        slow_down(application, "insert", who="true")
        set_speed(application, 60_000)
        names = [f"u{n}" for n in range(60)]
        await host.run(lambda store: store.add([delivery(body) for body in created(*names)]))
        while await worker.step():
            pass
        assert worker._sizer.weight <= 8
        await check_done(application)

    Application.run("sqlite", tmp_path, live)


def test_nothing_is_interrupted_once_it_is_over() -> None:
    """Neither if it took long before, nor if its time began anew afterwards."""
    counting = """
        WITH RECURSIVE counter(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counter
        WHERE n < 5000000) SELECT count(*) FROM counter
    """
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection:
        with INTERRUPTER.watching(connection, 0.01) as watch:
            with pytest.raises(sa.exc.OperationalError, match="interrupted"):
                connection.execute(sa.text(counting))
            assert watch.has_interrupted
        INTERRUPTER.restart(watch, 0.01)
        assert connection.execute(sa.text(counting)).scalar() == 5_000_000
    engine.dispose()


def test_a_function_that_sleeps_is_interrupted_between_its_calls(tmp_path: Path) -> None:
    """Such as one that a listener of the application's engine adds."""

    async def live(application: Application) -> None:
        host = await application.map()
        engine = application.host_engine
        for each in (engine, application.engine):
            each.dispose()
            sa.event.listen(each, "connect", add_nap)
        slow_down(application, "insert", who="false")
        with application.engine.begin() as connection:
            naps = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 9999)"
            connection.execute(
                sa.text(
                    "CREATE TRIGGER naps AFTER INSERT ON users WHEN NEW.logto_user_id = 'slow'"
                    f" BEGIN INSERT INTO counted SELECT * FROM ({naps} SELECT nap(0.01) FROM c);"
                    " END"
                )
            )
        began = time.monotonic()
        await Copy(host).take(created("slow", *OTHERS))
        assert time.monotonic() - began < 10  # instead of 100
        await check_done(application)
        [owed] = await find_owed(application)
        assert owed.count == 1
        assert len(application.rows(application.users, "id")) == len(OTHERS)

    Application.run("sqlite", tmp_path, live)


def add_nap(connection: Any, record: object) -> None:
    connection.create_function("nap", 1, time.sleep)


def test_a_delivery_of_which_all_rows_are_slow_is_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the mirror, in time; its rows are owed, however many there are."""
    monkeypatch.setattr(sqlite, "TRIES_S", 1.0)

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        names = [f"u{n}" for n in range(30)]
        team = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
        joined = make.event(
            "Organization.Membership.Updated", organizationId="acme", addedUserIds=names, at=1_500
        ).body
        await copy.take([team, joined, *created(*names)])
        await application.check()
        slow_down(application, "delete", "team_members", "true")
        await copy.take([make.event("Organization.Deleted", id="acme", at=3_000).body])
        await check_done(application)
        [deleted] = await host.read(lambda store: store.find("organization", "acme", 1))
        assert deleted.row["deleted_at"] is not None
        assert len(application.rows(application.members, "id")) == len(names)
        assert sum(rows.count for rows in await find_owed(application)) == len(names) + 1
        set_speed(application, 1)
        for _ in "12":
            await retry_unsettled(host, application.mappings, OWED)
            await SlowRows(host, application.mappings).write_due()
        await application.check()

    Application.run("sqlite", tmp_path, live)


def test_slow_deletions_are_allowed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are done one by one, however long after the command that allows them."""
    monkeypatch.setattr(apply, "RESTS", 0)
    monkeypatch.setattr(apply, "FIRST_PAUSE_S", 0)
    names = [f"u{n}" for n in range(25)]

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        await copy.take(created(*names))
        await copy.take(change("delete", *names))
        held = (await counts_of(host, application.users)).held
        assert held == len(application.rows(application.users, "id")) > 0
        slow_down(application, "delete", who="true")
        await apply_all(host, application.mappings, allow_deletes=True)
        await retry_unsettled(host, application.mappings, OWED)
        await SlowRows(host, application.mappings).write_due()  # too slow even alone
        counts = await counts_of(host, application.users)
        assert (counts.held, counts.owed) == (0, held)
        set_speed(application, 1)
        for _ in range(10):
            await SlowRows(host, application.mappings).write_due()
        assert application.rows(application.users, "id") == []
        await application.check()

    Application.run("sqlite", tmp_path, live)


def test_a_slow_row_of_somebody_restored_whose_deletion_was_held_is_written_alone(
    tmp_path: Path,
) -> None:
    names = [f"u{n}" for n in range(25)]

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        await copy.take(created(*names))
        await copy.take(change("delete", *names))
        assert (await counts_of(host, application.users)).held
        [(name,), *_] = application.rows(application.users, "logto_user_id")
        slow_down(application, "update", who=f"NEW.logto_user_id = '{name}'")
        email, at = f"{name}@y", 90_000
        back = make.user_data_updated(id=name, email=email, at=at, updatedAt=at).body
        await copy.take([back])
        assert (await counts_of(host, application.users)).owed == 1
        assert await retry_unsettled(host, application.mappings, OWED) == 0
        set_speed(application, 1)
        await SlowRows(host, application.mappings).write_due()
        assert (name, email) in application.rows(application.users, "logto_user_id", "email")

    Application.run("sqlite", tmp_path, live)


MANY_ROLES = {f"r{n}": f"n{n}" for n in range(10)}


@pytest.fixture
def quarter_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the real limits."""
    monkeypatch.setattr(row_limits, "SHORT_STATEMENT_MS", 75)
    monkeypatch.setattr(row_limits, "SEARCH_S", 0.4)
    monkeypatch.setattr(row_limits, "FILE_S", 0.75)
    monkeypatch.setattr(sqlite, "TRIES_S", 0.75)
    monkeypatch.setattr(apply, "RESTS", 0)


async def map_slow_roles(application: RoleApplication) -> None:
    """Let writing each role of a user take more than the limit for rows that others wait for."""
    await application.map_roles()
    with application.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM roles"))
        names = [{"name": name} for name in MANY_ROLES.values()]
        connection.execute(sa.text("INSERT INTO roles (name) VALUES (:name)"), names)
    await Copy(application.host).take([ANA])
    slow_down(application, "insert", "user_roles", "true")
    set_speed(application, 400_000)
    await learn(application.host, read_user_roles("ana", MANY_ROLES, 5_000))


def test_a_user_with_many_slow_roles_gets_them(quarter_limits: None, tmp_path: Path) -> None:
    """What one transaction finds is remembered, so the next one gets further."""

    async def live(application: RoleApplication) -> None:
        await map_slow_roles(application)
        host = application.host
        for _ in range(60):
            await retry_unsettled(host, application.mappings, OWED)
            await SlowRows(host, application.mappings).write_due()
            if not await find_owed(application):
                break
        assert await find_owed(application) == []
        counts = await counts_of(host, application.user_roles)
        assert counts.ok == len(MANY_ROLES)

    RoleApplication.run("sqlite", tmp_path, live)


def test_a_record_alone_holds_the_writer_for_a_short_time(
    quarter_limits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for the time of all its slow rows."""

    async def live(application: RoleApplication) -> None:
        await map_slow_roles(application)
        host: Any = application.host
        for _ in range(6):
            await retry_unsettled(host, application.mappings, OWED)
        set_speed(application, FOR_EVER)
        began = time.monotonic()
        await SlowRows(host, application.mappings).write_due()
        assert time.monotonic() - began < 3  # and not 10 times the limit of a row

    RoleApplication.run("sqlite", tmp_path, live)


def test_an_organization_whose_memberships_are_slow_gets_its_row(
    quarter_limits: None, tmp_path: Path
) -> None:
    """They are written later."""

    async def live(application: Application) -> None:
        host = await application.map()
        await application.apply_all()
        names = [f"u{n}" for n in range(12)]
        joined = make.organization_membership_updated(id="acme", addedUserIds=names, at=1_500).body
        await Copy(host).take([*created(*names), joined])
        slow_down(application, "insert", "team_members", "true")
        set_speed(application, 400_000)
        await Copy(host).take(
            [make.event("Organization.Created", id="acme", name="Acme", at=1_000).body]
        )
        for _ in range(60):
            await retry_unsettled(host, application.mappings, OWED)
            await SlowRows(host, application.mappings).write_due()
            if len(application.rows(application.members, "id")) == len(names):
                break
        assert application.rows(application.teams, "logto_id") == [("acme",)]
        assert len(application.rows(application.members, "id")) == len(names)

    Application.run("sqlite", tmp_path, live)
