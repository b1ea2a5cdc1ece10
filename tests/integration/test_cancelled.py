"""Whose caller is cancelled is ended, and what it wrote is rolled back."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.database.store import DatabaseStore
from logto_webhooks.interfaces import Progress, Store
from tests.support import postgres
from tests.support.copy import StoreKind, open_host


async def cancelled_at(begun: threading.Event, task: asyncio.Task[None]) -> None:
    await asyncio.to_thread(begun.wait)
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("kind", ["asyncpg", "psycopg", "postgres-thread"])
def test_a_statement_ends_with_its_caller(kind: StoreKind, tmp_path: Path) -> None:
    """It doesn't run on in the server, holding what it locked."""

    async def body() -> None:
        host, begun = open_host(kind, tmp_path), threading.Event()

        def work(store: Store) -> None:
            assert isinstance(store, DatabaseStore)
            store.progress("mark", Progress(1, 1))
            begun.set()
            store._connection.execute(sa.text("SELECT pg_sleep(4.25)"))

        started = time.monotonic()
        await cancelled_at(begun, asyncio.create_task(host.run(work)))
        assert time.monotonic() - started < 3
        with postgres.sync_engine().connect() as looking:
            query = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE "
            assert looking.scalar(sa.text(query + "'SELECT pg_sleep(4.25)%'")) == 0
        assert await host.read(lambda store: store.progress("mark")) is None
        await host.close()

    asyncio.run(body())


def test_a_transaction_that_nobody_waits_for_is_not_committed(tmp_path: Path) -> None:
    """On SQLite, whose statements are short: the next transaction doesn't see it."""

    async def body() -> None:
        host = open_host("sqlite", tmp_path)
        begun, gate = threading.Event(), threading.Event()

        def work(store: Store) -> None:
            store.progress("mark", Progress(1, 1))
            begun.set()
            gate.wait()

        await cancelled_at(begun, asyncio.create_task(host.run(work)))
        gate.set()
        assert await host.run(lambda store: store.progress("mark")) is None
        await host.close()

    asyncio.run(body())
