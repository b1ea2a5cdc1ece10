"""The thread that does what it is given, in order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from logto_webhooks.database.runner import HeldConnection
from logto_webhooks.database.threads import SerialExecutor
from logto_webhooks.errors import StoreUnavailable

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


def test_nothing_waits_for_a_thread_that_the_system_does_not_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is given now, or waits behind an abandoned call, fails at once: a read that never began
    would be waited for without limit."""
    lane, begun, gate = SerialExecutor("lane"), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait(20)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def fails(work: Callable[[], object]) -> None:
        with pytest.raises(StoreUnavailable, match="no more threads"):
            await asyncio.wait_for(lane.run(work), 10)

    async def main() -> None:
        stuck = asyncio.create_task(lane.run(wait))
        await asyncio.to_thread(begun.wait, 10)
        waiting = asyncio.create_task(fails(threading.get_ident))
        await asyncio.sleep(0)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            lane.abandon()
            await waiting
            await fails(threading.get_ident)
        assert await lane.run(lambda: 1) == 1
        gate.set()
        await stuck

    asyncio.run(main())
    lane.close(wait_s=1)


class Connection:
    """A driver's connection that can be cut off."""

    def __init__(self) -> None:
        self.is_cut = False

    def terminate(self) -> None:
        """Cut it off."""
        self.is_cut = True


def test_a_call_whose_end_is_cancelled_is_cut_off() -> None:
    """Its connection may be silent: nobody else would end it."""

    async def main() -> None:
        held, driver, abandoned = HeldConnection(), Connection(), asyncio.Event()
        held._driver = driver
        call: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ending = asyncio.create_task(held.end(call, lambda: None, abandoned.set))
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert driver.is_cut
        assert abandoned.is_set()

    asyncio.run(main())
