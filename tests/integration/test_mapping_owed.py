"""What is owed is written in the end, whatever other transactions and processes do meanwhile."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.database.postgres import Postgres
from logto_webhooks.mapping import Mappings, apply
from logto_webhooks.mapping.apply import OWED, SlowRows, apply_all, apply_step, retry_unsettled
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.records.record import Absent, ApiRead, Key, membership
from logto_webhooks.testing import make
from tests.integration.test_mapping_deletions import (
    created,
    deleted,
    founded,
    joined,
    names,
    read,
    states_of,
)
from tests.support import postgres
from tests.support.mapped_application import KINDS, PLAN, Application
from tests.support.stores import Copy, StoreKind, WrappedRunner

SERVERS = [kind for kind in KINDS if kind != "sqlite"]


def renamed(email: str, at: int) -> bytes:
    return make.user_data_updated(id="ana", email=email, at=at, updatedAt=at).body


def left(team: str, user: str) -> bytes:
    fields: dict[str, Any] = {"organizationId": team, "removedUserIds": [user], "at": 2_500}
    return make.event("Organization.Membership.Updated", **fields).body


@contextmanager
def receiving(application: Application, pattern: str, body: bytes) -> Iterator[None]:
    """Another process applies a delivery right before the first statement that has the pattern."""
    done = False

    def receive() -> None:
        url = postgres.server_url().set(drivername="postgresql+psycopg")
        engine = sa.create_engine(url)
        host = Postgres(engine, postgres.schema()).host
        host.project = application.mappings.write
        asyncio.run(Copy(host).take([body]))
        asyncio.run(host.close())
        engine.dispose()

    def look(_: Any, __: Any, statement: str, *more: Any) -> None:
        nonlocal done
        if done or not re.search(pattern, statement, re.DOTALL):
            return
        done = True
        thread = Thread(target=receive)
        thread.start()
        thread.join(20)

    sa.event.listen(sa.Engine, "before_cursor_execute", look)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", look)
    assert done


@pytest.mark.postgres
def test_a_user_who_is_written_with_a_membership_is_locked(tmp_path: Path) -> None:
    """Such as one whose row couldn't be deleted before. What another transaction writes meanwhile
    isn't overwritten."""

    async def live(application: Application) -> None:
        host = await application.map()
        await application.apply_all()
        await Copy(host).take([created("ana"), founded("acme"), joined("acme", ["ana"])])
        host.project = None
        await Copy(host).take([renamed("v1@x", 2_000), left("acme", "ana")])
        host.project = application.mappings.write
        again = partial(
            apply._write_again, mappings=application.mappings, keys={membership("acme", "ana")}
        )
        locks_own = rf"FROM {application.users}.*FOR NO KEY UPDATE"
        with receiving(application, locks_own, renamed("v2@x", 3_000)):
            await host.run_large(again)
            # If the user is locked, that comes now.
            await retry_unsettled(host, application.mappings, OWED)
        await retry_unsettled(host, application.mappings, OWED)
        await application.check()

    Application.run("postgres-thread", tmp_path, live)


