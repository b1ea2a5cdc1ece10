"""Two transactions at once on a real PostgreSQL: no orphan, no deadlock."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.adapters.stores.sql import SqlStore
from logto_webhooks.core.ports import Claimed, Host, Outcome, Store
from logto_webhooks.core.record import Key, Record, membership
from logto_webhooks.samples.signed import Signed
from logto_webhooks.service import sync
from logto_webhooks.testing import make
from tests.support import postgres
from tests.support.copy import ALL, StoreKind, delivery, open_host

RACES = int(os.environ.get("LOGTO_WEBHOOKS_TEST_RACES", "40"))
KINDS: tuple[StoreKind, ...] = ("asyncpg", "psycopg")


async def apply(host: Host, token: str) -> None:
    """Claim one delivery, and apply it in a transaction of its own."""

    def claim(store: Store) -> list[Claimed]:
        return store.claim(token, 1, 2**20, 60)

    def work(store: Store) -> list[Outcome]:
        planned, _ = sync.plan_all(claimed, lag_ms=100)
        return sync.apply(store, token, planned)

    claimed = await host.run(claim)
    assert len(claimed) == 1
    await host.run(work)


async def add(host: Host, signed: Signed) -> None:
    await host.run(lambda store: store.add([delivery(signed.body)]))


async def race(host: Host, before: list[Signed], rivals: tuple[Signed, Signed]) -> None:
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


def test_who_only_reads_an_organization_shares_it() -> None:
    """Two workers add members at once; who changes the organization waits for both."""
    schema = postgres.emptied_schema()
    url = postgres.server_url().set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, execution_options={"schema_translate_map": {None: schema}})
    acme = [Key("organization", "acme")]
    with engine.begin() as connection:
        SqlStore(connection).save([Record(acme[0])])
    with engine.connect() as one, engine.connect() as other, engine.connect() as third:
        for connection in (one, other):
            assert SqlStore(connection).lock(acme, share=True)[acme[0]].kept
        third.exec_driver_sql("SET LOCAL lock_timeout = 100")
        with pytest.raises(sa.exc.OperationalError):
            SqlStore(third).lock(acme)
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
