"""Keep requests that no key verifies, and release them once a key does.

They are answered 401 at once. So nothing is lost when a key is changed in Logto.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from logto_webhooks.clock import Clock, to_iso
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery, identify
from logto_webhooks.errors import LogtoUnreachable, NotADelivery, SignatureRejected, describe
from logto_webhooks.event_loop import forever, run_in_thread, wait_for_event
from logto_webhooks.instrumentation import (
    ApiUnavailable,
    KeyEnded,
    Observer,
    Quarantined,
    QuarantineReleased,
)
from logto_webhooks.logto import delivery_log
from logto_webhooks.logto.webhooks import leads_here, parse_webhook
from logto_webhooks.signing_keys import (
    Keyring,
    RejectedRequest,
    WebhookKey,
    guess_webhook_ids,
    is_key,
    read_webhook_id,
    verify,
)

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

ASK_S: Final = 10.0  # the shortest time between requests for keys to Logto
# How often keys are read from the database: for a while more often (LOOK_S) after a request of a
# known webhook was rejected, because a process that changes a key stores the new one there.
QUIET_S: Final = 30.0
LOOK_S: Final = 1.0
WATCHFUL_S: Final = 60.0
SOON_S: Final = 0.25
JUNK_S: Final = 2.0
_PAGE: Final = 200
_RECENT: Final = 200
# How many requests and bytes may be queued, by whether their webhook is known.
_QUEUE: Final = {True: (5_000, 64 * 2**20), False: (200, 2**20)}
Ask = Callable[[Sequence[str]], Awaitable[list[WebhookKey]]]


class Quarantine:
    """Keeps requests that no known key verifies, and releases them when a new key does."""

    def __init__(
        self,
        host: TransactionRunner,
        ring: Keyring,
        clock: Clock,
        observe: Observer,
        stored: Callable[[], None],
        ask: Ask | None = None,
    ) -> None:
        """`stored` is called when new deliveries are in the inbox. `ask` gets the keys of our
        webhooks from Logto, if its API is configured."""
        self._host = host
        self._ring = ring
        self._clock = clock
        self._observe = observe
        self._stored = stored
        self._ask = ask
        self._queue: dict[bool, list[RejectedRequest]] = {True: [], False: []}
        self._queued = {True: 0, False: 0}  # bytes
        self._wake = asyncio.Event()
        self._asked_at = -ASK_S
        self._rejected_at = -WATCHFUL_S
        self._to_ask = False
        self._untried = True  # whether a key wasn't tried on the stored requests
        self._tried, self._tried_at = 0, 0.0  # up to which id, and when
        self._ended: set[str] = set()  # fingerprints of configured keys that were reported as ended

    def offer(self, body: bytes, signature: bytes, at: int) -> None:
        """Queue a rejected request, if it may be from Logto and there is room."""
        # `write_down` decides which webhook sent it. Nothing is parsed here, and a body that names
        # a million webhooks takes no longer than others.
        if b'"hookId"' not in body:
            return
        named = (id_ for id_ in guess_webhook_ids(body) if id_ in self._ring.webhook_ids)
        webhook_id = next(named, "")
        text = signature.strip().decode()
        request = RejectedRequest(
            body=body, signature=text, received_at=at, webhook_id=webhook_id, known=webhook_id != ""
        )
        if not self._hold(request):
            return
        self._to_ask = True
        if request.known:
            self._rejected_at = time.monotonic()
        self._wake.set()

    async def keep(self) -> None:
        """Store requests, look for keys and try them, until cancelled. Errors are reported."""

        async def turn_and_pause() -> None:
            await self.turn()
            await self._pause()

        await forever(turn_and_pause, 0, self._report)

    def _report(self, error: Exception) -> float:
        self._observe(ApiUnavailable(describe(error), ASK_S))
        return ASK_S

    async def turn(self) -> None:
        """Store queued requests, look for keys, and try new ones on all stored requests.

        Raises StoreUnavailable, LogtoUnreachable, LogtoApiError.
        """
        self._learn(await self._host.run(self._read_keys))
        await self.write_down()
        await self._try_all()
        if self._may_ask():
            self._learn(await self._ask_logto())
            await self._try_all()

    async def write_down(self) -> None:
        """Store the queued requests. Raises StoreUnavailable."""
        queued = self._queue[True] + self._queue[False]
        self._queue, self._queued = {True: [], False: []}, {True: 0, False: 0}
        try:
            proved = await self._prove(queued)
            rejected = [
                request
                for offered, delivery in proved
                if delivery is None and (request := self._name_webhook(offered))
            ]
            if rejected:
                await self._host.run(lambda store: store.webhook_keys.add_rejected(rejected))
                queued = [offered for offered, delivery in proved if delivery]
                self._observe(Quarantined(len(rejected)))
            await self._add([delivery for _, delivery in proved if delivery], [])
        except BaseException:
            for request in queued:
                self._hold(request)
            raise

    def _name_webhook(self, offered: RejectedRequest) -> RejectedRequest | None:
        """Return the request with the webhook that its top level names; None if Logto can't have
        sent it."""
        webhook_id = read_webhook_id(offered.body)  # None if the body isn't JSON
        if webhook_id is None:
            return None
        known = webhook_id in self._ring.webhook_ids
        return replace(offered, webhook_id=webhook_id, known=known)

    def _hold(self, request: RejectedRequest) -> bool:
        """Queue a request, if there is room."""
        is_known, size = request.known, len(request.body)
        rows, most = _QUEUE[is_known]
        if len(self._queue[is_known]) >= rows or self._queued[is_known] + size > most:
            return False
        self._queued[is_known] += size
        self._queue[is_known].append(request)
        return True

    def _learn(self, learnt: list[WebhookKey]) -> None:
        now = self._clock.now()
        self._untried = self._ring.learn(learnt, now) or self._untried
        for mark, ended_at in self._ring.find_ended(now).items():
            if mark not in self._ended:
                self._ended.add(mark)
                self._observe(KeyEnded(to_iso(ended_at)))

    def _read_keys(self, store: Store) -> list[WebhookKey]:
        uses = self._ring.take_uses()
        if uses:
            store.webhook_keys.used(uses)
        if not self._ring.webhook_ids:
            recent = store.recent(_RECENT)
            self._ring.webhook_ids |= {
                sender for each in recent if (sender := delivery_log.find_sender(each.body))
            }
        return store.webhook_keys.learnt()

    def _may_ask(self) -> bool:
        due = time.monotonic() - self._asked_at >= ASK_S
        return self._ask is not None and self._to_ask and due

    async def _ask_logto(self) -> list[WebhookKey]:
        assert self._ask is not None
        self._asked_at, self._to_ask = time.monotonic(), False
        try:
            keys = await self._ask(self._ring.at(self._clock.now()))
        except LogtoUnreachable:
            self._to_ask = True
            raise
        await self._host.run(lambda store: store.webhook_keys.learn(keys))
        return await self._host.read(lambda store: store.webhook_keys.learnt())

    async def _try_all(self) -> None:
        """Try all requests with a new key. Without one, sometimes try those that other processes
        stored, because these may lack a key."""
        if not self._untried and time.monotonic() - self._tried_at < QUIET_S:
            return
        after = 0 if self._untried else self._tried
        while page := await self._host.read(partial(_read_page, after=after)):
            after = page[-1].id
            proved = [
                (request.id, delivery) for request, delivery in await self._prove(page) if delivery
            ]
            await self._add([delivery for _, delivery in proved], [id for id, _ in proved])
        self._tried, self._tried_at, self._untried = after, time.monotonic(), False

    async def _add(self, deliveries: list[NewDelivery], ids: list[int]) -> None:
        if not deliveries:
            return

        def add(store: Store) -> None:
            store.add(deliveries)
            store.webhook_keys.delete_rejected(ids)

        await self._host.run(add)
        self._observe(QuarantineReleased(len(deliveries)))
        self._stored()

    async def _prove(
        self, requests: Sequence[RejectedRequest]
    ) -> list[tuple[RejectedRequest, NewDelivery | None]]:
        """Try the current keys. Return each request with its delivery, if a key verifies it."""

        def prove() -> list[tuple[RejectedRequest, NewDelivery | None]]:
            return [(request, self._verify(request)) for request in requests]

        # In a thread, because bodies may be large, and many.
        return await run_in_thread(prove) if requests else []

    def _verify(self, request: RejectedRequest) -> NewDelivery | None:
        try:
            keys = self._ring.at(self._clock.now())
            verified = verify(request.body, [request.signature.encode()], keys)
            return identify(verified, request.received_at, ahead=self._clock.ahead_ms)
        except (SignatureRejected, NotADelivery):
            return None

    async def _pause(self) -> None:
        self._wake.clear()
        quiet_s = ASK_S if self._to_ask else QUIET_S
        watchful = time.monotonic() - self._rejected_at < WATCHFUL_S
        await wait_for_event(self._wake, LOOK_S if watchful else quiet_s)
        await asyncio.sleep(SOON_S if self._queue[True] else JUNK_S)


def make_key_reader(
    logto: ManagementClient, host: TransactionRunner, clock: Clock, public_url: str | None
) -> Ask:
    """Return a function that gets the keys of the webhooks that lead here from Logto."""

    async def ask(keys: Sequence[str]) -> list[WebhookKey]:
        recent = await host.read(lambda store: store.recent(_RECENT))
        seen = {sender for each in recent if (sender := delivery_log.find_sender(each.body))}
        asked_at = clock.now()
        return [
            WebhookKey(webhook_id=webhook.id, key=webhook.signing_key, learnt_at=asked_at)
            async for page in logto.webhooks()
            for webhook in filter(None, map(parse_webhook, page.content))
            if leads_here(webhook, seen, keys, public_url) and is_key(webhook.signing_key)
        ]

    return ask


def _read_page(store: Store, *, after: int) -> list[RejectedRequest]:
    return store.webhook_keys.list_rejected(after, _PAGE)
