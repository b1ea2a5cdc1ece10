"""A handler's call in a thread of its own, which can be left behind."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from threading import Thread
from typing import Any, Final

# Whether this code runs for a handler that has the database's one writer.
HAS_WRITER: Final = contextvars.ContextVar("logto_webhooks_has_writer", default=False)


class Aside:
    """One call; who waits for it can be told, from any thread, to wait no more."""

    def __init__(self, has_writer: bool) -> None:
        """`has_writer`: whether nobody else can write meanwhile."""
        self._has_writer = has_writer
        self._done: Future[None] = Future()

    def run(self, work: Callable[[], Any], longest_s: float | None) -> bool:
        """Wait until it is done; False if it was left behind. Raises what it raises."""
        if not self._done.cancelled():
            Thread(target=self._run, args=(work,), name="logto-handler", daemon=True).start()
        # Ours, that of `leave`, or the handler's own, which is raised below.
        with suppress(TimeoutError, CancelledError):
            self._done.exception(longest_s)
        if self._done.cancelled() or not self._done.done():
            return False
        self._done.result()
        return True

    def leave(self) -> None:
        """Wait no more. What is done already stays done."""
        self._done.cancel()

    def _run(self, work: Callable[[], Any]) -> None:
        HAS_WRITER.set(self._has_writer)
        try:
            work()
        except BaseException as error:
            with suppress(InvalidStateError):
                self._done.set_exception(_that_a_future_holds(error))
        else:
            with suppress(InvalidStateError):
                self._done.set_result(None)


def _that_a_future_holds(error: BaseException) -> BaseException:
    # A GeneratorExit would end the coroutine that waits for it, and not be raised there.
    odd = isinstance(error, StopIteration | GeneratorExit)
    return RuntimeError(f"it raised {error!r}") if odd else error
