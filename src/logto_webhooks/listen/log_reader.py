"""Local development: what Logto's log gets is forwarded, each delivery once, in its order.

An entry is in the log once its attempt has ended, whatever came of it: so no tunnel is needed,
and no webhook besides the one that there is. The window that is read ends at Logto's own time, in
whole seconds, and each overlaps the one before: what is written late is still seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from logto_webhooks.clock import Clock
from logto_webhooks.deliveries import NewDelivery, api_call
from logto_webhooks.errors import LogtoUnreachable, NoEnabledWebhook, WebhookChanged
from logto_webhooks.events.base import Json
from logto_webhooks.listen.temporary_webhook import is_temporary
from logto_webhooks.logto import delivery_log
from logto_webhooks.logto.webhooks import Webhook, find_webhook, list_webhooks

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

POLL_S: Final = 2.0
OVERLAP_MS: Final = 15_000  # two webhooks' copies end up to 10 s apart
MOST: Final = 1_000  # entries of one stretch that are held, if it isn't short already
SHORTEST_MS: Final = 1_000
_GONE: Final = "deleted or disabled"


class ForwardResponse(Struct, frozen=True, kw_only=True):
    """What the application answered, or the problem why it didn't."""

    status: int | None = None
    body: bytes = b""
    problem: str | None = None
    took_ms: int = 0


class ForwardResult(Struct, frozen=True, kw_only=True):
    """A delivery, and what the application answered to it."""

    occurred_at: int
    event: str
    subject: str | None
    call: str
    status: int | None
    problem: str | None
    took_ms: int


Forward = Callable[[bytes], Awaitable[ForwardResponse]]
Tell = Callable[[str], None]


def describe_forward(delivery: NewDelivery, answer: ForwardResponse) -> ForwardResult:
    """Put both into one line."""
    return ForwardResult(
        occurred_at=delivery.occurred_at,
        event=delivery.event,
        subject=delivery.subject,
        call=api_call(delivery.body),
        status=answer.status,
        problem=answer.problem,
        took_ms=answer.took_ms,
    )


class LogReader:
    """Reads the log of a webhook, or of all that are enabled, over and over."""

    def __init__(
        self, logto: ManagementClient, clock: Clock, tell: Tell, hook: str | None, since: int | None
    ) -> None:
        """Begins at a moment (ms), or at the first look. `tell` is for people."""
        self._logto = logto
        self._clock = clock
        self._tell = tell
        self._hook = hook
        self._since = since
        self._reached = 0
        self._read: dict[str, Webhook] = {}
        self._seen: dict[bytes, int] = {}  # digest -> when its last attempt ended

    async def begin(self) -> int:
        """Choose what to read; return from when on. Raises LogtoUnreachable, LogtoApiError,
        NoEnabledWebhook, WebhookUnknown."""
        found, now = await list_webhooks(self._logto)
        if self._hook is not None:
            self._hook = find_webhook(found, self._hook).id
        self._choose(found)
        names = ", ".join(entry.name or entry.id for entry in self._read.values())
        self._tell(f"Reading the log of: {names}.")
        return now if self._since is None else self._since

    async def deliveries(
        self, begin: int, poll_s: float = POLL_S
    ) -> AsyncGenerator[NewDelivery, None]:
        """Each once, the first that ended first.

        Raises LogtoApiError, NoEnabledWebhook, WebhookChanged;
        that Logto can't be reached is told."""
        reachable = True
        while True:
            try:
                async for entry in self._look(begin):
                    yield entry
                if not reachable:
                    self._tell("Logto answers again.")
                reachable = True
            except LogtoUnreachable as error:
                if reachable:
                    self._tell(f"{error} It is asked again; what its log gets isn't lost.")
                reachable = False
            await asyncio.sleep(poll_s)

    async def _look(self, begin: int) -> AsyncGenerator[NewDelivery, None]:
        found, now = await list_webhooks(self._logto)
        self._choose(found)
        begin = max(begin, self._reached - OVERLAP_MS)
        stretches = [(begin, now)] if begin < now else []
        while stretches:
            start, end = stretches.pop()
            entries = await self._entries(start, end)
            if entries is None:
                middle = (start + end) // 2
                stretches += [(middle, end), (start, middle)]
            for entry in filter(None, map(self._new, entries or [])):
                yield entry
        self._reached = max(now, self._reached)
        kept = self._reached - OVERLAP_MS
        self._seen = {key: ended for key, ended in self._seen.items() if ended >= kept}

    def _choose(self, found: list[Webhook]) -> None:
        """Read the logs of those that are still there, and that last."""
        chosen = {
            item.id: item
            for item in found
            if item.enabled and self._hook in (None, item.id) and not is_temporary(item)
        }
        gone = [entry for entry in self._read.values() if entry.id not in chosen]
        if not chosen:
            raise WebhookChanged(name=gone[0].name, what=_GONE) if gone else NoEnabledWebhook()
        for entry in gone:
            self._tell(f"The webhook {entry.name} was {_GONE} in Logto; the others are read.")
        self._read = chosen

    async def _entries(self, start: int, end: int) -> list[Json] | None:
        """Those of all logs, the oldest first; None if there are too many."""
        found: list[Json] = []
        for hook in self._read:
            entries: list[Json] = []
            async for page in self._logto.log(hook, start, end):
                if (page.total or 0) > MOST and end - start > SHORTEST_MS:
                    return None
                entries += [item for item in page.content if isinstance(item, dict)]
            found += reversed(entries)
        return sorted(found, key=lambda entry: int(entry["createdAt"]))

    def _new(self, entry: Json) -> NewDelivery | None:
        delivery = delivery_log.parse_delivery(entry, self._clock.now())
        if delivery is None:
            return None
        before = self._seen.get(delivery.digest)
        self._seen[delivery.digest] = max(entry["createdAt"], before or 0)
        return delivery if before is None else None
