"""The thread that does what it is given, in order."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from logto_webhooks.database.threads import SerialExecutor

LOOPS = 8


def test_there_is_one_thread_whoever_begins() -> None:
    """Loops of several threads that begin at once share it."""
    for _ in range(100):
        lane, together = SerialExecutor("lane"), threading.Barrier(LOOPS)

        def begin(lane: SerialExecutor, together: threading.Barrier) -> int:
            together.wait()
            return asyncio.run(lane.run(threading.get_ident))

        with ThreadPoolExecutor(LOOPS) as loops:
            begun = [loops.submit(begin, lane, together) for _ in range(LOOPS)]
            assert len({each.result(10) for each in begun}) == 1
        lane.close(wait_s=1)


def test_what_is_given_while_it_is_closed_is_done() -> None:
    """By the thread of before or by the next one; never by nobody."""
    lane = SerialExecutor("lane")

    async def count(to: int) -> int:
        return sum([await asyncio.wait_for(lane.run(lambda: 1), 10) for _ in range(to)])

    with ThreadPoolExecutor(1) as beside:
        counted = beside.submit(asyncio.run, count(500))
        while not counted.done():
            lane.close(wait_s=0)
        assert counted.result() == 500
    lane.close(wait_s=1)


def test_what_waits_behind_an_abandoned_call_is_done() -> None:
    """By another thread, in order."""
    lane, done = SerialExecutor("lane"), list[int]()
    begun, gate = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait(20)

    async def main() -> None:
        stuck = asyncio.create_task(lane.run(wait))
        await asyncio.to_thread(begun.wait, 10)
        works = [lane.run(partial(done.append, number)) for number in range(3)]
        waiting = asyncio.gather(*works)
        await asyncio.sleep(0)
        thread = lane.abandon()
        await asyncio.wait_for(waiting, 10)
        gate.set()
        await stuck
        assert thread
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()

    asyncio.run(main())
    assert done == [0, 1, 2]
    lane.close(wait_s=1)
