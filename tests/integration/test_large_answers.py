"""Large users and bodies that Logto returns are stored in short transactions."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.reconcile import PIECE_BYTES
from logto_webhooks.reconcile.reconcile import Reconciliation
from logto_webhooks.reconcile.recover import Recovery
from logto_webhooks.testing import FrozenClock
from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import asking
from tests.support.stores import open_host

LARGE = "x" * 300_000
COPIES = 3  # of a value: in its record, in the mirror's row, and what differs between the two


def watch_writes(host: TransactionRunner) -> list[int]:
    """Return a list to which each transaction from now on adds how many bytes it sends."""
    sent: list[int] = []
    engine: sa.Engine = vars(host)["_engine"]

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        sent.append(0)

    @sa.event.listens_for(engine, "before_cursor_execute")
    def add(*call: Any) -> None:
        if sent:
            sent[-1] += len(repr(call[3]))

    return sent


def test_a_page_of_large_users_takes_several_transactions(tmp_path: Path) -> None:
    """Accepting waits for each of them on SQLite, and each has a time limit."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        async with FakeLogto() as logto, asking(logto) as api:
            for _ in range(40):
                logto.create_user(customData={"large": LARGE})
            sent = watch_writes(host)
            result = await Reconciliation(api, host, FrozenClock()).run()
        assert (result.users, result.doubts) == (40, [])
        assert sum(sent) > 40 * len(LARGE)
        assert max(sent) < COPIES * PIECE_BYTES
        await host.close()

    asyncio.run(live())


def test_a_page_of_a_log_with_large_bodies_takes_several_transactions(tmp_path: Path) -> None:
    """As many as its bytes need."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        async with FakeLogto() as logto, asking(logto) as api:
            url = "http://127.0.0.1:9/webhook"
            webhook = logto.add_hook(url, signing_key=logto.signing_key)
            logto.populate_log(webhook["id"], [_make_entry(number) for number in range(40)])
            sent = watch_writes(host)
            result = await Recovery(api, host, FrozenClock(), [logto.signing_key]).run(0)
        assert result.recovered == 40
        assert sum(sent) > 40 * len(LARGE)
        assert max(sent) < COPIES * PIECE_BYTES
        await host.close()

    asyncio.run(live())


def _make_entry(number: int) -> dict[str, Any]:
    at = int(time.time() * 1000) - 60_000 - number
    created = datetime.fromtimestamp(at / 1000, UTC).isoformat()
    data = {"id": str(number), "large": LARGE}
    body = {"event": "Role.Created", "createdAt": created, "data": data}
    payload = {"result": "Error", "error": "timed out", "hookRequest": {"body": body}}
    return {"id": str(number), "payload": payload, "createdAt": at}
