"""A row whose writing takes long, such as with a slow trigger, holds up nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import sqlalchemy as sa

from logto_webhooks import mapping
from logto_webhooks.database.mapped_rows import UnwrittenRows
from logto_webhooks.database.postgres import Postgres, StatementLimit, make_postgres_engine
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.store import Store
from logto_webhooks.errors import StoreUnavailable
from logto_webhooks.mapping import apply, row_limits, table_writer
from logto_webhooks.mapping.apply import (
    OWED,
    SlowRows,
    apply_all,
    keep_applied,
    retry_unsettled,
)
from logto_webhooks.testing import make
from tests.support import postgres
from tests.support.mapped_application import Application, counts_of
from tests.support.stores import Copy, StoreKind, WrappedRunner
from tests.support.waiting import eventually

T = TypeVar("T")
SERVERS: tuple[StoreKind, ...] = ("asyncpg", "postgres-thread")
LIMIT_S = 1.0  # of a statement
SHORT_MS = 250  # of one that writes rows with care
Step = Literal["insert", "update", "delete"]
STEPS: tuple[Step, ...] = ("insert", "update", "delete")


class Hasty(WrappedRunner):
    """Gives statements less time, and counts what runs alone."""

    def __init__(self, host: HandlerRunner) -> None:
        super().__init__(host)
        self.alone = 0

    async def run(self, work: Callable[[Store], T]) -> T:
        def run(store: Store) -> T:
            store.limit_waits(0.3, LIMIT_S)
            return work(store)

        return await self._host.run(run)

    async def run_slow(self, work: Callable[[Store], T], statement_s: float) -> T:
        self.alone += 1
        return await self._host.run_slow(work, statement_s)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten what a row may take, as `LIMIT_S` does for a statement."""
    monkeypatch.setattr(row_limits, "SHORT_STATEMENT_MS", SHORT_MS)
    monkeypatch.setattr(row_limits, "LONG_S", LIMIT_S * 0.8)


def slow_down(application: Application, table: sa.Table, step: Step, who: str, by_s: float) -> None:
    """Let a trigger sleep whenever a row is written, if an expression says that it is slow."""
    drop = f"DROP TRIGGER IF EXISTS slow ON {table}"
    function = f"""
        CREATE OR REPLACE FUNCTION app.sleep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF {who.format(row="OLD" if step == "delete" else "NEW")} THEN
            PERFORM pg_sleep({by_s}); END IF;
        RETURN {"OLD" if step == "delete" else "NEW"}; END $$
    """
    trigger = (
        f"CREATE TRIGGER slow BEFORE {step} ON {table} FOR EACH ROW EXECUTE FUNCTION app.sleep()"
    )
    with application.engine.begin() as connection:
        for statement in (drop, function, trigger):
            connection.execute(sa.text(statement))


def created(*names: str) -> list[bytes]:
    return [make.user_created(id=name, email=f"{name}@x", at=1_000).body for name in names]


def renamed(*names: str) -> list[bytes]:
    return [
        make.user_data_updated(id=name, email=f"{name}@y", at=2_000, updatedAt=2_000).body
        for name in names
    ]


def do(step: Step, *names: str) -> list[bytes]:
    if step == "delete":
        return [make.user_deleted(id=name, at=3_000).body for name in names]
    return created(*names) if step == "insert" else renamed(*names)


async def find_owed(host: HandlerRunner) -> list[UnwrittenRows]:
    return await host.read(lambda store: store.mappings.list_unwritten(OWED))


async def check_done(host: HandlerRunner) -> None:
    status = await host.read(lambda store: store.status())
    assert status.deliveries["pending"] == 0


