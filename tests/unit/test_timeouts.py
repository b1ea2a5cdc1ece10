"""Many time limits, one timer."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable

import pytest

from logto_webhooks.ingest.body import SharedTimeout

SHORT_S = 0.05


class _Selector(selectors.SelectSelector):
    """Waits for nothing: it says how long it would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.waited_s += max(timeout or 0, 0)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    """Its time passes only while all tasks wait: so the machine's speed doesn't count."""

    def __init__(self) -> None:
        self._waits = _Selector()
        super().__init__(self._waits)

    def time(self) -> float:
        return self._waits.waited_s


def run(
    test: Callable[[SharedTimeout], Awaitable[None]], patience: SharedTimeout | None = None
) -> None:
    """In a loop of its own, which nothing is left in."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        problems: list[object] = []
        loop.set_exception_handler(lambda _, told: problems.append(told))
        await asyncio.wait_for(test(patience or SharedTimeout(SHORT_S)), 10)
        assert problems == []

    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(main())


async def forever(patience: SharedTimeout) -> None:
    with patience.limit():
        await asyncio.Event().wait()


def test_who_waits_too_long_is_told() -> None:
    """And nobody before the time."""

    async def test(patience: SharedTimeout) -> None:
        started = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            await forever(patience)
        assert asyncio.get_running_loop().time() - started == pytest.approx(SHORT_S)

    run(test)


def test_each_has_its_own_time() -> None:
    """Who came later, while others wait or after they are done, waits as long."""

    async def test(patience: SharedTimeout) -> None:
        loop, ended = asyncio.get_running_loop(), list[float]()

        async def one(after_s: float) -> None:
            await asyncio.sleep(after_s)
            started = loop.time()
            with pytest.raises(TimeoutError):
                await forever(patience)
            ended.append(loop.time() - started)

        async def quick() -> None:
            for _ in range(100):
                with patience.limit():
                    await asyncio.sleep(0.001)

        await asyncio.gather(*(one(n * SHORT_S / 5) for n in range(10)), quick())
        assert len(ended) == 10
        assert ended == pytest.approx([SHORT_S] * 10)

    run(test)


def test_who_is_cancelled_is_cancelled() -> None:
    """By somebody else: that is no TimeoutError, and stays in force."""

    async def test(patience: SharedTimeout) -> None:
        task = asyncio.create_task(forever(patience))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(SHORT_S * 2)

    run(test)


def test_a_block_that_ends_in_time_is_left_alone() -> None:
    """Its task goes on, and an error that it raises is its own."""

    async def test(patience: SharedTimeout) -> None:
        with patience.limit():
            await asyncio.sleep(0)
        with pytest.raises(ValueError, match="mine"), patience.limit():
            raise ValueError("mine")
        await asyncio.sleep(SHORT_S * 2)
        assert asyncio.current_task() is not None

    run(test)


def test_it_can_be_used_in_one_loop_after_another() -> None:
    """As an application that is started again does."""
    patience = SharedTimeout(SHORT_S)

    async def test(patience: SharedTimeout) -> None:
        with patience.limit():
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await forever(patience)

    run(test, patience)
    run(test, patience)
