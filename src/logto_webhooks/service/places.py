"""How many jobs a process holds at once, handler by handler: none takes the places of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from logto_webhooks.service.aside import MOST as MOST_LEFT
from logto_webhooks.service.aside import MOST_OF_ONE, LeftBehind
from logto_webhooks.service.handlers import Handler

MOST: Final = 100


class Places:
    """The places of each handler: as many as its `concurrency` says."""

    def __init__(self, handlers: Iterable[Handler], transactions: int, left: LeftBehind) -> None:
        """`transactions`: how many handlers may be in a transaction at once, whichever."""
        handlers = list(handlers)
        self._most = {each.name: _most(each, transactions) for each in handlers}
        self._plain = {each.name for each in handlers if not each.is_async}
        self._left = left

    def free(self, taken: Iterable[str]) -> dict[str, int]:
        """How many more of each handler there may be; `taken` are the names of those in hand."""
        counts = Counter(taken)
        held = self.held()
        free = {name: most - counts[name] for name, most in self._most.items()}
        return {name: room for name, room in free.items() if room > 0 and name not in held}

    def held(self) -> dict[str, int]:
        """The handlers that may not be called now, because too many threads were left behind, by
        them or by all; and how many by each."""
        left = self._left.counts()
        if left.total() >= MOST_LEFT:
            return {name: left[name] for name in self._plain}
        return {name: count for name, count in left.items() if count >= MOST_OF_ONE}


def _most(handler: Handler, transactions: int) -> int:
    if handler.options.concurrency:
        return handler.options.concurrency
    if handler.transaction is None:
        return MOST
    return max(1, transactions * 2 // 3)  # a slow one leaves some to others
