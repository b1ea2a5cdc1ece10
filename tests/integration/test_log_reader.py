"""How `listen` reads Logto's log: windows that overlap, and each delivery once."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope, Send

from logto_webhooks.listen.log_reader import LogReader
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.testing import FrozenClock
from logto_webhooks.testing.fake import FakeLogto
from logto_webhooks.testing.fake.app import serve
from tests.integration.test_stores import T0
from tests.support.waiting import eventually

NOBODY = "http://127.0.0.1:9/"


def test_a_copy_that_ended_later_is_still_one() -> None:
    """Of a webhook that answers at once, and one that takes Logto's 10 s: until both are old."""
    clock = FrozenClock(T0)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        clock.tick(10)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def main() -> None:
        got: list[str | None] = []

        async def collect(reader: LogReader) -> None:
            async for each in reader.deliveries(await reader.begin(), poll_s=0.0):
                got.append(each.subject)

        async def seen() -> list[str | None]:
            return got

        async with serve(slow, 0) as url, FakeLogto(at_once=1, now=clock.now) as logto:
            for to in (NOBODY, url):
                logto.add_hook(to)
            api = ManagementClient(
                logto.url, logto.app_id, logto.app_secret, now=clock, budget=100_000
            )
            ana = logto.create_user()
            await logto.settle()
            clock.tick(2)
            reading = asyncio.create_task(collect(LogReader(api, clock, print, None, T0 - 1_000)))
            await eventually(seen, lambda found: len(found) == 1)
            for _ in range(20):
                clock.tick(1)
                await asyncio.sleep(0.05)
            bo = logto.create_user()
            await logto.settle()
            clock.tick(2)
            await eventually(seen, lambda found: f"user:{bo['id']}" in found)
            reading.cancel()
            assert got == [f"user:{ana['id']}", f"user:{bo['id']}"]
            await api.close()

    asyncio.run(main())
