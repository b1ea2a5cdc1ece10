"""A Logto that loses, doubles, reorders and dies, and a service that is killed: nothing is left
wrong after one reconcile. `make faults` tries many."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from logto_webhooks.database import Database, open_database
from logto_webhooks.database.records import RefetchNeed
from logto_webhooks.database.store import Store
from logto_webhooks.logto.api_responses import make_span_clock
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.reconcile.fetch import compare_and_request_refetch
from logto_webhooks.records.record import Key
from logto_webhooks.testing import FrozenClock
from logto_webhooks.testing.fake import FakeLogto, Faults
from tests.support import postgres
from tests.support.fake import credentials
from tests.support.generated_people import Town
from tests.support.service import PATH, Service, command
from tests.support.waiting import eventually

SEEDS = int(os.environ.get("LOGTO_WEBHOOKS_TEST_FAULTS", "1"))
STEPS, DEATHS, KILLS = (150, 5, 10) if SEEDS > 1 else (60, 2, 4)  # the gate's is a short life
FAULTS = Faults(lost=0.3, doubled=0.1, reordered=0.3)
Kind = Literal["sqlite", "postgres"]


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_after_one_reconcile_nothing_is_wrong(kind: Kind, seed: int, tmp_path: Path) -> None:
    """30 % lost, 10 % doubled, reordered; Logto dies without a log, the service twice as often."""
    asyncio.run(_live(kind, random.Random(seed), tmp_path))


async def _live(kind: Kind, rng: random.Random, folder: Path) -> None:
    given, database = await asyncio.to_thread(_database, kind, folder)
    async with FakeLogto(seed=rng.randrange(1000), ties=True) as logto:
        given |= credentials(logto) | {"LOGTO_WEBHOOKS_RECONCILE_EVERY_S": "0"}
        service = await _started(folder, 0, given)
        try:
            service = await _through_faults(logto, service, rng, folder, given)
            found = await asyncio.to_thread(command, "reconcile", "--json", folder=folder, **given)
            assert found.returncode == 0, found.stderr
            assert msgspec.json.decode(found.stdout)["doubts"] == []
            await _quiet(database, service)
        finally:
            await asyncio.to_thread(service.__exit__)
        await _compare(logto, database)
    await database.host.close()


async def _through_faults(
    logto: FakeLogto, service: Service, rng: random.Random, folder: Path, given: dict[str, str]
) -> Service:
    logto.add_hook(f"{service.url}{PATH}")
    logto.faults = FAULTS
    town = Town(logto, rng)
    moments = rng.sample(range(STEPS), DEATHS + KILLS)
    for step in range(STEPS):
        town.step()
        await asyncio.sleep(rng.random() * 0.03)
        if step in moments[:DEATHS]:
            logto.kill()
        elif step in moments:
            await asyncio.to_thread(service.__exit__)
            service = await _started(folder, service.port, given)
    await logto.settle()
    return service


def _database(kind: Kind, folder: Path) -> tuple[dict[str, str], Database]:
    if kind == "sqlite":
        url, schema = f"sqlite:///{folder / 'logto-webhooks.db'}", None
    else:
        url = postgres.server_url().render_as_string(hide_password=False)
        schema = postgres.emptied_schema()
    return {
        "LOGTO_WEBHOOKS_DATABASE_URL": url,
        "LOGTO_WEBHOOKS_SCHEMA": schema or "",
    }, open_database(url, schema)


async def _started(folder: Path, port: int, given: dict[str, str]) -> Service:
    service = await asyncio.to_thread(Service, folder, port=port, **given)
    return await asyncio.to_thread(service.__enter__)


async def _quiet(database: Database, service: Service) -> None:
    """Wait until nothing is pending, and nothing waits to be asked about."""

    def left(store: Store) -> tuple[int, list[RefetchNeed], str]:
        return store.status().deliveries["pending"], store.waiting(10), service.log

    await eventually(
        lambda: database.host.read(left), lambda found: not (found[0] or found[1]), 180
    )


async def _compare(logto: FakeLogto, database: Database) -> None:
    """Everybody here beside everybody there, with roles, organizations and the roles there."""
    api = ManagementClient(
        logto.url, logto.app_id, logto.app_secret, now=FrozenClock(), budget=10_000
    )
    there = {user["id"] async for page in api.users() for user in page.content}
    here = {key.id for key in await database.host.read(lambda store: store.keys("user", 10_000))}
    assert here == there
    when = await make_span_clock(database.host)
    for user in sorted(there):
        sides = await compare_and_request_refetch(api, database.host, user, when)
        assert sides.differ == [], (user, sides)
    listed = {each["id"]: each async for page in api.organizations() for each in page.content}
    found = await database.host.read(lambda store: store.find("organization", "", 10_000))
    rows = {
        each.row["logto_organization_id"]: each.row["name"]
        for each in found
        if each.row["deleted_at"] is None
    }
    assert rows == {name: each["name"] for name, each in listed.items()}
    keys = await database.host.read(lambda store: store.keys("organization", 10_000))
    assert {key.id for key in keys} == listed.keys()
    await api.close()
    assert all(key == Key("organization", key.id) for key in keys)
