"""Threads: work in order, plain handlers that can be left behind, and SQLAlchemy's synchronous API
over a connection that lives on an event loop.

Python can't end a thread: a call that takes too long is left behind and counted.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from greenlet import greenlet

T = TypeVar("T")
_Work = tuple["Future[Any]", Callable[[], Any]]


class SerialExecutor:
    """It starts on first use, so that a server may fork before; again after a fork or `close`.

    Unlike an executor's thread, a process that ends doesn't wait for it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: Thread | None = None
        self._lock = Lock()  # loops of several threads may begin at once
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()

    async def run(self, work: Callable[[], T]) -> T:
        """Do that there. Raises what it raises."""
        done: Future[T] = Future()
        with self._lock:
            self._start()
            self._queue.put((done, work))
        return await asyncio.wrap_future(done)

    def close(self, wait_s: float) -> None:
        """Let the thread end once it has done all; wait so long for that, at most."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._queue.put(None)
        if thread is not None:
            thread.join(wait_s)

    def leave(self) -> Thread | None:
        """Leave the thread behind in what it does; the next work has another."""
        thread = self._thread
        self.close(wait_s=0)
        return thread

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._queue = SimpleQueue()
            self._thread = Thread(target=_do_all, args=(self._queue,), name=self._name, daemon=True)
            self._thread.start()


def _do_all(queue: SimpleQueue[_Work | None]) -> None:
    while (work := queue.get()) is not None:
        _do(*work)
        del work  # or it would live, with all it holds, until the next one comes


def _do(done: Future[Any], work: Callable[[], Any]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except StopIteration as error:  # a future can't hold it
        done.set_exception(RuntimeError(f"it raised {error!r}"))
    except BaseException as error:
        done.set_exception(error)


MOST_OF_ONE: Final = 8  # calls left behind by one handler
MOST: Final = 24  # and threads by all handlers of a process
# Whether this code runs for a handler that has the database's one writer.
HAS_WRITER: Final = contextvars.ContextVar("logto_webhooks_has_writer", default=False)


class AbandonedCalls:
    """The handlers' calls that still run although nobody waits for them, in threads or tasks."""

    def __init__(self, report: Callable[[str, str], object] = lambda handler, stack: None) -> None:
        """`report` is told of each coroutine that is left behind: its handler, and where it is."""
        self.report = report
        self._lock = Lock()
        self._calls: set[Detachable] = set()

    def add(self, call: Detachable) -> None:
        """Count a call, unless it is over."""
        with self._lock:
            if not call.is_over:
                self._calls.add(call)

    def end(self, call: Detachable) -> None:
        """Count it no longer: it is over."""
        with self._lock:
            call.is_over = True
            self._calls.discard(call)

    def cancel(self) -> None:
        """Ask those that can be asked to end."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def counts(self) -> Counter[str]:
        """How many calls each handler left behind."""
        if not self._calls:  # as nearly always
            return Counter()
        with self._lock:
            return Counter(call.handler for call in self._calls)


class Running(NamedTuple):
    """The handler for which code runs, and where its calls are counted that are left behind."""

    handler: str
    left: AbandonedCalls


RUNNING: Final[contextvars.ContextVar[Running | None]] = contextvars.ContextVar(
    "logto_webhooks_running", default=None
)


class Detachable:
    """A call that can be left behind, and is counted until it ends."""

    def __init__(self) -> None:
        running = RUNNING.get()
        self.handler = running.handler if running else ""
        self._left = running.left if running else AbandonedCalls()
        self.is_over = True  # until it starts

    def cancel(self) -> None:
        """Ask it to end, if it can be asked."""


class DetachedCall(Detachable, Generic[T]):
    """One call in a thread of its own."""

    def __init__(self, *, has_writer: bool = False) -> None:
        """`has_writer`: whether nobody else can write to the database meanwhile."""
        super().__init__()
        self._done: Future[T] = Future()
        self._context = contextvars.copy_context()
        self._context.run(HAS_WRITER.set, has_writer)

    async def run(self, work: Callable[[], T]) -> T:
        """Call, and await the result; who is cancelled leaves it behind. Raises what it raises."""
        self._start(work)
        try:
            return await asyncio.wrap_future(self._done)
        except asyncio.CancelledError:
            self.leave()
            raise

    def wait(self, work: Callable[[], T], longest_s: float | None) -> bool:
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
                self._done.set_exception(_to_error(error))
        else:
            self._left.end(self)
            with suppress(InvalidStateError):
                self._done.set_result(result)


def _to_error(error: BaseException) -> BaseException:
    # These would end the event loop, or the coroutine that waits, and not be raised there.
    ends = issubclass(type(error), (StopIteration, GeneratorExit, SystemExit, KeyboardInterrupt))
    return RuntimeError(f"the handler raised {type(error).__name__}") if ends else error


END_S: Final = 1.0


class GreenletBridge:
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
        inner = _make_greenlet(work)
        result: Any = inner.switch()
        while not inner.dead:
            try:
                value = self._await(result)
            except BaseException:
                result = inner.throw(*sys.exc_info())
            else:
                result = inner.switch(value)
        return cast(T, result)

    async def close(self) -> None:
        """Let the thread do nothing more; a statement that runs is cancelled."""
        with self._lock:
            self._closed = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=END_S)

    def _await(self, awaitable: Awaitable[Any]) -> Any:
        coroutine = self._run_on_loop(awaitable)
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
            _forget(awaitable)
            raise CancelledError() from None
        return future.result()

    async def _run_on_loop(self, awaitable: Awaitable[Any]) -> Any:
        with self._lock:
            closed = self._closed
        if closed:
            _forget(awaitable)
            raise CancelledError()
        self._task = asyncio.current_task()
        return await awaitable


def _make_greenlet(work: Callable[[], Any]) -> greenlet:
    """What SQLAlchemy switches out of when its drivers have to wait."""
    # It comes with the extras of PostgreSQL's drivers.
    from greenlet import getcurrent, greenlet

    parent = getcurrent()
    child = greenlet(work, parent)
    child.gr_context = parent.gr_context
    child.__sqlalchemy_greenlet_provider__ = True
    return child


def _forget(awaitable: Awaitable[Any]) -> None:
    if asyncio.iscoroutine(awaitable):
        awaitable.close()  # or Python would warn that it was never awaited
