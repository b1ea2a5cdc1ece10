"""Run each coroutine of a handler in its own task, which can be abandoned.

A coroutine can go on after it was cancelled. Nobody waits for that longer than a few seconds.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import dropwhile
from pathlib import PurePath
from typing import Any, Final

from logto_webhooks.database.threads import Detachable

UNCANCELLED_S: Final = 5.0  # how long a coroutine may go on after it was cancelled
_FRAMES: Final = 8


class NotBegun(Exception):
    """A call was cancelled before it began."""


class DetachedTask(Detachable):
    """A call of a coroutine function in its own task."""

    def __init__(
        self, take_back: Callable[[Callable[[], object]], Awaitable[object]] | None = None
    ) -> None:
        """`take_back` takes the connection away before the call is abandoned. It gets a function
        that cancels what the call awaits now."""
        super().__init__()
        self._take_back = take_back
        self._task: asyncio.Task[None] | None = None
        self._has_begun = False
        self._error: BaseException | None = None

    async def run(self, work: Callable[[], Any]) -> None:
        """Call `work`, and await its result if that is awaitable. Raises what it raises.

        If this is cancelled, so is the call. The call is abandoned if it goes on for
        `UNCANCELLED_S`, or if this is cancelled again. Raises NotBegun if `work` wasn't called.
        """
        task = self._task = asyncio.create_task(self._call(work))
        self.is_over = False
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            if not await _end_within(UNCANCELLED_S, task):
                await self._abandon(task)
                raise
        if not self._has_begun:
            raise NotBegun
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame

    def cancel(self) -> None:
        """Cancel the call again."""
        if self._task is not None:
            self._task.cancel()

    async def _call(self, work: Callable[[], Any]) -> None:
        _handler_that_is_awaited = self.handler  # the watchdog looks for this variable
        self._has_begun = True
        try:
            result = work()
            if inspect.isawaitable(result):
                await result
        except BaseException as error:  # raised in a task, SystemExit would end the event loop
            self._error = error
        finally:
            self._abandoned.end(self)

    async def _abandon(self, task: Any) -> None:
        self._abandoned.report(self.handler, describe_stack(task))
        self._abandoned.add(self)
        task._log_destroy_pending = False  # it was reported already
        if self._take_back is not None:
            await self._take_back(task.cancel)


async def _end_within(seconds: float, task: asyncio.Task[Any]) -> bool:
    """Wait until a task ends, for `seconds` or until this is cancelled. Return whether it ended."""
    with suppress(asyncio.CancelledError):
        await asyncio.wait({task}, timeout=seconds)
    return task.done()


def describe_stack(task: asyncio.Task[Any]) -> str:
    """Describe where a task waits, the innermost line first, without the caller of the handler."""
    frames: list[types.FrameType] = []
    with suppress(Exception):  # an application's own awaitables can have any attributes
        frames += dropwhile(_is_ours, _walk_inwards(task.get_coro()))
    return " < ".join(describe_frame(frame) for frame in frames[: -_FRAMES - 1 : -1])


def _is_ours(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("logto_webhooks.")


def describe_frame(frame: types.FrameType) -> str:
    """Return a frame's file, line and name, without any value."""
    code = frame.f_code
    return f"{PurePath(code.co_filename).name}:{frame.f_lineno} {code.co_name}"


def _walk_inwards(awaitable: Any) -> Iterator[types.FrameType]:
    """Yield the frames of a coroutine and of what it awaits, the outermost first."""
    while awaitable is not None:
        frame = getattr(awaitable, "cr_frame", None) or getattr(awaitable, "gi_frame", None)
        if not isinstance(frame, types.FrameType):
            return
        yield frame
        inner = getattr(awaitable, "cr_await", None)
        awaitable = getattr(awaitable, "gi_yieldfrom", None) if inner is None else inner
