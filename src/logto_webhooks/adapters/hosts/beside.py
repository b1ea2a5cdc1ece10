"""Plain handlers in tests: on the very thread of an event loop, as if there were none."""

from __future__ import annotations

from asyncio import events
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def beside_the_loop() -> Iterator[None]:
    """Let a plain handler find no event loop, as outside of tests, where it has a thread of its
    own: so it may call what waits, such as `logto.call`."""
    loop = events._get_running_loop()
    events._set_running_loop(None)
    try:
        yield
    finally:
        events._set_running_loop(loop)
