"""SQLAlchemy's synchronous API in a thread, over a connection that lives on an event loop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from threading import Lock
from typing import Any, Final, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")
END_S: Final = 1.0


class Crossing:
    """Sends what a thread waits for to the loop, one statement at a time.

    `AsyncConnection.run_sync` runs a function on the loop itself, so whatever blocks in it blocks
    the loop. Here the function has a thread, and only its statements run on the loop.
    """

    def __init__(self) -> None:
        """Made on the loop of the connection."""
        self._loop = asyncio.get_running_loop()
        self._lock = Lock()
        self._closed = False
        self._task: asyncio.Task[Any] | None = None

    def run(self, work: Callable[[], T]) -> T:
        """Run a function that uses the connection, on this thread. Raises what it raises, and in
        it CancelledError once this is closed."""
        inner = _switchable(work)
        result: Any = inner.switch()
        while not inner.dead:
            try:
                value = self._awaited(result)
            except BaseException:
                result = inner.throw(*sys.exc_info())
            else:
                result = inner.switch(value)
        done: T = result
        return done

    async def close(self) -> None:
        """Let the thread do nothing more; a statement that runs is cancelled."""
        with self._lock:
            self._closed = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=END_S)

    def _awaited(self, awaitable: Awaitable[Any]) -> Any:
        running = self._on_the_loop(awaitable)
        done: Future[Any]
        try:
            done = asyncio.run_coroutine_threadsafe(running, self._loop)
        except RuntimeError:  # the loop is closed
            running.close()
            _forget(awaitable)
            raise CancelledError() from None
        return done.result()

    async def _on_the_loop(self, awaitable: Awaitable[Any]) -> Any:
        with self._lock:
            closed = self._closed
        if closed:
            _forget(awaitable)
            raise CancelledError()
        self._task = asyncio.current_task()
        return await awaitable


def _switchable(work: Callable[[], Any]) -> greenlet:
    """What SQLAlchemy switches out of when its drivers have to wait."""
    parent = getcurrent()
    made = greenlet(work, parent)
    made.gr_context = parent.gr_context
    made.__sqlalchemy_greenlet_provider__ = True
    return made


def _forget(awaitable: Awaitable[Any]) -> None:
    if asyncio.iscoroutine(awaitable):
        awaitable.close()  # or Python would warn that it was never awaited
