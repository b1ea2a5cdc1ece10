"""An event loop in a thread of its own, for code that may block, stop or end its loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from threading import Thread
from typing import Any, Final

END_S: Final = 2.0
AGAIN_S: Final = 0.1
NOT_CANCELLED: Final = "ended without what a handler left running and couldn't be cancelled"
logger = logging.getLogger("logto_webhooks")
Main = Callable[[], Coroutine[Any, Any, None]]


class Apart:
    """Runs one coroutine function on that loop until it returns, whatever happens to the loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, function: Callable[[], object]) -> None:
        """Call it on the loop soon, from any thread; not if that has ended."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # closed just now
                loop.call_soon_threadsafe(function)

    async def run(self, main: Main) -> None:
        """Run, and wait for the end; who is cancelled leaves the thread behind.

        Raises what `main` raises. If somebody else cancels it, it is called again.
        """
        done: Future[None] = Future()
        loop = self._loop = asyncio.new_event_loop()
        Thread(target=self._work, args=(loop, main, done), name=self._name, daemon=True).start()
        await asyncio.wrap_future(done)

    def _work(self, loop: asyncio.AbstractEventLoop, main: Main, done: Future[None]) -> None:
        asyncio.set_event_loop(loop)
        error = None
        try:
            _run(loop, main)
            _end(loop)
        except BaseException as raised:
            error = raised
        finally:
            self._loop = None
            with suppress(RuntimeError):
                loop.close()
        with suppress(InvalidStateError):  # nobody waits for it any more
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)


def _run(loop: asyncio.AbstractEventLoop, main: Main) -> None:
    task = loop.create_task(main())
    task.add_done_callback(lambda _: loop.stop())
    while not task.done():
        _go_on(loop, "a handler stopped its event loop; it goes on", task.done)
        if task.cancelled():
            logger.error("a handler cancelled tasks that aren't its own; they begin again")
            task = loop.create_task(_after(AGAIN_S, main))
            task.add_done_callback(lambda _: loop.stop())
    task.result()


async def _after(seconds: float, main: Main) -> None:
    await asyncio.sleep(seconds)
    await main()


def _go_on(loop: asyncio.AbstractEventLoop, stopped: str, done: Callable[[], bool]) -> None:
    try:
        loop.run_forever()
    except BaseException as error:
        # A task's SystemExit or KeyboardInterrupt: asyncio lets them through, and would end.
        name = type(error).__name__
        logger.error("%s was raised in a task of a handler; its event loop goes on", name)
    else:
        if not done():
            logger.error(stopped)


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what handlers left running, and wait for that a little."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()

    async def end() -> None:
        if left:
            _, still = await asyncio.wait(left, timeout=END_S)
            if still:
                logger.warning(NOT_CANCELLED)
        await loop.shutdown_asyncgens()

    with suppress(BaseException):
        loop.run_until_complete(end())
