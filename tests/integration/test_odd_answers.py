"""Logto's API lists items that are valid JSON, and nothing that Logto would list."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from logto_webhooks.admin import Admin
from logto_webhooks.clock import SystemClock
from logto_webhooks.ingest.quarantine import make_key_reader
from logto_webhooks.listen.log_reader import LogReader
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.reconcile.recover import Recovery
from logto_webhooks.settings import from_env
from logto_webhooks.signing_keys import WebhookKey
from logto_webhooks.testing.fake import FakeLogto
from tests.support.fake import NOBODY, proxy_of
from tests.support.stores import open_host
from tests.support.waiting import eventually

IDS: list[Any] = [None, 5, True, [], {}, [1], "", "a:b"]
ODD: list[Any] = [None, "x", 5, True, [], [1], {}, *({"id": each} for each in IDS)]
DATES: list[Any] = [None, "x", True, [], {}]


def add_odd(path: str, content: Any) -> Any:
    """Add odd items to each listing."""
    return [*ODD, *content] if isinstance(content, list) else content


def client(logto: FakeLogto, url: str) -> ManagementClient:
    return ManagementClient(url, logto.app_id, logto.app_secret, now=SystemClock(), budget=100_000)


@pytest.mark.parametrize("odd", [False, True])
def test_webhooks_that_cannot_be_read_stop_no_recovery(odd: bool, tmp_path: Path) -> None:
    """They are told. The key of a webhook that isn't listed stays, because it may be one of them;
    otherwise, it is forgotten."""

    async def run() -> None:
        host = open_host("sqlite", tmp_path)
        async with FakeLogto() as logto, proxy_of(logto, alter=add_odd) as url:
            webhook = logto.add_hook(NOBODY)["id"]
            logto.create_user()
            await logto.settle()
            api = client(logto, url if odd else logto.url)
            key = WebhookKey(webhook_id="unlisted", key="k" * 32, learnt_at=1)
            await host.run(lambda store: store.webhook_keys.learn([key]))
            found = await Recovery(api, host, SystemClock(), [logto.signing_key]).run()
            assert (found.webhooks, found.recovered) == ([webhook], 1)
            assert any("a webhook that can't be read" in doubt for doubt in found.doubts) == odd
            kept = await host.read(lambda store: store.webhook_keys.learnt())
            assert [each.webhook_id for each in kept] == (["unlisted"] if odd else [])
            read_keys = make_key_reader(api, host, SystemClock(), None)
            keys = await read_keys([logto.signing_key])
            assert [each.webhook_id for each in keys] == [webhook]
            await api.close()
        await host.close()

    asyncio.run(run())


def without_dates(path: str, content: Any) -> Any:
    """Replace when attempts ended, and add odd entries."""
    if not path.endswith("/recent-logs") or not isinstance(content, list):
        return content
    for number, entry in enumerate(content):
        entry["createdAt"] = DATES[number % len(DATES)]
        if number > len(DATES):
            del entry["createdAt"]
    return [*ODD, *content]


def test_listen_reads_entries_without_a_date_once(tmp_path: Path) -> None:
    """Each window has them again."""

    async def run() -> None:
        async with FakeLogto() as logto, proxy_of(logto, alter=without_dates) as url:
            logto.add_hook(NOBODY)
            api = client(logto, url)
            reader = LogReader(api, SystemClock(), lambda text: None, None, None)
            got: list[str | None] = []
            windows = 0

            async def read() -> int:
                nonlocal windows
                windows += 1
                got.extend([each.subject async for each in reader._read_window(begin)])
                return windows

            begin = await reader.begin() - 10_000
            created = {f"user:{logto.create_user()['id']}" for _ in range(2 * len(DATES))}
            await logto.settle()
            await eventually(read, lambda count: count > 3 and len(got) >= len(created))
            assert sorted(map(str, got)) == sorted(created)
            await api.close()

    asyncio.run(run())


def test_doctor_counts_the_entries_that_it_can_read(tmp_path: Path) -> None:
    """What it finds in the log is the same without the others."""
    found = []

    async def run() -> None:
        async with FakeLogto() as logto, proxy_of(logto, alter=add_odd) as url:
            logto.add_hook(NOBODY)
            logto.create_user()
            await logto.settle()
            for endpoint in (logto.url, url):
                read_settings = partial(
                    from_env,
                    {},
                    signing_key=logto.signing_key,
                    database_url=f"sqlite:///{tmp_path / 'a.db'}",
                    endpoint=endpoint,
                    app_id=logto.app_id,
                    app_secret=logto.app_secret,
                    api_budget=1000.0,
                )
                admin = Admin(read_settings)
                await admin.migrate()
                found.append({each.check: each.text for each in await admin.diagnose()})
                await admin.close()

    asyncio.run(run())
    usual, odd = found
    assert not any("unexpected" in text for text in odd.values()), odd
    assert odd["log"] == usual["log"]
