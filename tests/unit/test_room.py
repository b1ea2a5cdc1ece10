"""Room for what is in flight."""

from __future__ import annotations

import asyncio

from logto_webhooks.adapters.room import Room


def test_who_finds_no_room_waits_in_line() -> None:
    """No more than the total is held, and nobody overtakes."""

    async def live() -> tuple[list[int], int]:
        room, order, held, most = Room(10), [], [0], [0]

        async def hold(number: int, size: int) -> None:
            taken = await room.take(size)
            order.append(number)
            held[0] += size
            most[0] = max(most[0], held[0])
            await asyncio.sleep(0)
            held[0] -= size
            room.give_back(taken)

        sizes = [6, 6, 1, 10, 3, 3, 3, 3]
        await asyncio.gather(*[hold(number, size) for number, size in enumerate(sizes)])
        return order, most[0]

    order, most = asyncio.run(live())
    assert order == list(range(8))
    assert most <= 10


def test_more_than_there_is_takes_all() -> None:
    """Instead of waiting for ever."""

    async def live() -> bool:
        room = Room(10)
        all_of_it = await room.take(99)
        waiting = asyncio.ensure_future(room.take(1))
        await asyncio.sleep(0)
        alone = not waiting.done()
        room.give_back(all_of_it)
        assert await waiting == 1
        return alone

    assert asyncio.run(live())


def test_who_gives_up_leaves_no_gap() -> None:
    """What it would have held is there for the next."""

    async def live() -> None:
        room = Room(10)
        taken = await room.take(8)
        given_up = asyncio.ensure_future(room.take(8))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        room.give_back(taken)
        async with asyncio.timeout(1):
            assert await room.take(10) == 10

    asyncio.run(live())
