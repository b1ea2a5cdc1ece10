"""What is in doubt is settled by asking Logto."""

from __future__ import annotations

import asyncio
import os
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from logto_webhooks.apply.batch import apply_reads
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.schema import members
from logto_webhooks.errors import LogtoApiError, LogtoUnreachable
from logto_webhooks.instrumentation import ApiUnavailable, TelemetryEvent
from logto_webhooks.logto.api_responses import Span
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.reconcile.fetch import Fetcher
from logto_webhooks.reconcile.refetch import AGAIN_S, Refetcher
from logto_webhooks.records.record import Key, membership
from logto_webhooks.samples import history
from logto_webhooks.samples.history import FinalState, Name, differences
from logto_webhooks.testing import FrozenClock, make
from logto_webhooks.testing.fake import FakeLogto
from tests.support import recorded
from tests.support.fake import Refusing, asking, serving
from tests.support.service import PATH, command
from tests.support.stores import STORES, Copy, StoreKind, delivery, keys_of, open_host
from tests.support.waiting import until

Json = dict[str, Any]
CHANGED = "Organization.Membership.Updated"
KINDS: tuple[StoreKind, ...] = ("sqlite", "asyncpg")
ORDERS = int(os.environ.get("LOGTO_WEBHOOKS_TEST_ASKED_ORDERS", "2"))


def client(logto: FakeLogto, clock: FrozenClock) -> ManagementClient:
    return ManagementClient(logto.url, logto.app_id, logto.app_secret, now=clock, budget=100_000)


async def settled(
    logto: FakeLogto, host: TransactionRunner, reports: list[TelemetryEvent] | None = None
) -> None:
    """Ask until nothing waits."""
    clock = FrozenClock()
    api = client(logto, clock)
    try:
        async with asyncio.timeout(30):
            await Refetcher(
                api, host, (lambda report: None) if reports is None else reports.append
            ).drain()
    finally:
        await api.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", history.NAMES)
