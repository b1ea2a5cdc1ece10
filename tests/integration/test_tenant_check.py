"""A Logto is yours once a delivery proves it: what it answered itself proves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.deliveries import identify
from logto_webhooks.errors import WrongTenant
from logto_webhooks.instrumentation import ApiUnavailable, TelemetryEvent
from logto_webhooks.logto import tenant_check
from logto_webhooks.logto.api_responses import ApiResponse, make_span_clock
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.logto.tenant_check import TenantCheck
from logto_webhooks.reconcile.fetch import compare_and_request_refetch
from logto_webhooks.reconcile.reconcile import Reconciliation
from logto_webhooks.reconcile.refetch import Refetcher
from logto_webhooks.signing_keys import trust
from logto_webhooks.testing import FrozenClock, make
from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import asking
from tests.support.stores import RECEIVED_AT, Copy, StoreKind, open_host

KINDS: tuple[StoreKind, ...] = ("sqlite", "asyncpg")
AT = RECEIVED_AT - 60_000


class CountingClient(ManagementClient):
    """Counts how often webhooks are listed."""

    webhooks_listed = 0

    async def webhooks(self) -> AsyncIterator[ApiResponse]:
        self.webhooks_listed += 1
        async for page in super().webhooks():
            yield page


def fake(strangers: int = 0) -> FakeLogto:
    logto = FakeLogto(now=FrozenClock().now, seed=7)
    for _ in range(strangers):
        logto.create_user()
    return logto


async def present(host: TransactionRunner) -> set[str]:
    rows = [
        found.row
        for find in (
            lambda store: store.find("user", "", 1_000),
            lambda store: store.find("organization", "", 1_000),
        )
        for found in await host.read(find)
    ]
    return {
        row.get("logto_user_id") or row["logto_organization_id"]
        for row in rows
        if row["deleted_at"] is None
    }


def genuine(webhook: str = "our-webhook") -> list[bytes]:
    """A whole user, a doubtful one, and an organization whose members must be listed."""
    return [
        make.user_created(id="ana", at=AT, hookId=webhook).body,
        make.user_created(id="bo", at=AT, hookId=webhook).body,
        make.user_data_updated(id="bo", name="One", at=AT + 1_000, hookId=webhook).body,
        make.user_data_updated(id="bo", name="Two", at=AT + 1_000, hookId=webhook).body,
        make.organization_created(id="acme", at=AT, hookId=webhook).body,
        make.organization_membership_updated(
            id="acme", addedUserIds=[], at=AT + 1_000, hookId=webhook
        ).body,
    ]


@pytest.mark.parametrize("strangers", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_logto_at_the_first_start_deletes_nobody(
    kind: StoreKind, strangers: int, tmp_path: Path
) -> None:
    """Its users are imported into the empty database; then genuine deliveries arrive."""

    async def live() -> None:
        copy, clock = Copy(open_host(kind, tmp_path)), FrozenClock()
        host = copy.host
        async with fake(strangers) as other, asking(other) as api:
            reconciliation = Reconciliation(api, host, clock)
            assert (await reconciliation.run()).drifted == strangers
            await copy.take(genuine())
            before = await present(host)
            waiting = await host.read(lambda store: store.waiting(10))
            assert {need.key.id for need in waiting} == {"ana", "bo", "acme"}
            reports: list[TelemetryEvent] = []
            await Refetcher(api, host, reports.append).step()
            assert [type(report) for report in reports] == [ApiUnavailable] * 3
            assert "LOGTO_ENDPOINT" in str(reports[0])
            with pytest.raises(WrongTenant):
                await reconciliation.run()
            with pytest.raises(WrongTenant):
                await Reconciliation(api, host, clock).one_user("ana")
            with pytest.raises(WrongTenant):
                await compare_and_request_refetch(api, host, "ana", await make_span_clock(host))
        assert await present(host) == before >= {"ana", "bo", "acme"}
        assert await host.read(lambda store: store.waiting(10)) == waiting
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("strangers", [0, 3])
def test_a_delivery_that_arrives_during_the_first_reconciliation(
    strangers: int, tmp_path: Path
) -> None:
    """It was checked while the database was empty. At the right Logto, all is listed anew."""

    async def live() -> None:
        copy, clock = Copy(open_host("sqlite", tmp_path)), FrozenClock()

        class Interrupted(ManagementClient):
            async def users(self, page: int = 1) -> AsyncIterator[ApiResponse]:
                async for answered in super().users(page):
                    await copy.take(genuine())
                    yield answered

        async with fake(strangers) as other, asking(other, Interrupted) as api:
            with pytest.raises(WrongTenant):
                await Reconciliation(api, copy.host, clock).run()
        assert await present(copy.host) >= {"ana", "bo", "acme"}
        async with FakeLogto(now=clock.now) as ours, asking(ours) as api:
            cy = ours.create_user()["id"]
            ours.populate([{**ours.create_user(), "id": "ana"}])
            result = await Reconciliation(api, copy.host, clock).run()
            assert not result.resumed
        assert await present(copy.host) >= {"ana", cy}
        await copy.host.close()

    asyncio.run(live())


def test_a_deleted_webhook_is_replaced_by_whom_it_told_of(tmp_path: Path) -> None:
    """Somebody made it anew: this Logto still knows one of the users."""

    async def live() -> None:
        copy, clock = Copy(open_host("sqlite", tmp_path)), FrozenClock()
        await copy.take(genuine())
        async with FakeLogto(now=clock.now) as ours, asking(ours) as api:
            ours.add_hook("http://127.0.0.1:9/webhook")
            ours.populate([{**ours.create_user(), "id": "ana"}])
            await Refetcher(api, copy.host, lambda report: None).drain()
        assert await present(copy.host) == {"ana"}
        await copy.host.close()

    asyncio.run(live())


def test_the_newest_delivery_decides(tmp_path: Path) -> None:
    """The webhooks moved to another Logto, and LOGTO_ENDPOINT still names the old one; then it is
    corrected."""

    async def live() -> None:
        copy, clock = Copy(open_host("sqlite", tmp_path)), FrozenClock()
        async with fake() as old, asking(old) as api:
            webhook = old.add_hook("http://127.0.0.1:9/webhook")["id"]
            old.populate([{**old.create_user(), "id": "cy"}])
            await copy.take([make.user_created(id="cy", at=AT, hookId=webhook).body])
            reconciliation = Reconciliation(api, copy.host, clock)
            await reconciliation.run()
            await copy.take(genuine())
            with pytest.raises(WrongTenant):
                await reconciliation.run()
            await Refetcher(api, copy.host, lambda report: None).step()
        assert await present(copy.host) >= {"ana", "bo", "acme", "cy"}
        clock.tick(60)
        async with FakeLogto(now=clock.now, seed=9) as new, asking(new) as api:
            webhook = new.add_hook("http://127.0.0.1:9/webhook")["id"]
            dee = new.create_user()["id"]
            await copy.take([make.user_created(id=dee, at=AT, hookId=webhook).body])
            await Reconciliation(api, copy.host, clock).run()
        assert await present(copy.host) == {dee}
        await copy.host.close()

    asyncio.run(live())


def test_a_sample_proves_nothing(tmp_path: Path) -> None:
    """Neither that a Logto is another, nor that it is ours: what came before it decides."""

    async def live() -> None:
        copy = Copy(open_host("sqlite", tmp_path))
        async with fake(1) as ours, asking(ours) as api, fake(1) as other, asking(other) as wrong:
            webhook = ours.add_hook("http://127.0.0.1:9/")
            await copy.take(genuine(webhook["id"]))
            await copy.take([make.user_created(id="nobody").body])
            await TenantCheck(api, copy.host).ensure_same_tenant()
            with pytest.raises(WrongTenant):
                await TenantCheck(wrong, copy.host).ensure_same_tenant()
        await copy.host.close()

    asyncio.run(live())


def test_its_own_log_proves_nothing(tmp_path: Path) -> None:
    """What came from there is newer than the genuine delivery."""

    async def live() -> None:
        copy, clock = Copy(open_host("sqlite", tmp_path)), FrozenClock()
        await copy.take(genuine())
        async with fake() as other, asking(other) as api:
            stranger = other.create_user()
            webhook = other.add_hook("http://127.0.0.1:9/webhook")["id"]
            told = make.user_created(id=stranger["id"], at=AT + 2_000, hookId=webhook).body
            recovered = identify(trust(told), RECEIVED_AT, origin="log")
            await copy.host.run(lambda store: store.add([recovered]))
            await copy.take([])
            with pytest.raises(WrongTenant):
                await Reconciliation(api, copy.host, clock).run()
        assert await present(copy.host) == {"ana", "bo", "acme", stranger["id"]}
        await copy.host.close()

    asyncio.run(live())


def test_a_proof_is_kept_and_a_refusal_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Webhooks are listed once; after a refusal again, but not at once."""

    async def live() -> None:
        copy = Copy(open_host("sqlite", tmp_path))
        async with FakeLogto(now=FrozenClock().now) as logto, asking(logto, CountingClient) as api:
            assert isinstance(api, CountingClient)
            await copy.take(genuine())
            check = TenantCheck(api, copy.host)
            for _ in range(2):
                with pytest.raises(WrongTenant):
                    await check.ensure_same_tenant()
            assert api.webhooks_listed == 1
            monkeypatch.setattr(tenant_check, "AGAIN_S", 0.0)
            with pytest.raises(WrongTenant):
                await TenantCheck(api, copy.host).ensure_same_tenant()
            webhook = logto.add_hook("http://127.0.0.1:9/webhook")["id"]
            await copy.take([make.user_created(id="cy", at=AT, hookId=webhook).body])
            check = TenantCheck(api, copy.host)
            for _ in range(3):
                await check.ensure_same_tenant()
            assert api.webhooks_listed == 3
        assert await present(copy.host) >= {"cy"}
        await copy.host.close()

    asyncio.run(live())
