"""A caller that is cancelled: its transaction is rolled back, but a verified delivery is stored."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from logto_webhooks.clock import SystemClock
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Checkpoint, Store
from logto_webhooks.ingest import Receiver
from logto_webhooks.ingest.group_commit import GroupCommit
from logto_webhooks.ingest.spool import SpoolDirectory
from logto_webhooks.testing import SIGNING_KEY, make
from tests.support import postgres
from tests.support.stores import StoreKind, open_host
from tests.support.waiting import eventually

T = TypeVar("T")


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
            assert isinstance(store, Store)
            store.save_checkpoint("mark", Checkpoint(1, 1))
            begun.set()
            store._connection.execute(sa.text("SELECT pg_sleep(4.25)"))

        started = time.monotonic()
        await cancelled_at(begun, asyncio.create_task(host.run(work)))
        assert time.monotonic() - started < 3
        with postgres.sync_engine().connect() as looking:
            query = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE "
            assert looking.scalar(sa.text(query + "'SELECT pg_sleep(4.25)%'")) == 0
        assert await host.read(lambda store: store.checkpoint("mark")) is None
        await host.close()

    asyncio.run(body())


def test_a_transaction_that_nobody_waits_for_is_not_committed(tmp_path: Path) -> None:
    """On SQLite, whose statements are short: the next transaction doesn't see it."""

    async def body() -> None:
        host = open_host("sqlite", tmp_path)
        begun, gate = threading.Event(), threading.Event()

        def work(store: Store) -> None:
            store.save_checkpoint("mark", Checkpoint(1, 1))
            begun.set()
            gate.wait()

        await cancelled_at(begun, asyncio.create_task(host.run(work)))
        gate.set()
        assert await host.run(lambda store: store.checkpoint("mark")) is None
        await host.close()

    asyncio.run(body())


class Slow:
    """A host whose database answers once the gate is open."""

    def __init__(self, host: TransactionRunner) -> None:
        self._host = host
        self.gate = asyncio.Event()

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        await self.gate.wait()
        return await self._host.accept(work, limit_s)


@pytest.mark.parametrize("size", [10, 300_000])
@pytest.mark.parametrize("has_spool", [False, True])
def test_a_verified_delivery_is_stored_though_its_request_is_cancelled(
    size: int, has_spool: bool, tmp_path: Path
) -> None:
    """By a time-out of the application: Logto won't send it again. With a spool, it is there."""

    async def body() -> None:
        host = open_host("sqlite", tmp_path)
        slow: Any = Slow(host)
        spool = SpoolDirectory(tmp_path / "spool") if has_spool else None
        if spool:
            spool.make()
        commit = GroupCommit(slow, lambda report: None, lambda: None, spool)
        receiver = Receiver([SIGNING_KEY], commit.add, SystemClock(), lambda report: None)
        sent = make.user_created(id="ana", name="a" * size)
        signature = dict(sent.headers)["logto-signature-sha-256"].encode()
        task = asyncio.create_task(receiver.receive([signature], sent.body))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bool(spool and spool.count()) == (has_spool and size == 10)
        slow.gate.set()

        async def stored() -> int:
            status = await host.read(lambda store: store.status())
            return status.deliveries["pending"] + (spool.count() if spool else 0)

        await eventually(stored)
        await commit.finish()
        await host.close()

    asyncio.run(body())
