"""Waiting for what another process does: the one place where tests sleep."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], why: Callable[[], str] = str, seconds: float = 30) -> None:
    """Return once the condition holds; fail after so many seconds, and say why."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)