@pytest.mark.parametrize("kind", STORES)
def test_with_the_api_a_history_equals_logto(name: Name, kind: StoreKind, tmp_path: Path) -> None:
    """In any order, with duplicates; nothing is left in doubt."""
    lived = history.load(name)
    bodies = [each.body for each in lived.deliveries]

    async def live(seed: int) -> None:
        rng = random.Random(seed)
        sent = bodies + rng.sample(bodies, len(bodies) // 10)
        rng.shuffle(sent)
        copy = Copy(open_host(kind, tmp_path))
        async with FakeLogto.from_history(name) as logto:
            half = rng.randrange(len(sent))
            await copy.take(sent[:half])
            await settled(logto, copy.host)
            await copy.take(sent[half:])
            await settled(logto, copy.host)
        known = await copy.known(keys_of(bodies))
        assert differences(lived.final, known.users, known.organizations, known.waiting) == []
        assert known.waiting == []
        await copy.host.close()

    for seed in range(ORDERS):
        asyncio.run(live(seed))


@pytest.mark.parametrize("file", sorted((recorded.FOLDER / "sequences").glob("*.json")), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_api_a_sequence_equals_logto(file: Path, kind: StoreKind, tmp_path: Path) -> None:
    """One user, changed eight times in parallel."""
    sequence = msgspec.json.decode(file.read_bytes(), type=recorded.Sequence)
    bodies = [each.body.encode() for each in sequence.deliveries]
    final = FinalState([dict(sequence.final_api_user)], [], [], [], {})

    async def live(seed: int) -> None:
        copy = Copy(open_host(kind, tmp_path))
        async with FakeLogto() as logto:
            logto.populate([dict(sequence.final_api_user)])
            await copy.take(random.Random(seed).sample(bodies, len(bodies)))
            await settled(logto, copy.host)
        known = await copy.known(keys_of(bodies))
        assert differences(final, known.users, known.organizations, known.waiting) == []
        await copy.host.close()

    for seed in range(ORDERS):
        asyncio.run(live(seed))


def test_a_membership_event_without_ids_is_asked_about(tmp_path: Path) -> None:
    """Its organization's members are listed: who is new comes in, who left goes."""

    async def live() -> None:
        copy = Copy(open_host("sqlite", tmp_path))
        async with FakeLogto() as logto:
            acme = logto.create_organization(name="Acme")["id"]
            users = [logto.create_user()["id"] for _ in range(120)]
            logto.add_members(acme, users)
            at = time.time_ns() // 1_000_000 - 60_000
            told = make.organization_membership_updated
            gone = told(id=acme, addedUserIds=["gone", users[0]], at=at + 1_000)
            untold = told(id=acme, addedUserIds=[], at=at + 2_000)
            made = make.organization_created(id=acme, at=at)
            await copy.take([made.body, gone.body, untold.body])
            await settled(logto, copy.host)
        [found] = await copy.host.read(lambda store: store.find("organization", acme, 1))
        assert found.memberships == sorted(users)
        assert await copy.host.read(lambda store: store.waiting(10)) == []
        await copy.host.close()

    asyncio.run(live())


def test_an_answer_that_the_database_refuses_harms_no_other(tmp_path: Path) -> None:
    """That user goes on waiting; the others are asked about and kept."""

    async def live() -> None:
        copy = Copy(open_host("sqlite", tmp_path))
        engine = sa.create_engine(f"sqlite:///{tmp_path / 'copy.db'}")
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE TRIGGER refuse BEFORE INSERT ON logto_users WHEN new.name = 'Mary' "
                "BEGIN SELECT RAISE(ABORT, 'no Mary'); END"
            )
        engine.dispose()
        reports: list[TelemetryEvent] = []
        async with FakeLogto() as logto:
            users = {name: logto.create_user(name=name)["id"] for name in ("Ana", "Mary", "Zoe")}
            acme = logto.create_organization(name="Acme")["id"]
            logto.add_members(acme, list(users.values()))
            told = make.organization_membership_updated(id=acme, addedUserIds=[*users.values()])
            await copy.take([told.body])
            api = client(logto, FrozenClock())
            await Refetcher(api, copy.host, reports.append).step()
            await api.close()
        found = await copy.host.read(lambda store: store.find("user", "", 9))
        assert {user.row["name"] for user in found} == {"Ana", "Zoe"}
        [refused] = [report for report in reports if isinstance(report, ApiUnavailable)]
        assert "SQLITE_CONSTRAINT_TRIGGER" in refused.problem
        assert "Mary" not in str(reports)
        await copy.host.close()

    asyncio.run(live())


def test_one_about_which_logto_is_silent_holds_back_no_other(tmp_path: Path) -> None:
    """A request takes up to two minutes until it is given up; or a list has 300,000 members."""

    async def live() -> None:
        copy = Copy(open_host("sqlite", tmp_path))
        async with FakeLogto() as logto, asking(logto, Refusing) as api:
            assert isinstance(api, Refusing)
            ana, bo, zoe = (logto.create_user(name=name)["id"] for name in ("Ana", "Bo", "Zoe"))
            acme = logto.create_organization(name="Acme")["id"]
            told = make.organization_membership_updated(id=acme, addedUserIds=[ana, bo])
            await copy.take([told.body])
            api.silent = {ana}
            refetcher = Refetcher(api, copy.host, lambda report: None)
            async with asyncio.timeout(20):
                assert await refetcher.step() == 3
                told = make.organization_membership_updated(id=acme, addedUserIds=[zoe])
                await copy.take([told.body])
                assert await refetcher.step() == 1
            waiting = await copy.host.read(lambda store: store.waiting(9))
            assert {need.key.id for need in waiting} == {ana}
            draining = asyncio.create_task(refetcher.drain())
            await asyncio.sleep(0.1)
            draining.cancel()
            await asyncio.wait({draining})
            assert not [task for task in asyncio.all_tasks() if "_settle" in repr(task)]
        await copy.host.close()

    asyncio.run(live())


@pytest.mark.parametrize(
    "error",
    [
        LogtoUnreachable(endpoint="e", problem="it answers 500"),
        LogtoApiError(endpoint="e", problem="it answers 403 (forbidden)", hint="h"),
    ],
    ids=["a server error", "a refusal"],
)
def test_what_logto_refuses_about_one_holds_back_no_other(error: Exception, tmp_path: Path) -> None:
    """The user and the organization that nobody can ask about were noted first. They go on waiting,
    and are asked about seldom; if Logto answers nothing at all, everything waits."""

    async def live() -> None:
        copy, reports = Copy(open_host("sqlite", tmp_path)), list[TelemetryEvent]()
        async with FakeLogto() as logto, asking(logto, Refusing) as api:
            assert isinstance(api, Refusing)
            ana, zoe = (logto.create_user(name=name)["id"] for name in ("Ana", "Zoe"))
            acme, other = (logto.create_organization(name=name)["id"] for name in ("Acme", "Other"))
            for organization, user in ((acme, ana), (other, zoe)):
                told = make.organization_membership_updated(id=organization, addedUserIds=[user])
                await copy.take([told.body])
            api.refused, api.error = {ana, acme}, error
            refetcher = Refetcher(api, copy.host, reports.append)
            assert await refetcher.step() == 4
            waiting = await copy.host.read(lambda store: store.waiting(9))
            assert {need.key.id for need in waiting} == {ana, acme}
            refused = [report for report in reports if isinstance(report, ApiUnavailable)]
            assert {report.subject for report in refused} == {f"user:{ana}", f"organization:{acme}"}
            assert all(report.retry_in_s > AGAIN_S for report in refused)
            assert await refetcher.step() == 0

            api.refused = {"api"}
            bo = logto.create_user(name="Bo")["id"]
            await copy.take(
                [make.organization_membership_updated(id=other, addedUserIds=[bo]).body]
            )
            with pytest.raises(type(error)):
                await refetcher.step()
            api.refused = {ana, acme}
            await Refetcher(api, copy.host, reports.append).step()
            waiting = await copy.host.read(lambda store: store.waiting(9))
            assert {need.key.id for need in waiting} == {ana, acme}
        await copy.host.close()

    asyncio.run(live())


def test_who_is_gone_in_logto_is_deleted_here(tmp_path: Path) -> None:
    """A part of a user came, whose deletion was lost."""

    async def live() -> None:
        copy = Copy(open_host("sqlite", tmp_path))
        async with FakeLogto() as logto:
            webhook = logto.add_hook("http://127.0.0.1:9/webhook")["id"]
            joined = make.organization_membership_updated(
                id="o", addedUserIds=["u"], hookId=webhook, at=time.time_ns() // 1_000_000 - 60_000
            )
            await copy.take([joined.body])
            await settled(logto, copy.host)
        records = await copy.host.run(lambda store: store.lock([Key("user", "u")]))
        assert records[Key("user", "u")].deleted_at is not None
        assert await copy.host.read(lambda store: store.waiting(10)) == []
        await copy.host.close()

    asyncio.run(live())


def test_another_logto_takes_nobody_for_deleted(tmp_path: Path) -> None:
    """One that has neither the webhook nor the users: it is told, and they go on waiting."""

    async def live() -> None:
        copy = Copy(open_host("sqlite", tmp_path))
        reports: list[TelemetryEvent] = []
        async with FakeLogto() as logto:
            await copy.take([make.organization_membership_updated(id="o", addedUserIds=["u"]).body])
            api = client(logto, FrozenClock())
            await Refetcher(api, copy.host, reports.append).step()
            await api.close()
        assert all(isinstance(each, ApiUnavailable) for each in reports)
        assert "LOGTO_ENDPOINT" in str(reports[0])
        waiting = await copy.host.read(lambda store: store.waiting(10))
        assert {each.key.kind for each in waiting} == {"user", "organization"}
        await copy.host.close()

    asyncio.run(live())


@pytest.mark.process
def test_serve_settles_what_waits(tmp_path: Path) -> None:
    """A part of a user arrived; the user itself was lost, and is asked for."""

    async def live() -> None:
        async with FakeLogto() as logto, serving(tmp_path, logto) as service:
            webhook = f"{service.url}{PATH}"
            ana = logto.create_user(primaryEmail="ana@example.com")
            logto.add_hook(webhook)
            logto.set_custom_data(ana["id"], {"plan": "pro"})
            await logto.settle()
            line = await asyncio.to_thread(service.wait_for_log, "refetched from Logto")
            assert "incomplete" in line
            await asyncio.to_thread(until, lambda: "ana@example.com" in shown(tmp_path, ana["id"]))

    asyncio.run(live())


def shown(folder: Path, user_id: str) -> str:
    return command("users", user_id, folder=folder).stdout


@pytest.mark.parametrize("when", ["before", "meanwhile", "at the end", "after"])
@pytest.mark.parametrize("was_removed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_late_addition_does_not_beat_a_newer_list(
    kind: StoreKind, was_removed: bool, when: str, tmp_path: Path
) -> None:
    """A list of all members is about those, too, whom it lacks: who was never one, and who was
    removed before. It doesn't matter when the delivery is applied."""

    async def live() -> None:
        copy = Copy(open_host(kind, tmp_path))
        async with FakeLogto() as logto:
            ana, bo = (logto.create_user(primaryEmail=f"{n}@example.com")["id"] for n in "ab")
            acme = logto.create_organization(name="Acme")["id"]
            logto.add_members(acme, [bo])
            now = time.time_ns() // 1_000_000

            async def take(event: str, ago_ms: int, **fields: Any) -> None:
                body = make.event(event, at=now - ago_ms, **fields).body
                sent = [delivery(body, now - ago_ms)]
                await copy.host.run(lambda store: store.add(sent))
                while await copy.worker.step():
                    pass

            async def take_late(moment: str) -> None:
                if moment == when:
                    await take(CHANGED, 5_000, id=acme, addedUserIds=[ana], removedUserIds=[])

            await take("User.Created", 60_000, id=ana)
            await take("Organization.Created", 60_000, id=acme)
            if was_removed:
                await take(CHANGED, 30_000, id=acme, addedUserIds=[], removedUserIds=[ana])
            await take_late("before")
            api = client(logto, FrozenClock(now))
            fetcher = Fetcher(api, copy.host, lambda answer: Span(now - 1_000, now))
            async for piece in fetcher.fetch_members(acme):
                if any(change.key == Key("organization", acme) for change in piece):
                    await take_late("at the end")
                await copy.host.run(partial(apply_reads, changes=piece, source="read"))
                if any(change.key == membership(acme, bo) for change in piece):
                    await take_late("meanwhile")
            await take_late("after")
            await api.close()
        query = sa.select(members.c.logto_user_id)
        rows = await copy.host.read(lambda store: store.connection.scalars(query).all())
        assert rows == [bo]
        await copy.host.close()

    asyncio.run(live())
