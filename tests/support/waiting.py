"""Waiting for what another process does: the one place where tests sleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], bool], why: Callable[[], str] = str, seconds: float = 30) -> None:
    """Return once the condition holds; fail after so many seconds, and say why."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)


async def eventually(
    ask: Callable[[], Awaitable[T]], holds: Callable[[T], bool] = bool, seconds: float = 30
) -> T:
    """Ask until the answer holds, and return it; fail after so many seconds, and show it."""
    deadline = time.monotonic() + seconds
    while True:
        found = await ask()
        if holds(found):
            return found
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)
