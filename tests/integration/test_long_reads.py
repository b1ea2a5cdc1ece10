"""Reads that take long, such as counts, delay no others."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.database import runner
from logto_webhooks.database.store import Store
from tests.support.stores import STORES, StoreKind, open_host

ENDLESS = sa.text(
    "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers)"
    " SELECT count(*) FROM numbers"
)


@pytest.mark.parametrize("kind", ["sqlite", "postgres-thread"])
def test_a_read_does_not_wait_for_a_long_one(kind: StoreKind, tmp_path: Path) -> None:
    """The worker reads the clock in each step."""

    async def main() -> None:
        host, begun, gate = open_host(kind, tmp_path), threading.Event(), threading.Event()

        def count(store: Store) -> int:
            store.clock()
            begun.set()
            gate.wait(30)
            return 7

        counting = asyncio.create_task(host.read_long(count))
        await asyncio.to_thread(begun.wait, 30)
        assert (await host.read(Store.clock)).now
        assert not counting.done()
        gate.set()
        assert await counting == 7
        await host.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", STORES)
def test_a_read_that_nobody_waits_for_ends(kind: StoreKind, tmp_path: Path) -> None:
    """Otherwise, the next one would wait for it, for ever."""

    async def main() -> None:
        host, begun = open_host(kind, tmp_path), asyncio.Event()
        loop = asyncio.get_running_loop()

        def count(store: Store) -> None:
            loop.call_soon_threadsafe(begun.set)
            store.connection.execute(ENDLESS)

        for read in (host.read, host.read_long):
            begun.clear()
            counting = asyncio.create_task(read(count))
            await begun.wait()
            await asyncio.sleep(0.2)  # it is in the database now
            counting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await counting
            async with asyncio.timeout(20):
                assert (await read(Store.clock)).now
        await host.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["postgres-thread"])
def test_a_read_that_waits_for_its_turn_is_not_late(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit is for the server: if it passes, all connections are replaced."""
    monkeypatch.setattr(runner, "READ_S", 1.5)

    async def main() -> None:
        host = open_host(kind, tmp_path)

        def sleep(store: Store) -> int:
            store.connection.execute(sa.text("SELECT pg_sleep(0.6)"))
            return int(store.connection.scalar(sa.text("SELECT pg_backend_pid()")) or 0)

        sessions = await asyncio.gather(*(host.read_long(sleep) for _ in range(4)))
        assert len(set(sessions)) == 1
        await host.close()

    asyncio.run(main())
