"""How many jobs a process holds at once, handler by handler: none takes the places of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from logto_webhooks.service.handlers import Handler

MOST: Final = 100


class Places:
    """The places of each handler: as many as its `concurrency` says."""

    def __init__(self, handlers: Iterable[Handler], transactions: int) -> None:
        """`transactions`: how many handlers may be in a transaction at once, whichever."""
        self._most = {each.name: _most(each, transactions) for each in handlers}

    def free(self, taken: Iterable[str]) -> dict[str, int]:
        """How many more of each handler there may be; `taken` are the names of those in hand."""
        counts = Counter(taken)
        free = {name: most - counts[name] for name, most in self._most.items()}
        return {name: room for name, room in free.items() if room > 0}


def _most(handler: Handler, transactions: int) -> int:
    if handler.options.concurrency:
        return handler.options.concurrency
    if handler.transaction is None:
        return MOST
    return max(1, transactions * 2 // 3)  # a slow one leaves some to others
