"""Call the functions of mappings, which are the application's: in a thread, within a time limit.

A transaction waits for them, so they must not hold it, or the event loop, as long as they like.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from threading import Event, Lock
from typing import Any, Final, Generic, TypeVar

from sqlalchemy.util import await_only

from logto_webhooks.database.threads import DetachedCall
from logto_webhooks.mapping.sources import FunctionFailed

T = TypeVar("T")
SHARED_S: Final = 2.0  # in a transaction, as for a handler that holds the only writer
ALONE_S: Final = 5.0  # if nobody waits for it: the server ends one that is idle for 10 s
_LONG: Final = 0.25  # of the time limit: a row that takes so long is slow itself
MOST_STUCK: Final = 8  # abandoned calls, whose threads still run

NOT_CALLED: Final = "the mappings' functions take too long for other rows"


class NotEvaluated(FunctionFailed):
    """The functions of a mapping have no result for a row yet."""


class TooSlow(NotEvaluated):
    """The functions of a mapping took too long for a row."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            f"a function of the mapping takes longer than {limit_s:g} s: it is called within a "
            "transaction, so it must not wait for anything"
        )


class NotCalled(NotEvaluated):
    """The functions weren't called for a row, because those of other rows took too long."""

    def __init__(self) -> None:
        super().__init__(NOT_CALLED)


class TooManyStuck(NotEvaluated):
    """The functions weren't called, because too many calls haven't returned."""

    def __init__(self) -> None:
        super().__init__(
            f"functions of mappings haven't returned in {MOST_STUCK} threads: restart the process"
        )


class FunctionCaller:
    """Calls functions for one transaction, in all at most for a time limit."""

    def __init__(self, limit_s: float = ALONE_S) -> None:
        self._limit_s = limit_s
        self._left_s = limit_s

    def call(
        self, mapping: str, function: Callable[[Any], T], rows: Mapping[str, Any]
    ) -> dict[str, T | Exception]:
        """Call a function of a mapping with rows of the mirror. Return its results, or what it
        raised, by the ids of the rows. A row for which there was no time has TooSlow, NotCalled or
        TooManyStuck.

        While a call for a row hasn't returned, there is no other one: each would keep a thread.
        """
        self._wait_for_stuck(mapping, rows)
        stuck = list_stuck()
        busy = {calls.place for calls in stuck if calls.mapping == mapping}
        results: dict[str, T | Exception] = {
            id_: TooSlow(self._limit_s) for id_ in rows if id_ in busy
        }
        free = {id_: row for id_, row in rows.items() if id_ not in busy}
        if len(stuck) >= MOST_STUCK:
            return results | dict.fromkeys(free, TooManyStuck())
        calls = _Calls(mapping, function, free)
        began = time.monotonic()
        try:
            if free and self._left_s > 0:
                _wait(DetachedCall(), calls.run, self._left_s)
        finally:  # it may be cancelled
            if not calls.is_over:
                calls.stop(self._limit_s)
            self._left_s -= time.monotonic() - began
        return results | calls.results

    def _wait_for_stuck(self, mapping: str, rows: Collection[str]) -> None:
        """Wait for calls for these rows that were abandoned before they had taken too long."""
        for calls in list_stuck():
            if calls.mapping == mapping and calls.place in rows:
                began = time.monotonic()
                left_s = min(self._left_s, calls.began_at + self._limit_s - began)
                if left_s > 0:
                    _wait(DetachedCall(), partial(calls.wait, left_s), left_s)
                    self._left_s -= time.monotonic() - began


def list_stuck() -> list[_Calls[Any]]:
    """List the calls that took too long and haven't returned."""
    with _lock:
        _stuck[:] = [calls for calls in _stuck if not calls.is_over]
        return list(_stuck)


class _Calls(Generic[T]):
    """Calls of a function, one row after the other. The `place` is the id of the current one."""

    def __init__(self, mapping: str, function: Callable[[Any], T], rows: Mapping[str, Any]) -> None:
        self.mapping = mapping
        self.place = ""
        self.began_at = time.monotonic()
        self.has_begun = False
        self.results: dict[str, T | Exception] = dict.fromkeys(rows, NotCalled())
        self._function = function
        self._rows = rows
        self._is_stopped = False
        self._over = Event()

    @property
    def is_over(self) -> bool:
        """Whether no call is running, nor will be."""
        return self._over.is_set()

    def wait(self, seconds: float) -> None:
        """Wait until it is over."""
        self._over.wait(seconds)

    def run(self) -> None:
        """Call the function with each row."""
        self.has_begun = True
        try:
            for id_, row in self._rows.items():
                if self._is_stopped:
                    break
                self.place, self.began_at = id_, time.monotonic()
                try:
                    result: T | Exception = self._function(row)
                except Exception as error:
                    result = error
                if not self._is_stopped:
                    self.results[id_] = result
        finally:
            self._over.set()

    def stop(self, limit_s: float) -> None:
        """Call the function no more. The row for which it is called now may be slow itself."""
        self._is_stopped = True
        self.results = dict(self.results)  # the thread may be about to write to the other one
        is_slow = time.monotonic() - self.began_at > limit_s * _LONG
        if is_slow and isinstance(self.results.get(self.place), NotCalled):
            self.results[self.place] = TooSlow(limit_s)
        with _lock:
            if self.has_begun:
                _stuck.append(self)


_stuck: Final[list[_Calls[Any]]] = []
_lock: Final = Lock()


def _is_in_greenlet() -> bool:
    """Whether SQLAlchemy can await something for this function."""
    try:
        from greenlet import getcurrent
    except ImportError:  # only PostgreSQL needs it
        return False
    return bool(getattr(getcurrent(), "__sqlalchemy_greenlet_provider__", False))


def _wait(thread: DetachedCall[None], work: Callable[[], None], limit_s: float) -> None:
    """Wait for a thread, on an event loop without blocking that. If it takes too long, abandon
    it."""
    if _is_in_greenlet():
        await_only(_wait_on_loop(thread, work, limit_s))
    else:
        thread.wait(work, limit_s)


async def _wait_on_loop(
    thread: DetachedCall[None], work: Callable[[], None], limit_s: float
) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await thread.run(work)
