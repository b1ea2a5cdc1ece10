"""Many timeouts that share one timer of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType


class SharedTimeout:
    """Lets nobody in its loop wait for more than so many seconds.

    >>> async def answered(patience: SharedTimeout) -> None:
    ...     with patience.limit():
    ...         await asyncio.sleep(0)
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waits: deque[_Wait] = deque()  # the oldest first
        self._timer: asyncio.TimerHandle | None = None

    def limit(self) -> _Wait:
        """Raise TimeoutError out of a block that takes longer, as `asyncio.timeout` does."""
        return _Wait(self)

    def begin(self, wait: _Wait) -> asyncio.Task[object]:
        """Watch it, too; return whose it is."""
        if not self._waits:
            self._loop = asyncio.get_running_loop()  # which is slow; all who wait are in one
        wait.deadline = self._loop.time() + self._seconds
        self._waits.append(wait)
        if self._timer is None:
            self._timer = self._loop.call_at(wait.deadline, self._look)
        task = asyncio.current_task(self._loop)
        assert task, "only a task can wait"
        return task

    def end(self) -> None:
        """Forget those that are over."""
        while self._waits and self._waits[0].is_over:
            self._waits.popleft()
        if not self._waits and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        now = self._loop.time()
        while self._waits and (self._waits[0].is_over or self._waits[0].deadline <= now):
            self._waits.popleft().give_up()
        self._timer = None
        if self._waits:
            self._timer = self._loop.call_at(self._waits[0].deadline, self._look)


class _Wait:
    """One block of one task."""

    __slots__ = ("_cancelling", "_gave_up", "_patience", "_task", "deadline", "is_over")

    def __init__(self, patience: SharedTimeout) -> None:
        self._patience = patience
        self._gave_up = False
        self.is_over = False
        self.deadline = 0.0

    def give_up(self) -> None:
        """End the block, unless it is over."""
        if not self.is_over:
            self._gave_up = True
            self._task.cancel()

    def __enter__(self) -> None:
        self._task = self._patience.begin(self)
        self._cancelling = self._task.cancelling()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.is_over = True
        self._patience.end()
        ours = self._gave_up and self._task.uncancel() <= self._cancelling
        if ours and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error
