"""Room for what is in flight."""

from __future__ import annotations

import asyncio

import pytest

from logto_webhooks.errors import NoRoom
from logto_webhooks.ingest import body as body_module
from logto_webhooks.ingest.body import ByteLimiter, RequestBody

LARGE = body_module.SMALL * 2


def test_what_only_begins_holds_nothing() -> None:
    """Room is taken as bytes arrive, whatever a request announces."""

    async def live() -> None:
        room = ByteLimiter(LARGE * 8)
        _ = [RequestBody(room, 0) for _ in range(1_000)]
        body = RequestBody(room, 0)
        async with asyncio.timeout(0.5):
            await body.add(b"x" * LARGE, False)
        assert body.whole() == b"x" * LARGE

    asyncio.run(live())


def test_the_slow_make_room() -> None:
    """Those that hold the most for the longest time go first; a whole body and a young one stay."""

    async def live() -> None:
        now = asyncio.get_running_loop().time()
        room = ByteLimiter(LARGE * 8)
        stored, old, older, young = (RequestBody(room, now - age) for age in (9, 3, 7, 0))
        for body in (old, older, young):
            await body.add(b"x" * LARGE, True)
        await stored.add(b"s" * LARGE * 4, False)
        assert stored.whole()
        new = RequestBody(room, now)
        async with asyncio.timeout(0.5):
            await new.add(b"n" * LARGE, False)
        with pytest.raises(NoRoom):
            await older.add(b"", True)
        for body in (old, young):
            await body.add(b"", False)
            assert body.whole()

    asyncio.run(live())


def test_small_ones_have_room_of_their_own() -> None:
    """However many large ones have just begun."""

    async def live() -> None:
        now = asyncio.get_running_loop().time()
        room = ByteLimiter(LARGE * 8)
        large = [RequestBody(room, now) for _ in range(7)]
        for body in large:
            await body.add(b"x" * LARGE, True)
        async with asyncio.timeout(0.5):
            await RequestBody(room, now).add(b"x" * body_module.SMALL, False)

    asyncio.run(live())


def test_who_waits_is_served_the_smallest_first_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for longer than the limit."""
    monkeypatch.setattr(body_module, "WAIT_S", 0.3)

    async def live() -> tuple[list[str], float]:
        loop = asyncio.get_running_loop()
        now = loop.time()
        room, order = ByteLimiter(LARGE * 4), list[str]()
        stored = RequestBody(room, now)
        await stored.add(b"s" * LARGE * 3, False)
        stored.whole()
        rest = RequestBody(room, now)
        await rest.add(b"s" * body_module.SMALL, False)
        rest.whole()

        async def ask(name: str, size: int) -> None:
            body = RequestBody(room, now + 60)
            try:
                await body.add(b"x" * size, False)
            except NoRoom:
                order.append(f"{name} refused")
            else:
                order.append(name)

        asks = [ask("large", LARGE), ask("small", 1_000), ask("huge", LARGE * 4)]
        waiting = asyncio.gather(*asks)
        await asyncio.sleep(0)
        rest.close()
        await asyncio.sleep(0)
        stored.close()
        await waiting
        return order, loop.time() - now

    order, took = asyncio.run(live())
    assert sorted(order[:2]) == ["large", "small"]
    assert order[2:] == ["huge refused"]
    assert took < 2


def test_who_gives_up_leaves_no_gap() -> None:
    """What it would have held is there for the next."""

    async def live() -> None:
        now = asyncio.get_running_loop().time()
        room = ByteLimiter(LARGE)
        first = RequestBody(room, now)
        await first.add(b"x" * (LARGE - LARGE // 8), False)
        first.whole()
        given_up = asyncio.ensure_future(RequestBody(room, now).add(b"x" * LARGE, False))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        first.close()
        async with asyncio.timeout(1):
            await RequestBody(room, now).add(b"x" * (LARGE - LARGE // 8), False)

    asyncio.run(live())


def test_what_cannot_be_signed_is_counted_and_not_kept() -> None:
    """It takes no room."""

    async def live() -> None:
        room = ByteLimiter(LARGE)
        junk = RequestBody(room, 0, keep=False)
        for _ in range(100):
            await junk.add(b"x" * LARGE, True)
        assert junk.size == 100 * LARGE
        assert junk.whole() == b""

    asyncio.run(live())
