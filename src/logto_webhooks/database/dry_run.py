"""Run work in a transaction and roll it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from logto_webhooks.database.store import Store, TransactionRunner

T = TypeVar("T")


async def run_or_rehearse(host: TransactionRunner, work: Callable[[Store], T], dry: bool) -> T:
    """Run work in a transaction; with `dry`, roll it back and return what it found all the same."""
    found: list[T] = []

    def rehearsed(store: Store) -> T:
        found.append(work(store))
        raise _OnlyLooking

    if not dry:
        return await host.run(work)
    try:
        return await host.run(rehearsed)
    except _OnlyLooking:
        return found[-1]


class _OnlyLooking(Exception):
    """Rolls the transaction back."""
