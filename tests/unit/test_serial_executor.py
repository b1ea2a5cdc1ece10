"""The thread that does what it is given, in order."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

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
