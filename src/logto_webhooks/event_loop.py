"""Event loops: steps repeated forever, signals, and a loop in its own thread."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from contextlib import asynccontextmanager, suppress
from functools import partial
from threading import Thread
from typing import Any, Final, TypeVar, cast

from logto_webhooks.errors import LogtoWebhooksError, StoreUnavailable, describe

T = TypeVar("T")
logger = logging.getLogger("logto_webhooks")


def is_loop_running() -> bool:
    """Whether an event loop runs in this thread."""
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        return True
    return False


async def forever(
    step: Callable[[], Awaitable[object]],
    pause_s: float,
    failed: Callable[[Exception], float] | None = None,
) -> None:
    """Repeat a step, with a pause after each, until cancelled.

    `failed` reports an error and returns the pause after it. Without it, the package's own errors
    are ignored, because others report an unreachable database. All other errors are logged.
    """
    while True:
        wait_s = pause_s
        try:
            await step()
        except Exception as error:
            if failed is not None:
                wait_s = failed(error)
            elif not isinstance(error, LogtoWebhooksError):
                logger.error("%s, in a loop that continues", describe(error))
        await asyncio.sleep(wait_s)


Main = Callable[[], Coroutine[Any, Any, None]]
RESTART_S: Final = 2.0


def _has_returned(ended: asyncio.Task[None]) -> bool:
    return not ended.cancelled() and ended.exception() is None


async def keep_running(
    main: Main,
    tell: Callable[[str, float], object],
    is_over: Callable[[asyncio.Task[None]], bool] = _has_returned,
) -> None:
    """Run a loop until it `is_over`; by default, until it returns. If it ends before that, by any
    exception or because it was cancelled, `tell` the problem and the pause, and run it again.

    If this is cancelled, so is the loop. Raises what the loop raises when it is over.
    """
    while True:
        running = asyncio.create_task(main())
        try:
            await asyncio.wait({running})
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        if is_over(running):
            if not running.cancelled():
                running.result()
            return
        tell(describe_end(running), RESTART_S)
        await asyncio.sleep(RESTART_S)


def describe_end(ended: asyncio.Task[None]) -> str:
    """Say how a loop ended that should have gone on."""
    if ended.cancelled():
        return "a loop was cancelled, although nobody stopped it"
    error = ended.exception()
    how = "it returned" if error is None else describe(error)
    return f"a loop ended, although nobody stopped it: {how}"


@asynccontextmanager
async def run_in_background(
    *loops: Main, tell: Callable[[str, float], object]
) -> AsyncIterator[None]:
    """Run loops within the block, then cancel them. One that ends otherwise than by returning is
    told and run again."""
    tasks = [asyncio.create_task(keep_running(loop, tell)) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def start_thread(thread: Thread) -> None:
    """Start a thread. Raises StoreUnavailable if the system has no more."""
    try:
        thread.start()
    except RuntimeError as error:
        raise StoreUnavailable(problem="the system has no more threads") from error


async def run_in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a thread of its own. Raises what it raises, and StoreUnavailable if the
    system has no more threads.

    `asyncio.to_thread` uses the loop's default executor, whose few threads an application may need
    for minutes.
    """
    done: Future[T] = Future()
    work = partial(function, *arguments)
    start_thread(Thread(target=run_for, args=(done, work), name="logto-webhooks", daemon=True))
    return await asyncio.wrap_future(done)


def run_for(done: Future[T], work: Callable[[], T]) -> None:
    """Run work in a thread, and give its result to the future, unless that was cancelled."""
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(to_error(error))


def to_error(error: BaseException) -> Exception:
    """Return an error that can be raised in the coroutine that waits for some work. Others would
    look as if that was cancelled, or end it or the event loop."""
    kind = type(error)
    if issubclass(kind, Exception) and not issubclass(kind, StopIteration):
        return cast(Exception, error)
    raised = RuntimeError(f"{kind.__name__} was raised").with_traceback(error.__traceback__)
    raised.__cause__ = error
    return raised


class Offloader:
    """Runs functions in a thread that would block the event loop. One at a time: Python's threads
    take turns anyway, and one call needs less memory than several."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function in a thread. Raises what it raises."""
        async with self._turn:
            return await run_in_thread(function)

    async def give_way(self) -> None:
        """Let other tasks run between small pieces of work."""
        await asyncio.sleep(0)


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, for at most `seconds`."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def on_stop(stop: Callable[[], object]) -> None:
    """Call `stop` on the running loop at SIGTERM, SIGINT, and when the terminal closes (SIGHUP),
    unless the process was started to survive that, as by `nohup`."""
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    for number in numbers:
        on_signal(loop, number, stop)


def on_signal(
    loop: asyncio.AbstractEventLoop, number: signal.Signals, work: Callable[[], object]
) -> None:
    """Call `work` on the loop at each such signal, also on Windows, whose loops don't handle
    signals."""
    try:
        loop.add_signal_handler(number, work)
    except NotImplementedError:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(work))


def reset_signal(loop: asyncio.AbstractEventLoop, number: signal.Signals) -> None:
    """Restore a signal's default action."""
    try:
        loop.remove_signal_handler(number)
    except NotImplementedError:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)


END_S: Final = 2.0
AGAIN_S: Final = 0.1
NOT_CANCELLED: Final = "ended, although a task that a handler started couldn't be cancelled"


class LoopThread:
    """An event loop in its own thread. It runs one coroutine function to its end, even if a handler
    stops the loop or cancels all tasks."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, function: Callable[[], object]) -> None:
        """Call a function on the loop soon, from any thread, unless the loop has ended."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # closed just now
                loop.call_soon_threadsafe(function)

    async def run(self, main: Main) -> None:
        """Run `main` in the thread, and wait for its end. If this is cancelled, the thread goes on.

        Raises what `main` raises. If a handler cancels it, `main` is called again.
        """
        done: Future[None] = Future()
        loop = asyncio.new_event_loop()
        thread = Thread(target=self._work, args=(loop, main, done), name=self._name, daemon=True)
        try:
            start_thread(thread)
        except StoreUnavailable:
            loop.close()
            raise
        self._loop = loop
        await asyncio.wrap_future(done)

    def _work(self, loop: asyncio.AbstractEventLoop, main: Main, done: Future[None]) -> None:
        asyncio.set_event_loop(loop)
        error = None
        try:
            _run(loop, main)
            _end(loop)
        except BaseException as raised:
            error = to_error(raised)
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
        _run_forever(loop, "a handler stopped its event loop; it continues", task.done)
        if task.cancelled():
            logger.error("a handler cancelled tasks of logto-webhooks; they restart")
            task = loop.create_task(_wait_and_run(AGAIN_S, main))
            task.add_done_callback(lambda _: loop.stop())
    task.result()


async def _wait_and_run(seconds: float, main: Main) -> None:
    await asyncio.sleep(seconds)
    await main()


def _run_forever(loop: asyncio.AbstractEventLoop, stopped: str, done: Callable[[], bool]) -> None:
    try:
        loop.run_forever()
    except BaseException as error:
        # SystemExit or KeyboardInterrupt from a task, which asyncio doesn't catch.
        name = type(error).__name__
        logger.error("%s was raised in a task of a handler; the event loop continues", name)
    else:
        if not done():
            logger.error(stopped)


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the tasks that handlers left running, and wait for them briefly."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()

    async def end() -> None:
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=END_S)
            if pending:
                logger.warning(NOT_CANCELLED)
        await loop.shutdown_asyncgens()

    with suppress(BaseException):
        loop.run_until_complete(end())