OTHERS = [f"u{n}" for n in range(20)]
SLOW_USERS = "{row}.logto_user_id LIKE 'slow%'"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", SERVERS)
def test_a_slow_row_holds_up_nobody(kind: StoreKind, step: Step, tmp_path: Path) -> None:
    """The others are written at once. It is owed, is no longer written with others, and is written
    alone, however long that takes."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(Hasty(host))
        names = [*OTHERS[:9], "slow", *OTHERS[9:]]
        if step != "insert":
            await copy.take(created(*names))
        slow_down(application, application.users, step, SLOW_USERS, 1.5)
        await copy.take([*do(step, *names[:13]), *renamed(*OTHERS[12:])])
        await check_done(host)
        counts = await counts_of(host, application.users)
        assert (counts.owed, counts.conflict) == (1, 0)
        [owed] = await find_owed(host)
        assert owed.reason is not None
        assert owed.reason.startswith(
            f"writing its row takes longer than {SHORT_MS}ms, so it is tried"
        )
        rows = application.rows(application.users, "logto_user_id", "email")
        left = rows if step == "insert" else [row for row in rows if row[0] != "slow"]
        assert len(left) == (20 if step != "delete" else 8)
        assert all(email.endswith("@y") for name, email in left if name in OTHERS[12:])
        assert await retry_unsettled(copy.host, application.mappings, OWED) == 0
        slow_down(application, application.users, step, "false", 0)
        await copy.take([make.user_data_updated(id="slow", name="S", at=2_500).body])
        assert (await counts_of(host, application.users)).owed == 1
        slow_down(application, application.users, step, SLOW_USERS, 1.5)
        await SlowRows(host, application.mappings).write_due()
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("step", ["insert", "delete"])
@pytest.mark.parametrize("kind", SERVERS)
def test_a_slow_row_of_a_member_holds_up_nobody(
    kind: StoreKind, step: Step, tmp_path: Path
) -> None:
    """Nor does it keep the rows of other members from being written."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(Hasty(host))
        team = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
        await copy.take([team, *created("slow", *OTHERS)])
        [slow_id] = [
            id_
            for id_, name in application.rows(application.users, "id", "logto_user_id")
            if name == "slow"
        ]

        def change(name: str, at: int) -> bytes:
            fields: dict[str, Any] = {"organizationId": "acme", name: ["slow", *OTHERS], "at": at}
            return make.event("Organization.Membership.Updated", **fields).body

        who = f"{{row}}.user_id = {slow_id}"
        if step == "delete":
            await copy.take([change("addedUserIds", 2_000)])
        slow_down(application, application.members, step, who, 1.5)
        name = "addedUserIds" if step == "insert" else "removedUserIds"
        await copy.take([change(name, 3_000)])
        await check_done(host)
        assert len(application.rows(application.members, "id")) == (20 if step == "insert" else 1)
        [owed] = await find_owed(host)
        assert (owed.mapping, owed.count) == ("app.team_members", 1)
        assert await retry_unsettled(copy.host, application.mappings, OWED) == 0
        await SlowRows(host, application.mappings).write_due()
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_many_slow_rows_hold_up_nobody(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for them ends soon. What wasn't tried by then is tried again, with others."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(Hasty(host))
        slow = [f"slow{n}" for n in range(12)]
        slow_down(application, application.users, "insert", SLOW_USERS, 1.5)
        monkeypatch.setattr(row_limits, "SEARCH_S", 0.3)
        await copy.take(created(*slow[:6], *OTHERS, *slow[6:]))
        await check_done(host)
        reasons = {owed.reason for owed in await find_owed(host)}
        assert "other rows that were to be written with it are locked or take too long" in reasons
        assert await retry_unsettled(copy.host, application.mappings, OWED) > 0

        async def are_others_written() -> bool:
            await retry_unsettled(copy.host, application.mappings, OWED)
            names = {name for (name,) in application.rows(application.users, "logto_user_id")}
            return names.issuperset(OTHERS)

        await eventually(are_others_written)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_after_a_slow_row_the_next_one_takes_less(kind: StoreKind, tmp_path: Path) -> None:
    """Where one row takes long, such as without an index, others do."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(Hasty(host))
        slow_down(application, application.users, "insert", SLOW_USERS, 1.5)
        await copy.take(created("slow1"))
        await copy.take(created("slow2"))
        await copy.take(created(*OTHERS))
        assert {owed.reason for owed in await find_owed(host)} == {
            table_writer.WRITING.format("1s"),
            table_writer.WRITING.format(f"{SHORT_MS}ms"),
        }
        assert len(application.rows(application.users, "id")) == len(OTHERS)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_rows_that_take_long_together_hold_up_only_one_transaction(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no statement takes too long, but all of them do."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(Hasty(host))
        slow_down(application, application.users, "insert", SLOW_USERS, 0.1)
        await copy.take(created(*(f"slow{n}" for n in range(8))))
        assert len(application.rows(application.users, "id")) == 8
        monkeypatch.setattr(row_limits, "SEARCH_S", 0.3)
        copy = Copy(Hasty(host))  # whose worker hasn't learnt that few fit into a transaction
        await copy.take(created(*(f"slow{n}" for n in range(8, 50))))
        await check_done(host)
        counts = await counts_of(host, application.users)
        assert 0 < counts.owed < 42

        async def are_all_written() -> bool:
            await retry_unsettled(copy.host, application.mappings, OWED)
            return len(application.rows(application.users, "id")) == 50

        await eventually(are_all_written)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_row_that_is_slow_even_alone_is_tried_again_later(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a pause that grows. What was tried least comes first."""
    for module in (apply, row_limits):
        monkeypatch.setattr(module, "ONE_RECORD_S", 0.3)

    async def live(application: Application) -> None:
        host = await application.map()
        hasty = Hasty(host)
        slow_down(application, application.users, "insert", SLOW_USERS, 1.5)
        await Copy(hasty).take(created("slow1", *OTHERS))
        slow = SlowRows(hasty, application.mappings)
        for _ in range(2):
            await slow.write_due()
        assert hasty.alone == 1
        [owed] = await find_owed(host)
        assert owed.reason == table_writer.WRITING.format("300ms")
        monkeypatch.setattr(apply, "FIRST_PAUSE_S", 0.0)
        slow = SlowRows(hasty, application.mappings)
        slow_down(application, application.users, "insert", "false", 0)
        await slow.write_due()
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_deliveries_go_on_while_a_slow_row_is_written(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its own record is locked; other owed rows are written, too."""
    monkeypatch.setattr(apply, "LOOK_S", 0.05)

    async def live(application: Application) -> None:
        host = await application.map()
        hasty = Hasty(host)
        copy = Copy(hasty)
        await copy.take(created("slow"))
        await application.apply_all()
        slow_down(application, application.users, "update", SLOW_USERS, 4.0)
        await copy.take(renamed("slow"))
        task = asyncio.create_task(keep_applied(hasty, application.mappings))

        async def is_tried() -> bool:
            return hasty.alone == 1

        await eventually(is_tried)
        await copy.take(created(*OTHERS))
        host.project = None
        await copy.take(renamed("u1"))
        host.project = application.mappings.write

        async def is_one_owed() -> bool:
            return (await counts_of(host, application.users)).owed == 1

        await eventually(is_one_owed)
        rows = dict(application.rows(application.users, "logto_user_id", "email"))
        assert (rows["slow"], rows["u1"], len(rows)) == ("slow@x", "u1@y", 21)

        async def is_written() -> bool:
            rows = application.rows(application.users, "logto_user_id", "email")
            return ("slow", "slow@y") in rows

        await eventually(is_written)
        task.cancel()
        await asyncio.wait({task})
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_no_driver_ends_a_slow_transaction(driver: str) -> None:
    """asyncpg would, after the time that other statements may take."""

    async def main() -> None:
        url = postgres.server_url().set(drivername=f"postgresql+{driver}")
        engine, unlimited = (
            make_postgres_engine(url, limit=StatementLimit(seconds), poolclass=sa.NullPool)
            for seconds in (0.3, None)
        )
        host = Postgres(engine, None, migrator=unlimited).host
        sleep = sa.select(sa.func.pg_sleep(1))
        assert len(await host.run_slow(lambda store: store.execute(sleep).all(), 5.0)) == 1
        with pytest.raises(StoreUnavailable):
            await host.run_slow(lambda store: store.execute(sleep).all(), 0.2)
        await host.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", SERVERS)
def test_a_locked_table_is_tried_few_times(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the application builds an index, a batch isn't searched for the row that is locked, and
    the next batches don't wait for the usual limit at all."""
    monkeypatch.setattr(row_limits, "SHORT_LOCK_MS", 20)
    monkeypatch.setattr(row_limits, "SEARCH_S", 60.0)
    tried: list[int] = []
    write_all = table_writer.TableWriter._write_all

    def count(self: table_writer.TableWriter, plans: Any) -> None:
        tried.append(len(plans))
        write_all(self, plans)

    monkeypatch.setattr(table_writer.TableWriter, "_write_all", count)

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(Hasty(host))
        lock = sa.text(f"LOCK TABLE {application.users} IN SHARE MODE")
        with application.engine.begin() as connection:
            connection.execute(lock)
            for start in (0, 10):
                tried.clear()
                await copy.take(created(*OTHERS[start : start + 10]))
                await check_done(host)
                assert len(tried) <= row_limits.MOST_FAILURES
                assert start == 0 or max(tried) < 10
        assert sum(rows.count for rows in await find_owed(host)) == 20
        await retry_unsettled(host, application.mappings, OWED)
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_pages_of_slow_rows_are_small(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deliveries about a page's records wait for it, so its size depends on the time it takes."""
    monkeypatch.setattr(mapping, "PAGE_S", 0.05)

    async def live(application: Application) -> None:
        host = await application.map()
        project, host.project = host.project, None
        await Copy(host).take(created(*OTHERS))
        host.project = project
        slow_down(application, application.users, "insert", "true", 0.02)
        await application.apply_all()
        await retry_unsettled(host, application.mappings, OWED)
        assert application.mappings.page_sizer.weight <= 4
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.postgres
def test_reading_that_takes_a_while_is_no_slow_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a scan for all rows of a batch, where the key has no index. Row by row, it would take
    many times as long, also while others are written with care."""
    monkeypatch.setattr(row_limits, "SHORT_STATEMENT_MS", 100)

    async def live(application: Application) -> None:
        host = await application.map()
        await Copy(host).take(created(*OTHERS))
        with application.engine.begin() as connection:
            for statement in (
                "ALTER TABLE app.users RENAME TO all_users",
                "CREATE VIEW app.users AS SELECT all_users.* FROM app.all_users,"
                " (SELECT pg_sleep(0.3) OFFSET 0) AS slowly",
                "CREATE RULE changes AS ON UPDATE TO app.users DO INSTEAD UPDATE app.all_users"
                " SET email = NEW.email WHERE id = OLD.id",
            ):
                connection.execute(sa.text(statement))
        application.mappings.caution.renew()
        await Copy(host).take(renamed(*OTHERS))
        reasons = {str(owed.reason) for owed in await find_owed(host)}
        assert not any("reading the table" in reason for reason in reasons)

    Application.run("postgres-thread", tmp_path, live)


@pytest.mark.parametrize("locks", [False, True])
@pytest.mark.parametrize("kind", SERVERS)
def test_slow_or_locked_deletions_are_allowed_once(
    kind: StoreKind, locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are done one by one, however long after the command that allows them."""
    monkeypatch.setattr(apply, "FIRST_PAUSE_S", 0)
    names = [f"u{n}" for n in range(35)]

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        await copy.take(created(*names))
        await copy.take(do("delete", *names))
        held = (await counts_of(host, application.users)).held
        assert held == len(application.rows(application.users, "id")) > 10
        if locks:
            with application.engine.begin() as connection:
                connection.execute(sa.select(application.users).with_for_update())
                await apply_all(host, application.mappings, allow_deletes=True)
        else:
            slow_down(application, application.users, "delete", "true", by_s=0.3)
            application.mappings.caution.renew()
            await apply_all(host, application.mappings, allow_deletes=True)
        counts = await counts_of(host, application.users)
        assert counts.held == 0
        assert counts.owed > 10
        await retry_unsettled(host, application.mappings, OWED)
        await SlowRows(host, application.mappings).write_due()
        assert application.rows(application.users, "id") == []
        await application.check()

    Application.run(kind, tmp_path, live)
