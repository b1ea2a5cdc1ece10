"""Read the body of a request within limits of time and memory."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Final

from logto_webhooks.errors import NoRoom

WAIT_S: Final = 2.0
SMALL: Final = 64 * 2**10
_LOOK_EVERY_S: Final = 0.1


class ByteLimiter:
    """So many bytes for all bodies together."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._for_small = total // 8
        self._arriving: set[RequestBody] = set()
        self._waiting: set[RequestBody] = set()
        self._timer: asyncio.TimerHandle | None = None

    def body(self, began: float, *, keep: bool = True) -> RequestBody:
        """Begin a body. `began` is the event loop's time at the request's head; a body that isn't
        kept is counted and thrown away."""
        return RequestBody(self, began, keep)

    def take(self, size: int, more_to_a_body_of: int) -> bool:
        """Take room for a piece of a body, if there is any."""
        is_small = more_to_a_body_of + size <= SMALL
        if size > (self._free if is_small else self._free - self._for_small):
            return False
        self._free -= size
        return True

    def give_back(self, size: int) -> None:
        """Return room, and let in those who wait."""
        self._free += size
        if self._waiting:
            self._let_in()

    def watch(self, body: RequestBody) -> None:
        """Note that more of this body is to come: it may be dropped."""
        self._arriving.add(body)

    def forget(self, body: RequestBody) -> None:
        """Note that all of this body is here, or that nobody waits for it any more."""
        self._arriving.discard(body)
        self._waiting.discard(body)

    async def wait(self, body: RequestBody, size: int) -> None:
        """Wait until there is room for a piece. Raises NoRoom."""
        loop = asyncio.get_running_loop()
        body.turn, body.wanted = loop.create_future(), size
        self._waiting.add(body)
        self._look(loop)
        try:
            async with asyncio.timeout(WAIT_S):
                await body.turn
        except TimeoutError:
            if not _has_come(body.turn):
                raise NoRoom() from None
        except asyncio.CancelledError:
            if _has_come(body.turn):
                self.give_back(size)  # just as the request ended
            raise
        finally:
            self._waiting.discard(body)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drop what arrives too slowly, while somebody waits."""
        self._let_in()
        if self._waiting:
            now = loop.time()
            slow = [body for body in self._arriving if now - body.began >= WAIT_S]
            slow.sort(key=lambda body: body.size * (now - body.began))
            while self._waiting and slow:
                slow.pop().drop()
        if self._waiting and self._timer is None:
            self._timer = loop.call_later(_LOOK_EVERY_S, self._look_again, loop)

    def _look_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._look(loop)

    def _let_in(self) -> None:
        for body in sorted(self._waiting, key=lambda body: body.size):
            if not self.take(body.wanted, body.size):
                continue
            self._waiting.discard(body)
            if body.turn.done():  # it gave up
                self._free += body.wanted
            else:
                body.turn.set_result(None)


def _has_come(turn: asyncio.Future[None]) -> bool:
    return turn.done() and not turn.cancelled() and turn.exception() is None


class RequestBody:
    """The body of one request, as far as it has arrived."""

    __slots__ = ("_is_dropped", "_keep", "_pieces", "_room", "began", "size", "turn", "wanted")

    turn: asyncio.Future[None]
    wanted: int

    def __init__(self, room: ByteLimiter, began: float, keep: bool) -> None:
        self._room = room
        self._keep = keep
        self._pieces: list[bytes] = []
        self._is_dropped = False
        self.began = began
        self.size = 0

    async def add(self, piece: bytes, more: bool) -> None:
        """Add what arrived; `more` is to come. Raises NoRoom."""
        if self._is_dropped:
            raise NoRoom()
        size = len(piece)
        if self._keep:
            if not self._room.take(size, self.size):
                await self._room.wait(self, size)
                if self._is_dropped:  # after it got the room, and before it came to know
                    self._room.give_back(size)
                    raise NoRoom()
            self._pieces.append(piece)
        self.size += size
        if more and self._keep:
            self._room.watch(self)

    def whole(self) -> bytes:
        """Return all of it; it can't be dropped any more."""
        self._room.forget(self)
        return b"".join(self._pieces)

    def drop(self) -> None:
        """Give up what has arrived: others need the room."""
        self._is_dropped = True
        self.close()
        if hasattr(self, "turn") and not self.turn.done():
            self.turn.set_exception(NoRoom())

    def close(self) -> None:
        """Give the room back."""
        self._room.forget(self)
        size, self.size = self.size, 0
        if self._keep and size:
            self._pieces.clear()
            self._room.give_back(size)


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