@pytest.mark.postgres
def test_what_is_owed_meanwhile_is_not_forgotten(tmp_path: Path) -> None:
    """An excluded member's row is owed because the user is no longer excluded."""

    async def live(application: Application) -> None:
        host = await application.map(where=lambda user: user.email != "excluded@x")
        await application.apply_all()
        excluded = make.user_created(id="ana", email="excluded@x", at=1_000).body
        await Copy(host).take([excluded, founded("acme")])
        host.project = None
        await Copy(host).take([joined("acme", ["ana"])])
        host.project = application.mappings.write
        again = partial(
            apply._write_again, mappings=application.mappings, keys={membership("acme", "ana")}
        )
        with receiving(application, "DELETE FROM .*logto_mapped_rows", renamed("in@x", 3_000)):
            await host.run_large(again)
        await retry_unsettled(host, application.mappings, OWED)
        assert len(application.rows(application.members, "id")) == 1
        await application.check()

    Application.run("postgres-thread", tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_table_that_cannot_be_read_fails_no_delivery(kind: StoreKind, tmp_path: Path) -> None:
    """As with a policy that raises. The memberships of a deleted user wait for the user's row."""

    async def live(application: Application) -> None:
        host = await application.map()
        await application.apply_all()
        copy = Copy(host)
        await copy.take([created("ana"), founded("acme"), joined("acme", ["ana"])])
        with application.engine.begin() as connection:
            for statement in (
                "ALTER TABLE app.users RENAME TO real_users",
                "CREATE FUNCTION app.is_tenant() RETURNS boolean LANGUAGE plpgsql STABLE AS"
                " $$ BEGIN RETURN ''::uuid IS NULL; END $$",
                "CREATE VIEW app.users AS SELECT * FROM app.real_users WHERE app.is_tenant()",
            ):
                connection.execute(sa.text(statement))
        await copy.take([deleted("ana")])
        status = await host.read(lambda store: store.status())
        assert (status.deliveries["pending"], status.deliveries["dead"]) == (0, 0)
        assert len(application.rows(application.members, "id")) == 1
        with application.engine.begin() as connection:
            connection.execute(sa.text("DROP VIEW app.users"))
            connection.execute(sa.text("ALTER TABLE app.real_users RENAME TO users"))
        await retry_unsettled(host, application.mappings)
        assert application.rows(application.members, "id") == []
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_held_deletion_stays_held_while_its_row_is_locked(
    kind: StoreKind, tmp_path: Path
) -> None:
    async def live(application: Application) -> None:
        host = await application.map()
        await application.apply_all()
        await Copy(host).take(map(created, names(40)))
        await Copy(host).take(map(deleted, names(30)))
        back = [
            ApiRead(Key("user", name), {"own": {"primaryEmail": f"{name}@x"}}, 70_000, 70_000)
            for name in names(29)
        ]
        await read(host, *back)
        assert (await states_of(host, application.users))["held"] == 1
        own = application.users
        with application.engine.begin() as connection:
            is_it = own.c.logto_user_id == "u0029"
            connection.execute(sa.select(own).where(is_it).with_for_update())
            await apply_all(host, application.mappings)
        assert (await states_of(host, own))["owed"] == 1
        await SlowRows(host, application.mappings).write_due()  # it is tried alone
        assert await states_of(host, own) == {"ok": 39, "held": 1}
        host.project = None  # a process without the mappings
        await Copy(host).take([created("u0029", 1_500)])
        host.project = application.mappings.write
        await retry_unsettled(host, application.mappings, OWED)
        assert (await states_of(host, own))["held"] == 1

    Application.run(kind, tmp_path, live)


def test_what_is_tried_again_is_not_owed_by_others(tmp_path: Path) -> None:
    """Two processes with different mappings don't give each other work for ever."""

    async def live(application: Application) -> None:
        host = application.host
        mine, theirs = Mappings(), Mappings()
        own: dict[str, Any] = {"when_deleted": "keep"}
        users = own | {"columns": {"email": "email"}, "create_defaults": PLAN}
        mine.add(declare_entities("user", application.users, key="logto_user_id", **users))
        teams = own | {"columns": {"name": "email"}}
        theirs.add(declare_entities("user", application.teams, key="logto_id", **teams))
        for mappings in (mine, theirs):
            host.project = mappings.write
            await host.run(lambda store: store.mappings.register(mappings.registered))  # noqa: B023
            while await apply_step(host, mappings) is not None:
                pass
        host.project = mine.write
        await Copy(host).take([created("ana")])
        tried = []
        for mappings in (theirs, mine, theirs, mine):
            host.project = mappings.write
            tried.append(await retry_unsettled(host, mappings, OWED))
        assert tried[2:] == [0, 0]

    Application.run("sqlite", tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_user_whom_nobody_knows_is_owed_once(kind: StoreKind, tmp_path: Path) -> None:
    async def live(application: Application) -> None:
        host = await application.map()
        await application.apply_all()
        host.project = None
        await Copy(host).take([founded("acme"), joined("acme", ["ana"])])
        user = Key("user", "ana")
        await read(host, Absent(user, 70_000, 70_000), Absent(user, 170_000, 170_000))
        host.project = application.mappings.write
        assert await retry_unsettled(host, application.mappings, OWED) > 0
        assert await retry_unsettled(host, application.mappings, OWED) == 0

    Application.run(kind, tmp_path, live)


class Slow(WrappedRunner):
    """Counts what is written alone, and takes as long for it as its pause."""

    alone = 0

    async def run_slow(self, work: Any, statement_s: float) -> Any:
        self.alone += 1
        await asyncio.sleep(0.05)
        return await self._host.run(lambda store: False)


def test_each_slow_row_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stay slow don't keep `mapping apply` from ending."""
    monkeypatch.setattr(apply, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(apply, "LONGEST_PAUSE_S", 0.01)

    async def live(application: Application) -> None:
        host = await application.map()
        host.project = None
        await Copy(host).take(map(created, names(3)))
        slow = Slow(host)

        def delay(store: Any) -> None:
            store.connection.execute(
                sa.text("UPDATE logto_mapped_rows SET blocked_by = 'a transaction of its own'")
            )

        await host.run(delay)
        await asyncio.wait_for(SlowRows(slow, application.mappings).write_due(), 5)
        assert slow.alone == 3

    Application.run("sqlite", tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_was_refused_is_no_link(kind: StoreKind, tmp_path: Path) -> None:
    """The row stays free for the one whom it belongs to."""

    async def live(application: Application) -> None:
        own = application.users.c
        columns = {own.email: "email", own.first_name: "username"}
        host = await application.map(
            link=own.email, columns=columns, create_defaults=PLAN, when_deleted="keep"
        )
        await application.apply_all()
        free = PLAN | {"email": "ana@x"}
        with application.engine.begin() as connection:
            index = f"CREATE UNIQUE INDEX taken ON {application.users} (first_name)"
            connection.execute(sa.text(index))
            connection.execute(sa.insert(application.users).values(free))
            taken = PLAN | {"email": "other@x", "first_name": "taken"}
            connection.execute(sa.insert(application.users).values(taken))
        for body in (
            make.user_created(id="wrong", email="ana@x", username="taken", at=1_000).body,
            make.user_data_updated(
                id="wrong", email="changed@x", username="w", at=2_000, updatedAt=2_000
            ).body,
            make.user_created(id="ana", email="ana@x", username="ana", at=3_000).body,
        ):
            await Copy(host).take([body])
        assert await states_of(host, application.users) == {"ok": 2}
        assert ("ana", "ana@x") in application.rows(application.users, "logto_user_id", "email")
        assert len(application.rows(application.users, "id")) == 3

    Application.run(kind, tmp_path, live)


def test_a_new_row_that_is_not_found_again_is_undone(tmp_path: Path) -> None:
    """Such as with a trigger that changes its key. Otherwise each try would add a row."""

    async def live(application: Application) -> None:
        host = await application.map()
        await application.apply_all()
        with application.engine.begin() as connection:
            connection.execute(
                sa.text(
                    "CREATE TRIGGER renames AFTER INSERT ON users BEGIN UPDATE users"
                    " SET logto_user_id = 'x' || NEW.logto_user_id WHERE id = NEW.id; END"
                )
            )
        await Copy(host).take([created("ana")])
        await retry_unsettled(host, application.mappings)
        assert await states_of(host, application.users) == {"conflict": 1}
        assert application.rows(application.users, "id") == []

    Application.run("sqlite", tmp_path, live)
