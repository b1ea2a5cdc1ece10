"""Limit open connections, and close some when file descriptors run short."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any, Final, Protocol

resource: Any = None
with contextlib.suppress(ImportError):  # Windows has no such module
    resource = importlib.import_module("resource")

MOST: Final = 4_096
_UNLIMITED: Final = 2**20
_LOOK_EVERY_S: Final = 0.1


class Connection(Protocol):
    """What is asked of a connection, and done to it."""

    is_brief: bool

    def may_be_closed(self, now: float) -> bool:
        """Say whether it is idle or slow."""

    def is_waited_for(self) -> bool:
        """Say whether a whole request is being answered."""

    def drop(self) -> None:
        """Close it at once."""


class Connections:
    """All that are open."""

    def __init__(self, limit: int, most: int = MOST) -> None:
        """`limit` is the number of descriptors that the process may have."""
        kept = min(256, max(16, limit // 3))
        self._crowded_from = limit - kept
        self._full_from = limit - kept // 2
        self._most = most
        self._open: dict[Connection, None] = {}  # the oldest first
        self._brief: dict[Connection, None] = {}
        self._next_look = 0.0

    def add(self, connection: Connection, descriptor: int, now: float) -> None:
        """Take a new connection. The number of its descriptor says how many are in use: the
        system gives the lowest that is free."""
        is_crowded = descriptor >= self._crowded_from or len(self._open) >= self._most
        if is_crowded and not self._close_one(now):
            connection.is_brief = True
            self._brief[connection] = None
            most_brief = self._full_from - self._crowded_from
            if descriptor >= self._full_from or len(self._brief) > most_brief:
                self._close_a_brief_one()
        else:
            self._open[connection] = None

    def remove(self, connection: Connection) -> None:
        """Forget one that is closed."""
        self._open.pop(connection, None)
        self._brief.pop(connection, None)

    def _close_one(self, now: float) -> bool:
        if now < self._next_look:
            return False
        for connection in self._open:
            if connection.may_be_closed(now):
                self.remove(connection)
                connection.drop()
                return True
        self._next_look = now + _LOOK_EVERY_S  # looking at thousands takes a while
        return False

    def _close_a_brief_one(self) -> None:
        oldest = next(
            (connection for connection in self._brief if not connection.is_waited_for()), None
        )
        if oldest is not None:
            self.remove(oldest)
            oldest.drop()


def raise_limit() -> int:
    """Take as many descriptors as the system allows: a shell's usual 1,024 are soon spent.
    Return how many that are."""
    if resource is None:  # which has no such limit
        return _UNLIMITED
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _UNLIMITED if limit == resource.RLIM_INFINITY else limit
