"""Threads for serial work, for synchronous handlers, and for SQLAlchemy's synchronous API on a
connection of an event loop.

Python can't end a thread, so a call that takes too long is abandoned and counted.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar, cast

from logto_webhooks.errors import StoreUnavailable
from logto_webhooks.event_loop import run_for, start_thread, to_error

if TYPE_CHECKING:
    from greenlet import greenlet

T = TypeVar("T")
_Work = tuple["Future[Any]", Callable[[], Any]]


class SerialExecutor:
    """Runs work in one thread, in order. The thread starts on first use, so that a server may fork
    before. It starts again after a fork or `close`.

    Unlike with an executor of the standard library, an exiting process doesn't wait for it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: Thread | None = None
        self._lock = Lock()  # event loops of several threads may start it at once
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()

    async def run(self, work: Callable[[], T]) -> T:
        """Run work in the thread. Raises what it raises, and StoreUnavailable if the system has no
        more threads."""
        done: Future[T] = Future()
        with self._lock:
            self._start()
            self._queue.put((done, work))
        return await asyncio.wrap_future(done)

    def close(self, wait_s: float) -> None:
        """Let the thread end after the queued work. Wait for that, but at most `wait_s`."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._queue.put(None)
        if thread is not None:
            thread.join(wait_s)

    def abandon(self) -> Thread | None:
        """Abandon the thread, and return it. A new one does the queued work."""
        waiting: list[_Work | None] = []
        with self._lock:
            thread, self._thread = self._thread, None
            with suppress(Empty):
                while True:
                    waiting.append(self._queue.get_nowait())
            self._queue.put(None)
            try:
                if waiting:
                    self._start()
            except StoreUnavailable as error:
                for done, _ in filter(None, waiting):
                    if done.set_running_or_notify_cancel():
                        done.set_exception(error)
            else:
                for work in waiting:
                    self._queue.put(work)
        return thread

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._queue = SimpleQueue()
            self._thread = Thread(target=_serve, args=(self._queue,), name=self._name, daemon=True)
            start_thread(self._thread)


def _serve(queue: SimpleQueue[_Work | None]) -> None:
    while (work := queue.get()) is not None:
        run_for(*work)
        del work  # or it would live, with all it refers to, until the next work arrives


MOST_OF_ONE: Final = 8  # abandoned calls of one handler
MOST: Final = 24  # abandoned threads of all handlers in a process
# Whether this code runs for a handler that holds the database's only writer.
HAS_WRITER: Final = contextvars.ContextVar("logto_webhooks_has_writer", default=False)


class AbandonedCalls:
    """Calls of handlers that still run, in threads or tasks, although nobody waits for them."""

    def __init__(self, report: Callable[[str, str], object] = lambda handler, stack: None) -> None:
        """`report` is called for each abandoned coroutine, with its handler and stack."""
        self.report = report
        self._lock = Lock()
        self._calls: set[Detachable] = set()

    def add(self, call: Detachable) -> None:
        """Count a call, unless it is over."""
        with self._lock:
            if not call.is_over:
                self._calls.add(call)

    def end(self, call: Detachable) -> None:
        """Stop counting a call, because it is over."""
        with self._lock:
            call.is_over = True
            self._calls.discard(call)

    def cancel(self) -> None:
        """Cancel the calls that can be cancelled."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def counts(self) -> Counter[str]:
        """Return how many abandoned calls each handler has."""
        if not self._calls:  # the usual case
            return Counter()
        with self._lock:
            return Counter(call.handler for call in self._calls)


class Running(NamedTuple):
    """The handler that the current code runs for, and where its abandoned calls are counted."""

    handler: str
    abandoned: AbandonedCalls


RUNNING: Final[contextvars.ContextVar[Running | None]] = contextvars.ContextVar(
    "logto_webhooks_running", default=None
)


class Detachable:
    """A call that can be abandoned, and is then counted until it ends."""

    def __init__(self, abandoned: AbandonedCalls | None = None) -> None:
        """`abandoned` counts it instead of the running handler's."""
        running = RUNNING.get() if abandoned is None else None
        self.handler = running.handler if running else ""
        self._abandoned = running.abandoned if running else abandoned or AbandonedCalls()
        self.is_over = True  # until it starts

    def cancel(self) -> None:
        """Cancel the call, if it can be cancelled."""


