"""What commands do, as methods of an application: each once, against a Logto, on both databases."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from logto_webhooks import LogtoWebhooks
from logto_webhooks.deliveries import DeliveryFilter, DeliveryState
from logto_webhooks.errors import ApiNotConfigured, DeliveryUnknown, SettingInvalid
from logto_webhooks.jobs import JobFilter
from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import NOBODY, application
from tests.support.mounted import on_postgres, on_sqlite
from tests.support.waiting import eventually


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_every_command_has_its_method(kind: str, tmp_path: Path) -> None:
    """Filled, asked, lost and brought back, explained, repeated: without a command line."""

    async def run() -> None:
        async with FakeLogto() as fake:
            fake.add_hook(NOBODY)
            logto = application(kind, tmp_path, fake)
            await logto.migrate()
            ana = fake.create_user(primaryEmail="ana@example.com")["id"]
            await fake.settle()
            filled = await logto.backfill()
            assert (filled.users, filled.drifted) == (1, 1)
            async with logto.lifespan():
                await through_all(logto, fake, ana)
            assert (await logto.status()).doubtful == 0, "it can be asked when it doesn't run, too"
            await logto.close()

    asyncio.run(run())


async def through_all(logto: LogtoWebhooks, fake: FakeLogto, ana: str) -> None:
    """Use each method, and look at what it says."""
    [found] = await logto.users("ana@example.com")
    assert found.row["logto_user_id"] == ana
    await asyncio.sleep(1.1)  # Logto's log, and its Date, are in whole seconds
    fake.update_user(ana, name="Ana")
    await fake.settle()
    assert (await logto.recover(dry_run=True)).recovered >= 1
    recovered = await logto.recover(time.time_ns() // 1_000_000 - 3_600_000)
    assert recovered.recovered >= 1
    [dead] = await eventually(
        lambda: logto.jobs(JobFilter(handler="breaks", state="dead")), lambda rows: len(rows) == 1
    )
    [delivery] = await logto.deliveries(
        DeliveryFilter(event="User.Data.Updated", state=DeliveryState.DONE)
    )
    assert (await logto.deliveries(DeliveryFilter(until=1))) == []
    kept = await logto.delivery(delivery.id)
    assert kept
    assert b"Ana" in kept.body
    told = await logto.explain_user("ana@example.com")
    assert told
    assert told.only("name").fields[0].value == "Ana"
    assert await logto.explain_organization("nobody's") is None
    assert (await logto.compare_user(ana)).differ == []
    assert (await logto.replay([delivery.id], dry_run=True)).jobs == 1
    with pytest.raises(DeliveryUnknown, match="4711"):
        await logto.replay([delivery.id, 4711])
    await asks_again(logto, dead.id)
    assert (await logto.reconcile(ana)).users == 1
    fake.create_organization(name="Acme")
    assert (await logto.reconcile(dry_run=True)).drifted == 1
    assert await logto.organizations() == []
    assert (await logto.reconcile()).drifted == 1
    assert [each.row["name"] for each in await logto.organizations("Acme")] == ["Acme"]
    await eventually(logto.waiting, lambda needs: needs == [])


async def asks_again(logto: LogtoWebhooks, job: int) -> None:
    """Jobs by id and by handler, and the handler itself."""
    assert await logto.retry_jobs([job]) == 1
    await eventually(
        lambda: logto.jobs(JobFilter(id=job)), lambda rows: rows[0].runs == 1 and is_dead(rows[0])
    )
    assert await logto.discard_jobs(handler="breaks") == 1
    with pytest.raises(SettingInvalid, match="handler"):
        await logto.retry_jobs()
    [known] = await logto.known_handlers()
    assert (known.handler, known.events, known.discarded) == ("breaks", ["User.Data.Updated"], 1)
    assert await logto.forget_handler("breaks") == 0
    assert await logto.forget_handler("never there") is None


def is_dead(row: object) -> bool:
    return getattr(row, "state", None) == "dead"


def test_without_credentials_logto_is_not_asked(tmp_path: Path) -> None:
    """The error says which settings are missing."""
    logto = LogtoWebhooks(signing_key="x", database_url=f"sqlite:///{tmp_path / 'app.db'}")

    async def run() -> None:
        await logto.migrate()
        with pytest.raises(ApiNotConfigured, match="LOGTO_M2M_APP_ID"):
            await logto.reconcile()
        await logto.close()

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_what_is_no_text_is_no_filter(kind: str, tmp_path: Path) -> None:
    """A shell gives what isn't UTF-8, too: that is said, and no database sees it."""
    logto = on_sqlite(tmp_path) if kind == "sqlite" else on_postgres()
    logto.call(logto.migrate())
    for bad in ("\udcff", "a\0"):
        for asked in (
            logto.users(bad),
            logto.organizations(bad),
            logto.explain_user(bad),
            logto.forget_handler(bad),
            logto.jobs(JobFilter(handler=bad)),
            logto.jobs(JobFilter(event=bad)),
            logto.deliveries(DeliveryFilter(subject=bad)),
        ):
            with pytest.raises(SettingInvalid):
                logto.call(asked)
    logto.call(logto.close())
