"""Read Logto's log, and yield each delivery once, in order.

Logto logs each attempt when it ends, whatever the result, so neither a tunnel nor another webhook
is needed. Each window ends at Logto's own time, in whole seconds, and overlaps the previous one, to
find entries that were written late.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from logto_webhooks.clock import Clock
from logto_webhooks.deliveries import NewDelivery
from logto_webhooks.errors import LogtoUnreachable, NoEnabledWebhook, WebhookChanged
from logto_webhooks.listen.tunnel import PREFIX
from logto_webhooks.logto import delivery_log
from logto_webhooks.logto.client import ManagementClient
from logto_webhooks.logto.webhooks import Webhook, find_webhook, list_webhooks

POLL_S: Final = 2.0
OVERLAP_MS: Final = 15_000  # two webhooks' copies end up to 10 s apart
MOST: Final = 1_000  # entries of a window; longer windows are split down to SHORTEST_MS
SHORTEST_MS: Final = 1_000
_GONE: Final = "deleted or disabled"


class LogReader:
    """Reads the log of a webhook, or of all that are enabled, again and again."""

    def __init__(
        self,
        logto: ManagementClient,
        clock: Clock,
        tell: Callable[[str], None],
        webhook: str | None,
        since: int | None,
    ) -> None:
        """Reading begins at `since` (ms), or now. `tell` gets messages for the user."""
        self._logto = logto
        self._clock = clock
        self._tell = tell
        self._webhook = webhook
        self._since = since
        self._reached = 0
        self._webhooks: dict[str, Webhook] = {}
        self._seen: dict[bytes, int] = {}  # digest -> when its last attempt ended

    async def begin(self) -> int:
        """Choose the webhooks, and return when to begin (ms). Raises LogtoUnreachable,
        LogtoApiError, NoEnabledWebhook, WebhookUnknown."""
        webhooks, now = await list_webhooks(self._logto)
        if self._webhook is not None:
            self._webhook = find_webhook(webhooks, self._webhook).id
        self._choose(webhooks)
        names = ", ".join(webhook.name or webhook.id for webhook in self._webhooks.values())
        self._tell(f"Reading the log of: {names}.")
        return now if self._since is None else self._since

    async def deliveries(
        self, begin: int, poll_s: float = POLL_S
    ) -> AsyncGenerator[NewDelivery, None]:
        """Yield each delivery once, in the order in which their attempts ended.

        If Logto can't be reached, print a message and retry. Raises LogtoApiError,
        NoEnabledWebhook, WebhookChanged.
        """
        is_reachable = True
        while True:
            try:
                async for delivery in self._read_window(begin):
                    yield delivery
                if not is_reachable:
                    self._tell("Logto answers again.")
                is_reachable = True
            except LogtoUnreachable as error:
                if is_reachable:
                    self._tell(f"{error} Retrying; deliveries in its log aren't lost.")
                is_reachable = False
            await asyncio.sleep(poll_s)

    async def _read_window(self, begin: int) -> AsyncGenerator[NewDelivery, None]:
        webhooks, now = await list_webhooks(self._logto)
        self._choose(webhooks)
        # What a wrong Date once reached may be in the future.
        begin = max(begin, min(self._reached, now) - OVERLAP_MS)
        windows = [(begin, now)] if begin < now else []
        while windows:
            start, end = windows.pop()
            entries = await self._read_entries(start, end)
            if entries is None:
                middle = (start + end) // 2
                windows += [(middle, end), (start, middle)]
            for ended_at, entry in entries or []:
                if delivery := self._parse_new(entry, ended_at):
                    yield delivery
        self._reached = now
        kept = self._reached - OVERLAP_MS
        self._seen = {key: ended for key, ended in self._seen.items() if ended >= kept}

    def _choose(self, webhooks: list[Webhook]) -> None:
        """Choose enabled webhooks, except temporary ones of another `listen`."""
        chosen = {
            webhook.id: webhook
            for webhook in webhooks
            if webhook.enabled
            and self._webhook in (None, webhook.id)
            and not webhook.name.startswith(PREFIX)
        }
        gone = [webhook for webhook in self._webhooks.values() if webhook.id not in chosen]
        if not chosen:
            raise WebhookChanged(name=gone[0].name, what=_GONE) if gone else NoEnabledWebhook()
        for lost in gone:
            self._tell(f"The webhook {lost.name} was {_GONE} in Logto. Still reading the others.")
        self._webhooks = chosen

    async def _read_entries(self, start: int, end: int) -> list[tuple[int, Any]] | None:
        """Read the entries of all webhooks, each with when it ended, oldest first; return None if
        there are too many. An entry that doesn't say when it ended is the last."""
        all_entries: list[tuple[int, Any]] = []
        for webhook_id in self._webhooks:
            entries: list[Any] = []
            async for page in self._logto.log(webhook_id, start, end):
                if (page.total or 0) > MOST and end - start > SHORTEST_MS:
                    return None
                entries += page.content
            for entry in reversed(entries):
                ended_at = delivery_log.read_end(entry)
                all_entries.append((end if ended_at is None else ended_at, entry))
        return sorted(all_entries, key=lambda each: each[0])

    def _parse_new(self, entry: Any, ended_at: int) -> NewDelivery | None:
        """Parse a delivery; return None if it was seen before."""
        delivery = delivery_log.parse_delivery(entry, self._clock.now())
        if delivery is None:
            return None
        before = self._seen.get(delivery.digest)
        self._seen[delivery.digest] = max(ended_at, before or 0)
        return delivery if before is None else None