class DetachedCall(Detachable, Generic[T]):
    """A call in its own thread."""

    def __init__(
        self, abandoned: AbandonedCalls | None = None, *, has_writer: bool = False
    ) -> None:
        """`has_writer`: whether the call holds the database's only writer."""
        super().__init__(abandoned)
        self._done: Future[T] = Future()
        self._context = contextvars.copy_context()
        self._context.run(HAS_WRITER.set, has_writer)

    async def run(self, work: Callable[[], T]) -> T:
        """Call `work` and await the result. Abandon the call if this is cancelled. Raises what it
        raises."""
        self._start(work)
        try:
            return await asyncio.wrap_future(self._done)
        except asyncio.CancelledError:
            self.abandon()
            raise

    def wait(self, work: Callable[[], T], longest_s: float | None) -> bool:
        """Call `work` and block this thread until it is done. Return False if the call was
        abandoned, or takes longer than `longest_s`. Raises what it raises."""
        self._start(work)
        # From the time limit, from `abandon`, or the handler's own, which is raised below.
        with suppress(TimeoutError, CancelledError):
            self._done.exception(longest_s)
        if self._done.cancelled() or not self._done.done():
            self.abandon()
            return False
        self._done.result()
        return True

    def abandon(self) -> None:
        """Abandon the call, from any thread. If it is done already, it stays done."""
        self._done.cancel()
        self._abandoned.add(self)

    def _start(self, work: Callable[[], T]) -> None:
        if self._done.cancelled():
            return
        self.is_over = False
        # An exiting process doesn't wait for a daemon thread.
        thread = Thread(target=self._run, args=(work,), name="logto-handler", daemon=True)
        try:
            start_thread(thread)
        except StoreUnavailable:
            self.is_over = True
            raise

    def _run(self, work: Callable[[], T]) -> None:
        try:
            result = self._context.run(work)
        except BaseException as error:
            self._abandoned.end(self)
            with suppress(InvalidStateError):
                self._done.set_exception(to_error(error))
        else:
            self._abandoned.end(self)
            with suppress(InvalidStateError):
                self._done.set_result(result)


END_S: Final = 1.0


class GreenletBridge:
    """Runs a function in a thread, and only its statements on the event loop, one at a time.

    `AsyncConnection.run_sync` runs the whole function on the loop, so whatever blocks in it blocks
    the loop.
    """

    def __init__(self) -> None:
        """Call this on the event loop of the connection."""
        self._loop = asyncio.get_running_loop()
        self._lock = Lock()
        self._closed = False
        self._dropped = Event()  # set when nothing is left of the connection
        self._task: asyncio.Task[Any] | None = None

    def run(self, work: Callable[[], T]) -> T:
        """Run a function that uses the connection, in this thread. Raises what it raises. Once the
        bridge is closed, statements in the function raise CancelledError."""
        inner = _make_greenlet(work)
        result: Any = inner.switch()
        while not inner.dead:
            try:
                value = self._await(result)
            except BaseException:
                with _closing_by_force():
                    result = inner.throw(*sys.exc_info())
            else:
                result = inner.switch(value)
        return cast(T, result)

    async def close(self, drop: Callable[[], Awaitable[None]]) -> None:
        """Cancel the statement that runs, refuse further ones, and drop the connection. The thread
        goes on only after that: SQLAlchemy couldn't drop it there, without an event loop."""
        with self._lock:
            self._closed = True
        try:
            if self._task is not None and not self._task.done():
                self._task.cancel()
                await asyncio.wait([self._task], timeout=END_S)
            await drop()
        finally:
            self._dropped.set()

    def _await(self, awaitable: Awaitable[Any]) -> Any:
        coroutine = self._run_on_loop(awaitable)
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
            _close(awaitable)
            raise CancelledError() from None
        try:
            return future.result()
        except BaseException:
            if self._closed:
                self._dropped.wait()
            raise

    async def _run_on_loop(self, awaitable: Awaitable[Any]) -> Any:
        with self._lock:
            closed = self._closed
        if closed:
            _close(awaitable)
            raise CancelledError()
        self._task = asyncio.current_task()
        return await awaitable


class _NoLoop(asyncio.AbstractEventLoop):
    """The event loop of a thread that has none."""

    def create_task(self, coro: Any, **options: Any) -> Any:
        """Refuse. SQLAlchemy takes this for a connection that can't be closed in time."""
        coro.close()
        raise TimeoutError


@contextmanager
def _closing_by_force() -> Iterator[None]:
    """Let SQLAlchemy close a connection that failed by force: it would do so by a task, but this
    thread has no event loop."""
    loop: Any = _NoLoop  # a type checker wants all methods
    asyncio.set_event_loop(loop())
    try:
        yield
    finally:
        asyncio.set_event_loop(None)


def _make_greenlet(work: Callable[[], Any]) -> greenlet:
    """Return the greenlet that SQLAlchemy switches out of when a driver has to wait."""
    # greenlet comes with the extras of PostgreSQL's drivers.
    from greenlet import getcurrent, greenlet

    parent = getcurrent()
    child = greenlet(work, parent)
    child.gr_context = parent.gr_context
    child.__sqlalchemy_greenlet_provider__ = True
    return child


def _close(awaitable: Awaitable[Any]) -> None:
    if asyncio.iscoroutine(awaitable):
        awaitable.close()  # or Python would warn that it was never awaited
