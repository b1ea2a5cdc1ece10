"""Notices a coroutine that blocks its event loop, and names its handler."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from logto_webhooks.database.coroutines import describe_frame
from logto_webhooks.database.threads import RUNNING
from logto_webhooks.instrumentation import HandlerBlocks

BLOCKED_S: Final = 1.0
LOOK_S: Final = 0.25
SURE_S: Final = 0.1  # between two looks at a call
AGAIN_S: Final = 60.0  # between reports of one handler
_FRAMES: Final = 8
_HANDLE: Final = asyncio.Handle._run.__code__  # where asyncio runs a callback
# A local variable of the function that awaits a handler, because uvloop's callbacks have no frames.
MARK: Final = "_handler_that_is_awaited"


class Watchdog:
    """A thread that checks repeatedly whether an event loop responds."""

    def __init__(self, observe: Callable[[HandlerBlocks], None]) -> None:
        """`observe` is called in the watchdog's thread, while the loop is blocked."""
        self._observe = observe
        self._reported: dict[str, float] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the running loop within the block."""
        over = threading.Event()
        watched = (asyncio.get_running_loop(), threading.get_ident(), over)
        threading.Thread(
            target=self._watch, args=watched, name="logto-watchdog", daemon=True
        ).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, loop: asyncio.AbstractEventLoop, thread: int, over: threading.Event) -> None:
        while not over.wait(LOOK_S):
            alive = threading.Event()
            asked_at = time.monotonic()
            try:
                loop.call_soon_threadsafe(alive.set)
            except RuntimeError:  # the loop is closed
                return
            while not alive.wait(BLOCKED_S) and not over.is_set():
                self._look(thread, time.monotonic() - asked_at)

    def _look(self, thread: int, blocked_s: float) -> None:
        call = _find_call(_list_frames(thread))
        if call is None:
            return
        time.sleep(SURE_S)
        frames = _list_frames(thread)
        if _find_call(frames) != call:  # the loop is busy with many short calls
            return
        handler, _ = call
        now = time.monotonic()
        if now - self._reported.get(handler, now - AGAIN_S) < AGAIN_S:
            return
        self._reported[handler] = now
        stack = " < ".join(describe_frame(frame) for frame in frames[:_FRAMES])
        self._observe(HandlerBlocks(handler, round(blocked_s, 1), stack))


def _list_frames(thread: int) -> list[types.FrameType]:
    frame = sys._current_frames().get(thread)
    return [] if frame is None else list(_walk_outwards(frame))


def _walk_outwards(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    """Yield the frames of a thread, innermost first, up to the event loop's callback."""
    while frame is not None:
        yield frame
        if frame.f_code is _HANDLE:
            return
        frame = frame.f_back


def _find_call(frames: list[types.FrameType]) -> tuple[str, types.FrameType] | None:
    """Find the handler that the code runs for, also in a task that the handler created, and the
    frame of that call."""
    for frame in frames:
        if frame.f_code is _HANDLE:
            context = frame.f_locals["self"]._context
            running = context.get(RUNNING)
            return (running.handler, frame) if running else None
        if name := frame.f_locals.get(MARK):
            return str(name), frame
    return None
