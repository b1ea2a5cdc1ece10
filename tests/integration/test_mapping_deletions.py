"""A row is deleted only for a good reason, and never too many at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.apply import batch
from logto_webhooks.database.mapped_rows import State
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.schema import mapped_rows
from logto_webhooks.database.store import Store
from logto_webhooks.instrumentation import Refetched, TelemetryEvent
from logto_webhooks.mapping import pair_writer, row_limits
from logto_webhooks.mapping.apply import SlowRows, apply_all, retry_unsettled
from logto_webhooks.mapping.check import find_differences
from logto_webhooks.mapping.declare_pairs import declare_members
from logto_webhooks.mapping.tally import AppliedMapping
from logto_webhooks.reconcile.refetch import Refetcher
from logto_webhooks.records.record import Absent, ApiRead, Change, Key, membership
from logto_webhooks.testing import FrozenClock, make
from logto_webhooks.testing.fake import FakeLogto
from tests.integration.test_mapping_slow_rows import slow_down
from tests.integration.test_refetch import client
from tests.support import own_tables
from tests.support.mapped_application import KINDS, Application, counts_of
from tests.support.stores import Copy, StoreKind

MINUTE = 60_000
NOW = time.time_ns() // 1_000_000 - 10 * MINUTE


def created(name: str, at: int = 1_000) -> bytes:
    return make.user_created(id=name, email=f"{name}@x", at=at).body


def deleted(name: str, at: int = 2_000) -> bytes:
    return make.user_deleted(id=name, at=at).body


def founded(team: str) -> bytes:
    return make.event("Organization.Created", id=team, name=team, at=1_000).body


def joined(team: str, users: Iterable[str]) -> bytes:
    fields: dict[str, Any] = {"organizationId": team, "addedUserIds": list(users), "at": 1_500}
    return make.event("Organization.Membership.Updated", **fields).body


def names(count: int) -> list[str]:
    return [f"u{n:04}" for n in range(count)]


async def read(host: HandlerRunner, *changes: Change) -> None:
    """Apply answers of Logto's API."""
    await host.run(partial(batch.apply_reads, changes=changes, source="reconcile"))


def gone(at: int, *users: str) -> list[Change]:
    return [Absent(Key("user", user), at, at) for user in users]


async def states_of(host: HandlerRunner, table: sa.Table) -> dict[State, int]:
    counts = await counts_of(host, table)
    states: tuple[State, ...] = ("ok", "waiting", "conflict", "owed", "held")
    return {state: count for state in states if (count := getattr(counts, state))}


async def apply_twice(application: Application, **options: Any) -> list[AppliedMapping]:
    """As a rehearsal and for real, which count the same."""
    rehearsed = await apply_all(application.host, application.mappings, dry_run=True, **options)
    applied = await apply_all(application.host, application.mappings, **options)
    assert rehearsed == applied
    return applied


