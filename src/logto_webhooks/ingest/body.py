"""Read the body of a request within limits of time and memory."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Final

from logto_webhooks.errors import BodyIncomplete, BodyReadBefore, BodyTooLarge, NoRoom

if TYPE_CHECKING:
    from starlette.types import Receive

WAIT_S: Final = 2.0
SMALL: Final = 64 * 2**10
HELD: Final = 2 * 2**10  # how much memory a delivery needs besides its body
_LOOK_EVERY_S: Final = 0.1


class ByteLimiter:
    """Limits the bytes of all request bodies together. Under pressure, slow bodies are dropped."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._for_small = total // 8
        self.arriving: set[RequestBody] = set()  # incomplete bodies, which may be dropped
        self.waiting: set[RequestBody] = set()  # bodies that wait for room
        self._timer: asyncio.TimerHandle | None = None

    def take(self, size: int, more_to_a_body_of: int) -> bool:
        """Take room for a piece of a body, if there is any."""
        is_small = more_to_a_body_of + size <= SMALL
        if size > (self._free if is_small else self._free - self._for_small):
            return False
        self._free -= size
        return True

    def give_back(self, size: int) -> None:
        """Return room, and give it to bodies that wait."""
        self._free += size
        if self.waiting:
            self._let_in()

    def charge(self, size: int) -> None:
        """Count memory that is in use already, even without room."""
        self._free -= size

    async def wait(self, body: RequestBody, size: int) -> None:
        """Wait until there is room for a piece. Raises NoRoom."""
        loop = asyncio.get_running_loop()
        body.turn, body.wanted_size = loop.create_future(), size
        self.waiting.add(body)
        self._look(loop)
        try:
            async with asyncio.timeout(WAIT_S):
                await body.turn
        except TimeoutError:
            if not _has_come(body.turn):
                raise NoRoom() from None
        except asyncio.CancelledError:
            if _has_come(body.turn):
                self.give_back(size)  # it got the room just as the request ended
            raise
        finally:
            self.waiting.discard(body)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drop bodies that arrive too slowly while others wait."""
        self._let_in()
        if self.waiting:
            now = loop.time()
            slow = [body for body in self.arriving if now - body.began >= WAIT_S]
            slow.sort(key=lambda body: body.size * (now - body.began))
            while self.waiting and slow:
                slow.pop().drop()
        if self.waiting and self._timer is None:
            self._timer = loop.call_later(_LOOK_EVERY_S, self._look_again, loop)

    def _look_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._look(loop)

    def _let_in(self) -> None:
        for body in sorted(self.waiting, key=lambda body: body.size):
            if not self.take(body.wanted_size, body.size):
                continue
            self.waiting.discard(body)
            if body.turn.done():  # it gave up
                self._free += body.wanted_size
            else:
                body.turn.set_result(None)


def _has_come(turn: asyncio.Future[None]) -> bool:
    return turn.done() and not turn.cancelled() and turn.exception() is None


class RequestBody:
    """The body of one request, as far as it has arrived."""

    __slots__ = (
        "_holds",
        "_is_dropped",
        "_keep",
        "_pieces",
        "_room",
        "began",
        "size",
        "turn",
        "wanted_size",
    )

    turn: asyncio.Future[None]
    wanted_size: int

    def __init__(self, room: ByteLimiter, began: float, *, keep: bool = True) -> None:
        """`began` is the event loop's time at the request's head. Without `keep`, the body is
        counted and discarded."""
        self._room = room
        self._keep = keep
        self._pieces: list[bytes] = []
        self._holds = 0
        self._is_dropped = False
        self.began = began
        self.size = 0

    async def read(self, receive: Receive, announced: int, limit: int) -> bytes:
        """Read the whole body, but not more than `limit`. Raises BodyTooLarge, BodyIncomplete,
        BodyReadBefore, NoRoom."""
        if announced > limit:
            raise BodyTooLarge(limit=limit)
        is_more = True
        while is_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BodyIncomplete()
            piece: bytes = message.get("body", b"")
            is_more = message.get("more_body", False)
            if self.size + len(piece) > limit:
                raise BodyTooLarge(limit=limit)
            await self.add(piece, is_more)
        if self.size < announced:  # a server passes on all of it, or a disconnect
            raise BodyReadBefore()
        return self.whole()

    async def add(self, piece: bytes, more: bool) -> None:
        """Add a piece. `more` is whether others follow. Raises NoRoom."""
        if self._is_dropped:
            raise NoRoom()
        size = len(piece)
        if self._keep:
            if not self._room.take(size, self.size):
                await self._room.wait(self, size)
                if self._is_dropped:  # after it got the room, but before it ran again
                    self._room.give_back(size)
                    raise NoRoom()
            self._pieces.append(piece)
        self.size += size
        if more and self._keep:
            self._room.arriving.add(self)

    def whole(self) -> bytes:
        """Return the whole body, which can't be dropped any more."""
        self._room.arriving.discard(self)
        content = b"".join(self._pieces)
        self._pieces.clear()  # or it would be in memory twice
        return content

    def hold(self) -> None:
        """Keep the room for longer than the request, until `close` is called once more."""
        self._holds += 1
        self.size += HELD
        self._room.charge(HELD)

    def drop(self) -> None:
        """Discard what has arrived, because others need the room."""
        self._is_dropped = True
        self._room.waiting.discard(self)
        self.close()
        if hasattr(self, "turn") and not self.turn.done():
            self.turn.set_exception(NoRoom())

    def close(self) -> None:
        """Return the room, unless it is held."""
        if self._holds:
            self._holds -= 1
            return
        self._room.arriving.discard(self)
        size, self.size = self.size, 0
        if self._keep and size:
            self._pieces.clear()
            self._room.give_back(size)


