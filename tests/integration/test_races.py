"""Two transactions at once on a real PostgreSQL: no orphan, no deadlock."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.apply import DeliveryWorker
from logto_webhooks.apply import batch as apply_module
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import ClaimedDelivery, DeliveryOutcome
from logto_webhooks.handlers.enqueue import PlannedDelivery
from logto_webhooks.instrumentation import Stalled
from logto_webhooks.records.record import Key, Record, membership
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import FrozenClock, make
from tests.support import postgres
from tests.support.stores import ALL, Copy, StoreKind, delivery, open_host

RACES = int(os.environ.get("LOGTO_WEBHOOKS_TEST_RACES", "20"))
KINDS: tuple[StoreKind, ...] = ("asyncpg", "psycopg")


async def apply(host: TransactionRunner, token: str) -> None:
    """Claim one delivery, and apply it in a transaction of its own."""

    def claim(store: Store) -> list[ClaimedDelivery]:
        return store.claim(token, 1, 2**20, 60)

    def apply_them(store: Store) -> list[DeliveryOutcome]:
        planned = [apply_module.parse_delivery(each, lag_ms=100) for each in claimed]
        usable = [each for each in planned if isinstance(each, PlannedDelivery)]
        outcomes, _ = apply_module.apply_batch(store, usable)
        store.finish(token, outcomes)
        return outcomes

    claimed = await host.run(claim)
    assert len(claimed) == 1
    await host.run(apply_them)


async def add(host: TransactionRunner, signed: SignedRequest) -> None:
    await host.run(lambda store: store.add([delivery(signed.body)]))


async def race(
    host: TransactionRunner,
    before: list[SignedRequest],
    rivals: tuple[SignedRequest, SignedRequest],
) -> None:
    """Apply what was before, then both rivals at once."""
    for each in before:
        await add(host, each)
        await apply(host, "before")
    for each in rivals:
        await add(host, each)
    await asyncio.gather(apply(host, "one"), apply(host, "other"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_never_slips_into_a_deleted_organization(kind: StoreKind, tmp_path: Path) -> None:
    """Whichever is first, the membership ends with its organization."""

    async def live() -> None:
        host = open_host(kind, tmp_path)
        for number in range(RACES):
            org, user = f"o{number}", f"u{number}"
            joins = make.organization_membership_updated(id=org, addedUserIds=[user])
            before = [make.organization_created(id=org), make.user_created(id=user)]
            await race(host, before, (make.organization_deleted(id=org), joins))
        found = await host.read(lambda store: store.find("organization", "", ALL))
        assert len(found) == RACES
        assert all(each.row["deleted_at"] and not each.memberships for each in found)
        keys = [membership(f"o{number}", f"u{number}") for number in range(RACES)]
        records = await host.run(lambda store: store.lock(sorted(keys)))
        assert all(record.deleted_at is not None for record in records.values())
        await host.close()

    asyncio.run(live())


@pytest.mark.postgres
def test_who_only_reads_an_organization_shares_it() -> None:
    """Two workers add members at once; who changes the organization waits for both."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, execution_options={"schema_translate_map": {None: schema}})
    acme = [Key("organization", "acme")]
    with engine.begin() as connection:
        Store(connection).save([Record(acme[0])])
    with engine.connect() as one, engine.connect() as other, engine.connect() as third:
        for connection in (one, other):
            assert Store(connection).lock(acme, share=True)[acme[0]].kept
        third.exec_driver_sql("SET LOCAL lock_timeout = 100")
        with pytest.raises(sa.exc.OperationalError):
            Store(third).lock(acme)
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_never_revives_a_deleted_user(kind: StoreKind, tmp_path: Path) -> None:
    """Whichever is first, the user is deleted, and knows its last state."""

    async def live() -> None:
        host = open_host(kind, tmp_path)
        for number in range(RACES):
            user = f"u{number}"
            created = make.user_created(id=user)
            changed = make.user_data_updated(id=user, name="last")
            await race(host, [created], (make.user_deleted(id=user), changed))
        found = await host.read(lambda store: store.find("user", "", ALL))
        assert len(found) == RACES
        assert all(each.row["deleted_at"] and each.row["name"] == "last" for each in found)
        records = await host.run(
            lambda store: store.lock(sorted(Key("user", f"u{n}") for n in range(RACES)))
        )
        assert not [record for record in records.values() if record.waiting_for]
        await host.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", KINDS)
def test_deleting_users_and_organizations_of_one_another_never_deadlocks(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ends memberships that the other ends, too; malformed events lock among them."""
    monkeypatch.setattr("logto_webhooks.apply.MAX_ROWS", 5)  # or one worker would take all
    organizations = [f"o{number}" for number in range(12)]
    users = [f"u{number}" for number in range(40)]
    joins = [
        make.organization_membership_updated(id=each, addedUserIds=users) for each in organizations
    ]
    broken = make.organization_membership_updated(id="o1", addedUserIds="u1")
    ends = [make.organization_deleted(id=each) for each in organizations]
    ends += [make.user_deleted(id=each) for each in users]
    ends += [make.organization_membership_updated(id="o1", addedUserIds=[each]) for each in users]

    async def live() -> None:
        host = open_host(kind, tmp_path)
        copy = Copy(host)
        await copy.take(each.body for each in joins)
        before = await asyncio.to_thread(deadlocks)
        for number, each in enumerate(random.Random(7).sample(ends, len(ends))):
            await add(host, each)
            if number % 5 == 0:
                await add(host, broken)
        workers = [
            DeliveryWorker(host, FrozenClock(), copy.reports.append, lambda: 0.0) for _ in range(3)
        ]
        await asyncio.gather(*[worker.drain() for worker in workers])
        assert [each for each in copy.reports if isinstance(each, Stalled)] == []
        assert await asyncio.to_thread(deadlocks) == before
        found = await host.read(lambda store: store.find("organization", "", ALL))
        assert [each for each in found if each.memberships] == []
        await host.close()

    asyncio.run(live())


def deadlocks() -> int:
    """How many the server counted."""
    engine = sa.create_engine(postgres.server_url().set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        found = connection.scalar(sa.text("SELECT sum(deadlocks) FROM pg_stat_database"))
    engine.dispose()
    return int(found or 0)
