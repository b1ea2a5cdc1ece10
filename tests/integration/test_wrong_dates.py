"""A proxy before Logto's API that tells a wrong Date loses nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from logto_webhooks.clock import SystemClock
from logto_webhooks.database.records import FoundRow
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.reconcile.reconcile import Reconciliation
from logto_webhooks.reconcile.refetch import Refetcher
from logto_webhooks.testing import make
from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import asking, behind_proxy
from tests.support.stores import Copy, StoreKind, delivery, open_host

KINDS: tuple[StoreKind, ...] = ("sqlite", "asyncpg")
DAY_MS = 86_400_000


def now() -> int:
    return time.time_ns() // 1_000_000


async def receive(copy: Copy, host: TransactionRunner, *bodies: bytes) -> None:
    """Receive bodies that Logto has just sent, and apply them."""
    received = [delivery(body, now()) for body in bodies]
    await host.run(lambda store: store.add(received))
    while await copy.worker.step():
        pass


async def names(host: TransactionRunner) -> dict[str, str]:
    found: list[FoundRow] = await host.read(lambda store: store.find("user", "", 100))
    return {each.row["logto_user_id"]: each.row["name"] for each in found}


def test_a_dead_delivery_on_a_slow_machine_marks_its_record(tmp_path: Path) -> None:
    """The user was read before, and the answer has Logto's date."""

    async def live() -> None:
        copy = Copy(open_host("sqlite", tmp_path))
        async with FakeLogto() as logto, asking(logto) as api:
            ana = logto.create_user(name="Ana")["id"]
            await copy.take([make.user_created(id=ana, at=now()).body])
            await Reconciliation(api, copy.host, SystemClock()).run()
            broken = make.user_data_updated(id=ana, name=7, at=now() + 5_000).body
            received = [delivery(broken, now() - 90_000)]
            await copy.host.run(lambda store: store.add(received))
            while await copy.worker.step():
                pass
            [waiting] = await copy.host.read(lambda store: store.waiting(9))
            assert (waiting.key.id, waiting.reason) == (ana, "doubtful: dead delivery")
        await copy.host.close()

    asyncio.run(live())


@pytest.mark.parametrize("ahead_ms", [60_000, DAY_MS, -60_000])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent_after_a_read_beats_it(kind: StoreKind, ahead_ms: int, tmp_path: Path) -> None:
    """Of users who were all read before they changed."""

    async def live() -> None:
        host = open_host(kind, tmp_path)
        copy = Copy(host)
        async with FakeLogto() as logto, behind_proxy(logto, lambda: ahead_ms) as api:
            users = [logto.create_user(name="old") for _ in range(20)]
            ids = [user["id"] for user in users]
            await receive(
                copy, host, *(make.user_created(id=id_, name="old", at=now()).body for id_ in ids)
            )
            await Reconciliation(api, host, SystemClock()).run()
            assert set((await names(host)).values()) == {"old"}
            changed = [
                make.user_data_updated(id=id_, name="new", at=now() + 1_000).body for id_ in ids
            ]
            await receive(copy, host, *changed)
            assert await names(host) == dict.fromkeys(ids, "new")
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("ahead_ms", [60_000, -60_000])
def test_what_waits_is_settled(ahead_ms: int, tmp_path: Path) -> None:
    """At once, or when the Date comes to it."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        copy = Copy(host)
        async with FakeLogto() as logto, behind_proxy(logto, lambda: ahead_ms) as api:
            ana, acme = logto.create_user()["id"], logto.create_organization()["id"]
            logto.add_members(acme, [ana])
            recent = [make.role_created(id=str(number), at=now()).body for number in range(3)]
            at = now() - max(0, -ahead_ms) - 2_000
            organization = make.organization_created(id=acme, at=at).body
            members = make.organization_membership_updated(id=acme, addedUserIds=[], at=at).body
            await receive(copy, host, *recent, organization, members)
            assert await host.read(lambda store: store.waiting(10))
            await Refetcher(api, host, lambda report: None).drain()
            assert set(await names(host)) == {ana}
        await host.close()

    asyncio.run(live())