class SharedTimeout:
    """A time limit for many blocks on an event loop, with a single timer.

    >>> async def answer(timeout: SharedTimeout) -> None:
    ...     with timeout.limit():
    ...         await asyncio.sleep(0)
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.waits: deque[_Wait] = deque()  # the oldest first
        self.timer: asyncio.TimerHandle | None = None

    def limit(self) -> _Wait:
        """Raise TimeoutError out of a block that takes longer, as `asyncio.timeout` does."""
        return _Wait(self)

    def end_late(self) -> None:
        """End the blocks whose time limit has passed."""
        now = self.loop.time()
        while self.waits and (self.waits[0].is_over or self.waits[0].deadline <= now):
            self.waits.popleft().give_up()
        self.timer = None
        if self.waits:
            self.timer = self.loop.call_at(self.waits[0].deadline, self.end_late)


class _Wait:
    """A block with a time limit in a task."""

    __slots__ = ("_cancelling", "_gave_up", "_shared", "_task", "deadline", "is_over")

    def __init__(self, shared: SharedTimeout) -> None:
        self._shared = shared
        self._gave_up = False
        self.is_over = False
        self.deadline = 0.0

    def give_up(self) -> None:
        """End the block, unless it is over."""
        if not self.is_over:
            self._gave_up = True
            self._task.cancel()

    def __enter__(self) -> None:
        shared = self._shared
        if not shared.waits:
            shared.loop = asyncio.get_running_loop()  # slow, and the same for all blocks
        self.deadline = shared.loop.time() + shared.seconds
        shared.waits.append(self)
        if shared.timer is None:
            shared.timer = shared.loop.call_at(self.deadline, shared.end_late)
        task = asyncio.current_task(shared.loop)
        assert task, "only a task can wait"
        self._task, self._cancelling = task, task.cancelling()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.is_over = True
        shared = self._shared
        while shared.waits and shared.waits[0].is_over:
            shared.waits.popleft()
        if not shared.waits and shared.timer is not None:
            shared.timer.cancel()
            shared.timer = None
        ours = self._gave_up and self._task.uncancel() <= self._cancelling
        if ours and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error
