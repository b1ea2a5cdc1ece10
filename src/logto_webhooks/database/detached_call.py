"""Call plain handlers in threads that can be left behind.

Python can't end a thread: a call that takes too long is left behind and counted.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from threading import Lock, Thread
from typing import Any, Final, Generic, NamedTuple, TypeVar

T = TypeVar("T")
MOST_OF_ONE: Final = 8  # threads left behind by one handler
MOST: Final = 24  # and by all handlers of a process
# Whether this code runs for a handler that has the database's one writer.
HAS_WRITER: Final = contextvars.ContextVar("logto_webhooks_has_writer", default=False)


class AbandonedCalls:
    """The handlers' threads that still run although nobody waits for them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._calls: set[DetachedCall[Any]] = set()

    def add(self, call: DetachedCall[Any]) -> None:
        """Count a call, unless it is over."""
        with self._lock:
            if not call.is_over:
                self._calls.add(call)

    def end(self, call: DetachedCall[Any]) -> None:
        """Count it no longer: its thread is about to end."""
        with self._lock:
            call.is_over = True
            self._calls.discard(call)

    def counts(self) -> Counter[str]:
        """How many threads each handler left behind."""
        if not self._calls:  # as nearly always
            return Counter()
        with self._lock:
            return Counter(each.handler for each in self._calls)


class Running(NamedTuple):
    """The handler for which code runs, and where its threads are counted that are left behind."""

    handler: str
    left: AbandonedCalls


RUNNING: Final[contextvars.ContextVar[Running | None]] = contextvars.ContextVar(
    "logto_webhooks_running", default=None
)


class DetachedCall(Generic[T]):
    """One call in a thread of its own."""

    def __init__(self, *, has_writer: bool = False) -> None:
        """`has_writer`: whether nobody else can write to the database meanwhile."""
        running = RUNNING.get()
        self.handler = running.handler if running else ""
        self._left = running.left if running else AbandonedCalls()
        self.is_over = True  # until it starts
        self._done: Future[T] = Future()
        self._context = contextvars.copy_context()
        self._context.run(HAS_WRITER.set, has_writer)

    async def awaited(self, work: Callable[[], T]) -> T:
        """Call, and wait until it is done; who is cancelled leaves it behind.

        Raises what it raises.
        """
        self._start(work)
        try:
            return await asyncio.wrap_future(self._done)
        except asyncio.CancelledError:
            self.leave()
            raise

    def waited(self, work: Callable[[], T], longest_s: float | None) -> bool:
        """Call, and block this thread until it is done; False if it was left behind meanwhile, or
        took longer. Raises what it raises."""
        self._start(work)
        # Ours, that of `leave`, or the handler's own, which is raised below.
        with suppress(TimeoutError, CancelledError):
            self._done.exception(longest_s)
        if self._done.cancelled() or not self._done.done():
            self.leave()
            return False
        self._done.result()
        return True

    def leave(self) -> None:
        """Stop waiting, from any thread. What is done already stays done."""
        self._done.cancel()
        self._left.add(self)

    def _start(self, work: Callable[[], T]) -> None:
        if self._done.cancelled():
            return
        self.is_over = False
        # No process waits for a daemon when it ends.
        thread = Thread(target=self._run, args=(work,), name="logto-handler", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more
            self.is_over = True
            raise

    def _run(self, work: Callable[[], T]) -> None:
        try:
            result = self._context.run(work)
        except BaseException as error:
            self._left.end(self)
            with suppress(InvalidStateError):
                self._done.set_exception(_as_an_error(error))
        else:
            self._left.end(self)
            with suppress(InvalidStateError):
                self._done.set_result(result)


def _as_an_error(error: BaseException) -> BaseException:
    # These would end the event loop, or the coroutine that waits, and not be raised there.
    ends = isinstance(error, StopIteration | GeneratorExit | SystemExit | KeyboardInterrupt)
    return RuntimeError(f"the handler raised {type(error).__name__}") if ends else error