@pytest.mark.parametrize("when_deleted", ["delete", "unlink"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_answers_a_minute_apart_delete_a_row(
    kind: StoreKind, when_deleted: str, tmp_path: Path
) -> None:
    """One doesn't, nor do two within a minute. What Logto shows meanwhile starts anew."""

    async def live(application: Application) -> None:
        host = await application.map(when_deleted=when_deleted)
        own = application.users
        await Copy(host).take([created("ana")])
        linked = [("ana",)]
        for at in (5_000, 5_000 + MINUTE - 1):
            await read(host, *gone(at, "ana"))
            assert application.rows(own, "logto_user_id") == linked
            assert await states_of(host, own) == {"waiting": 1}
        back = ApiRead(Key("user", "ana"), {"own": {"primaryEmail": "ana@x"}}, 70_000, 70_000)
        await read(host, back)
        assert await states_of(host, own) == {"ok": 1}
        await read(host, *gone(80_000, "ana"))
        await retry_unsettled(host, application.mappings)
        assert application.rows(own, "logto_user_id") == linked
        await read(host, *gone(80_000 + MINUTE, "ana"))
        assert application.rows(own, "logto_user_id") == ([(None,)] * (when_deleted == "unlink"))
        assert await states_of(host, own) == {"ok": 1}

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_a_deleted_user_are_set_at_once(kind: StoreKind, tmp_path: Path) -> None:
    """They change back if Logto shows the user again, so there is nothing to confirm."""

    async def live(application: Application) -> None:
        own = application.users
        host = await application.map(when_deleted={own.c.active: False})
        await Copy(host).take([created(name) for name in names(30)])
        await read(host, *gone(5_000, *names(30)))
        assert application.rows(own, "active") == [(False,)] * 30
        back = [ApiRead(Key("user", n), {"own": {}}, 70_000, 70_000) for n in names(30)]
        await read(host, *back)
        assert application.rows(own, "active") == [(True,)] * 30

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_freed", [False, True])
def test_an_email_of_a_deleted_user_is_free_if_it_is_set_to_null(
    is_freed: bool, kind: StoreKind, tmp_path: Path
) -> None:
    """Otherwise the row of the next user who has it is a conflict."""

    async def live(application: Application) -> None:
        own = application.users
        freed: dict[Any, Any] = {own.c.email: None} if is_freed else {}
        host = await application.map(when_deleted={own.c.active: False, **freed})
        copy = Copy(host)
        for delivery in (created("ana"), deleted("ana")):
            await copy.take([delivery])
        await copy.take([make.user_created(id="ann", email="ana@x", at=3_000).body])
        expected = {"ok": 2} if is_freed else {"ok": 1, "conflict": 1}
        assert await states_of(host, own) == expected
        rows = application.rows(own, "logto_user_id", "email", "active")
        assert rows == (
            [("ana", None, False), ("ann", "ana@x", True)]
            if is_freed
            else [("ana", "ana@x", False)]
        )

    Application.run(kind, tmp_path, live)


def changes(ana: str, bo: str) -> dict[str, bytes]:
    """Ana's email changes, she is deleted, and Bo gets her former email."""
    return {
        "change": make.user_data_updated(id=ana, email=f"new {ana}@x", at=2_000).body,
        "delete": make.user_deleted(id=ana, at=3_000).body,
        "other": make.user_created(id=bo, email=f"{ana}@x", at=4_000).body,
    }


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("when_deleted", [{"active": False}, "keep", "unlink"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_row_of_a_deleted_user_has_the_last_values(
    kind: StoreKind, when_deleted: Any, together: bool, tmp_path: Path
) -> None:
    """In any order, so that an email that the user gave up is free. A row that was unlinked before
    it is known isn't written any more."""

    async def live(application: Application) -> None:
        copy = Copy(await application.map(when_deleted=when_deleted))
        expected: list[tuple[str, bool]] = []
        for n, order in enumerate(itertools.permutations(("change", "delete", "other"))):
            await copy.take([created(f"ana{n}")])
            told = changes(f"ana{n}", f"bo{n}")
            bodies = [told[name] for name in order]
            for some in [bodies] if together else [[body] for body in bodies]:
                await copy.take(some)
            is_active = when_deleted != {"active": False}
            expected.append((f"ana{n}@x", True))
            is_late = order.index("delete") < order.index("change")
            if when_deleted != "unlink" or together or not is_late:
                expected.append((f"new ana{n}@x", is_active))
        await retry_unsettled(application.host, application.mappings)
        assert application.rows(application.users, "email", "active") == sorted(expected)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("is_known", [True, False], ids=["another user's", "the application's own"])
@pytest.mark.parametrize("kind", KINDS)
def test_last_values_that_are_refused_hold_nothing_up(
    kind: StoreKind, is_known: bool, tmp_path: Path
) -> None:
    """Somebody else has the email by now, so only what `when_deleted` says is written."""

    async def live(application: Application) -> None:
        copy = Copy(await application.map(when_deleted={"active": False}))
        await copy.take([created("ana")])
        if is_known:
            await copy.take([make.user_created(id="bo", email="new ana@x", at=1_000).body])
        else:
            own = {"email": "new ana@x", "plan": "paid", "active": True}
            with application.engine.begin() as connection:
                connection.execute(sa.insert(application.users).values(own))
        told = changes("ana", "bo")
        await copy.take([told["change"], told["delete"]])
        rows = application.rows(application.users, "email", "active")
        assert rows == [("ana@x", False), ("new ana@x", True)]
        assert "conflict" not in await states_of(application.host, application.users)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_fills_no_row_of_a_deleted_user(kind: StoreKind, tmp_path: Path) -> None:
    """The application may have emptied it since."""

    async def live(application: Application) -> None:
        copy = Copy(await application.map(when_deleted={"active": False}))
        await copy.take([created("ana")])
        await copy.take([deleted("ana")])
        with application.engine.begin() as connection:
            connection.execute(sa.update(application.users).values(email=None))
        await application.apply_again()
        assert application.rows(application.users, "email", "active") == [(None, False)]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_dump_empties_no_table(kind: StoreKind, tmp_path: Path) -> None:
    """Logto lacks 30 of 40 users, and says so again: none goes until that is allowed. Then they go
    with their memberships, and the next deletion is as usual."""

    async def live(application: Application) -> None:
        host = await application.map()
        own, members = application.users, application.members
        users = names(40)
        await Copy(host).take([founded("acme"), *map(created, users), joined("acme", users)])
        for n, at in enumerate((5_000, 5_000 + MINUTE)):
            for start in range(0, 30, 10):
                await read(host, *gone(at + start, *users[start : start + 10]))
            held = {"held": 30} if n else {"waiting": 30}
            assert await states_of(host, own) == {"ok": 10} | held
            assert await states_of(host, members) == {"ok": 10} | held
        await retry_unsettled(host, application.mappings)
        for table in (own, members):
            assert len(application.rows(table, "id")) == 40
        by_mapping = {each.mapping: each for each in await apply_twice(application)}
        applied = by_mapping[own.fullname]
        assert (applied.records, applied.held, applied.deleted, applied.refused) == (40, 30, 0, 0)
        status = await host.read(lambda store: store.status())
        assert {each.mapping: each.held for each in status.mappings}[own.fullname] == 30
        await Copy(host).take([deleted(users[-1], at=90_000)])
        assert await states_of(host, own) == {"ok": 9, "held": 31}
        for table in (own, members):
            assert len(application.rows(table, "id")) == 40
        by_mapping = {
            each.mapping: each for each in await apply_twice(application, allow_deletes=True)
        }
        applied = by_mapping[own.fullname]
        assert (applied.held, applied.deleted, applied.refused) == (0, 31, 0)
        assert by_mapping[members.fullname].deleted == 31
        await application.check()
        await Copy(host).take([deleted(users[-2], at=95_000)])
        await application.check()
        assert len(application.rows(own, "id")) == 8

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("when_deleted", ["keep", {"active": False}, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_dump_empties_no_table_of_members(
    kind: StoreKind, when_deleted: Any, tmp_path: Path
) -> None:
    """Also if the rows of deleted users stay, or users aren't mapped: then nobody else counts."""

    async def live(application: Application) -> None:
        if when_deleted is None:
            seats = sa.Table(
                "seats",
                application.metadata,
                sa.Column("team", sa.Text, primary_key=True),
                sa.Column("person", sa.Text, primary_key=True),
            )
            seats.create(application.engine)
            await application.map_tables(declare_members(seats, organization="team", user="person"))
        else:
            seats = application.members
            await application.map(when_deleted=when_deleted)
        host, users = application.host, names(40)
        await Copy(host).take([founded("acme"), *map(created, users), joined("acme", users)])
        await apply_twice(application)
        for at in (5_000, 5_000 + MINUTE):
            await read(host, *gone(at, *users[:30]))
        assert await states_of(host, seats) == {"ok": 10, "held": 30}
        assert len(application.rows(seats, *seats.primary_key.columns.keys())) == 40
        await Copy(host).take([deleted(users[-1], at=90_000)])
        assert len(application.rows(seats, *seats.primary_key.columns.keys())) == 39
        await apply_twice(application, allow_deletes=True)
        assert len(application.rows(seats, *seats.primary_key.columns.keys())) == 9
        assert set(await states_of(host, seats)) == {"ok"}

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_those_who_come_back_are_held_no_longer(kind: StoreKind, tmp_path: Path) -> None:
    """The others still are, however few."""

    async def live(application: Application) -> None:
        host = await application.map()
        await Copy(host).take(map(created, names(40)))
        await Copy(host).take(map(deleted, names(30)))
        back = [
            ApiRead(Key("user", n), {"own": {"primaryEmail": f"{n}@x"}}, 70_000, 70_000)
            for n in names(29)
        ]
        await read(host, *back)
        assert await states_of(host, application.users) == {"ok": 39, "held": 1}
        await retry_unsettled(host, application.mappings)
        await apply_twice(application)
        assert len(application.rows(application.users, "id")) == 40
        found = [
            (each.problem, each.logto_id)
            async for page in find_differences(host, application.mappings)
            for each in page
        ]
        assert found == [("held", "u0029")]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize(("rows", "most"), [(30, 20), (1_000, 50)])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_rows_or_five_percent_go_at_once(
    kind: StoreKind, rows: int, most: int, tmp_path: Path
) -> None:
    """In one batch or one after the other: what was deleted within the hour counts."""

    async def live(application: Application) -> None:
        host = await application.map()
        own = application.users
        copy = Copy(host)
        await copy.take(map(created, names(rows)))
        await copy.take([deleted(name) for name in names(most - 5)])
        assert len(application.rows(own, "id")) == rows - most + 5
        for name in names(most + 2)[most - 5 :]:
            await copy.take([deleted(name)])
        assert len(application.rows(own, "id")) == rows - most
        assert (await counts_of(host, own)).held == 2
        await host.run(partial(forget_hour, name=own.fullname))
        await copy.take([deleted(names(rows)[-1])])
        assert len(application.rows(own, "id")) == rows - most - 1

    Application.run(kind, tmp_path, live)


def forget_hour(store: Store, name: str) -> None:
    """An hour passes."""
    past = sa.update(mapped_rows).where(mapped_rows.c.mapping == name)
    store.connection.execute(past.values(deleted_at=mapped_rows.c.deleted_at - 3_600_001))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_organization_may_go(kind: StoreKind, tmp_path: Path) -> None:
    """A delivery about it ends all of its memberships. An answer of Logto that lists no members
    doesn't."""

    async def live(application: Application) -> None:
        host = await application.map()
        members = application.members
        users = names(30)
        teams = [founded("acme"), founded("best")]
        both = [joined("acme", users), joined("best", users)]
        await Copy(host).take([*teams, *map(created, users), *both])
        dissolved = make.event("Organization.Deleted", id="acme", at=2_000).body
        await Copy(host).take([dissolved])
        await application.check()
        assert len(application.rows(members, "id")) == 30
        unlisted = [ApiRead(membership("best", u), {"present": False}, 9_000, 9_000) for u in users]
        await read(host, *unlisted[:10])
        assert len(application.rows(members, "id")) == 20
        await read(host, *unlisted[10:])
        assert len(application.rows(members, "id")) == 20
        assert (await states_of(host, members))["held"] == 20
        await retry_unsettled(host, application.mappings)
        applied = {each.mapping: each for each in await apply_twice(application)}
        assert applied[members.fullname].held == 20
        assert len(application.rows(members, "id")) == 20
        allowed = await apply_twice(application, allow_deletes=True)
        applied = {each.mapping: each for each in allowed}
        counts = applied[members.fullname]
        assert (counts.records, counts.held, counts.deleted) == (0, 0, 20)
        assert application.rows(members, "id") == []
        assert set(await states_of(host, members)) == {"ok"}

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_logto_is_asked_a_second_time(kind: StoreKind, tmp_path: Path) -> None:
    """A minute after it answered that it has no such user."""

    async def live(application: Application) -> None:
        host = await application.map()
        async with FakeLogto() as logto:
            ids = [logto.create_user(primaryEmail=f"{n}@x")["id"] for n in range(2)]
            await Copy(host).take([created(name, at=NOW) for name in ids])
            logto.delete_user(ids[0])
            api = client(logto, FrozenClock())
            reports: list[TelemetryEvent] = []
            refetcher = Refetcher(api, host, reports.append)
            earlier = NOW + MINUTE
            await read(host, *gone(earlier, *ids))
            assert await refetcher.step() == 0
            assert await states_of(host, application.users) == {"waiting": 2}
            passed = mapped_rows.c.changed_at - MINUTE
            update = sa.update(mapped_rows).values(changed_at=passed)
            await host.run(lambda store: store.connection.execute(update).close())
            assert await refetcher.step() == 2
            assert [type(report) for report in reports] == [Refetched, Refetched]
            await api.close()
        assert application.rows(application.users, "logto_user_id") == [(ids[1],)]
        assert await states_of(host, application.users) == {"ok": 2}

    Application.run(kind, tmp_path, live)


def test_a_kept_unique_value_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When it is registered: an email that is used again stays a conflict."""
    with own_tables.Application("sqlite", tmp_path).opened() as app:
        app.map_users(when_deleted="keep")
    [record] = caplog.records
    assert 'own_users has when_deleted="keep", and email is unique' in record.getMessage()
    caplog.clear()
    with own_tables.Application("sqlite", tmp_path).opened() as app:
        app.map_users(when_deleted="keep", columns={"name": "name"}, create=False)
        app.map_teams()
    assert caplog.records == []


@pytest.mark.parametrize("kind", KINDS)
def test_reconcile_asks_a_second_time_too(kind: StoreKind, tmp_path: Path) -> None:
    """About whom only one answer says that they are gone."""

    async def live(application: Application) -> None:
        host = await application.map()
        await Copy(host).take([created("ana"), created("bo"), deleted("bo")])
        await read(host, *gone(5_000, "ana"))

        def list_unread(store: Store) -> list[Key]:
            return store.unread_keys("user", 10**13)[0]

        assert await host.read(list_unread) == [Key("user", "ana")]
        await read(host, *gone(5_000 + MINUTE, "ana"))
        assert await host.read(list_unread) == []

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_very_many_members_go_in_several_transactions(
    kind: StoreKind, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The team's row waits for the last of them. They come in several, too."""
    monkeypatch.setattr(pair_writer, "MOST_WAITING", 3)

    async def live(application: Application) -> None:
        host = await application.map()
        users, members = names(10), application.members
        with application.engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {application.teams} RENAME TO elsewhere"))
        await Copy(host).take([founded("acme"), *map(created, users), joined("acme", users)])
        with application.engine.begin() as connection:
            prefix = "" if kind == "sqlite" else "app."
            connection.execute(sa.text(f"ALTER TABLE {prefix}elsewhere RENAME TO teams"))
        await retry_unsettled(host, application.mappings)
        await retry_unsettled(host, application.mappings)
        assert len(application.rows(members, "id")) == 10
        await read(host, Absent(Key("organization", "acme"), 5_000, 5_000))
        assert len(application.rows(members, "id")) == 10
        await read(host, Absent(Key("organization", "acme"), 5_000 + MINUTE, 5_000 + MINUTE))
        assert len(application.rows(members, "id")) == 7
        await retry_unsettled(host, application.mappings)
        await retry_unsettled(host, application.mappings)
        assert application.rows(members, "id") == application.rows(application.teams, "id") == []
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.postgres
def test_slow_deletions_count_when_they_are_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of their memberships go at once, so they aren't held later: the next ones are."""
    monkeypatch.setattr(row_limits, "SHORT_STATEMENT_MS", 60)

    async def live(application: Application) -> None:
        host = await application.map()
        names = [f"u{n:02}" for n in range(30)]
        joined = make.organization_membership_updated(id="acme", addedUserIds=names, at=1_500).body
        team = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
        await Copy(host).take([*map(created, names), team, joined])
        slow_down(application, application.users, "delete", "true", 0.1)
        for name in names:
            application.mappings.caution.renew()
            await Copy(host).take([make.user_deleted(id=name, at=3_000).body])
        await SlowRows(host, application.mappings).write_due()
        users = application.rows(application.users, "id")
        assert len(users) == 10
        assert application.rows(application.members, "user_id") == users

    Application.run("postgres-thread", tmp_path, live)
