"""A thread that runs work in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

T = TypeVar("T")
_Work = tuple["Future[Any]", Callable[[], Any]]


class SerialExecutor:
    """It starts on first use, so that a server may fork before; again after a fork or `close`.

    Unlike an executor's thread, a process that ends doesn't wait for it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: Thread | None = None
        self._alone = Lock()  # loops of several threads may begin at once
        self._given: SimpleQueue[_Work | None] = SimpleQueue()

    async def run(self, work: Callable[[], T]) -> T:
        """Do that there. Raises what it raises."""
        done: Future[T] = Future()
        with self._alone:
            self._start()
            self._given.put((done, work))
        return await asyncio.wrap_future(done)

    def close(self, wait_s: float) -> None:
        """Let the thread end once it has done all; wait so long for that, at most."""
        with self._alone:
            thread, self._thread = self._thread, None
            self._given.put(None)
        if thread is not None:
            thread.join(wait_s)

    def leave(self) -> Thread | None:
        """Leave the thread behind in what it does; the next work has another."""
        thread = self._thread
        self.close(wait_s=0)
        return thread

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._given = SimpleQueue()
            self._thread = Thread(target=_do_all, args=(self._given,), name=self._name, daemon=True)
            self._thread.start()


def _do_all(given: SimpleQueue[_Work | None]) -> None:
    while (each := given.get()) is not None:
        _do(*each)
        del each  # or it would live, with all it holds, until the next one comes


def _do(done: Future[Any], work: Callable[[], Any]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except StopIteration as error:  # a future can't hold it
        done.set_exception(RuntimeError(f"it raised {error!r}"))
    except BaseException as error:
        done.set_exception(error)
