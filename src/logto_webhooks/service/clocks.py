"""When answers were true, for questions that are asked one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from logto_webhooks.core import answers
from logto_webhooks.core.answers import Span
from logto_webhooks.core.ports import Answered, Host

RECENT: Final = 50  # deliveries that tell how far apart the clocks are

When = Callable[[Answered], Span]


async def clocks(host: Host) -> When:
    """Return what tells an answer's span. Raises StoreUnavailable.

    Who asks later asks no earlier: so no answer is older than the one before, however long it
    took; else the users of a slow page would look as if they hadn't been listed at all.
    """
    recent = await host.read(lambda store: store.recent(RECENT))
    latest = 0

    def when(answered: Answered) -> Span:
        nonlocal latest
        span = answers.span(answered, recent)
        latest = max(latest, span.at)
        return Span(latest, max(latest, span.end))

    return when
