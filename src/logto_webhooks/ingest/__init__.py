"""Receive a delivery: verify, identify and store it, and answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from msgspec import Struct

from logto_webhooks.clock import Clock
from logto_webhooks.deliveries import LARGE, NewDelivery, StoreResult, identify
from logto_webhooks.errors import (
    LogtoWebhooksError,
    NotADelivery,
    RowRejected,
    SignatureRejected,
    StoreUnavailable,
)
from logto_webhooks.event_loop import Offloader, run_in_thread
from logto_webhooks.ingest.body import RequestBody
from logto_webhooks.ingest.group_commit import LONGEST_WAIT_S, TOO_LATE, retrieve_error
from logto_webhooks.instrumentation import (
    DeliveriesLost,
    DeliveryStored,
    Observer,
    RefusedFor,
    RequestRefused,
)
from logto_webhooks.signing_keys import (
    FEW,
    NO_KNOWN_KEY,
    Keyring,
    VerifiedBody,
    read_signature,
    try_keys,
)

RETRY_AFTER_S: Final = 5

_LIKELY_CAUSES: Final = (
    "probably the key of another webhook, a rotated key, or a proxy that changed the body"
)
_NOT_LOGTO: Final = (
    "a proxy that changed the headers, a probe of doctor, or a request of somebody else"
)


class WebhookResponse(Struct, frozen=True):
    """The receiver's answer. Logto stores it, so it contains no personal data."""

    status: int
    content: dict[str, str | bool]
    retry_after_s: int | None = None


StoreDelivery = Callable[
    [NewDelivery, float | None, RequestBody | None], Awaitable[StoreResult | None]
]


class _Request(Struct, frozen=True):
    """A body with a well-formed signature, and when it arrived (ms)."""

    body: bytes
    signature: bytes
    at: int

    @property
    def is_large(self) -> bool:
        """Whether to verify and parse it in a thread."""
        return len(self.body) >= LARGE


_Identified = tuple[VerifiedBody, NewDelivery]


class Receiver:
    """Verifies and stores a request's body, and decides the answer, in any web framework."""

    def __init__(
        self,
        keys: Sequence[str] | Keyring,
        store: StoreDelivery,
        clock: Clock,
        observe: Observer,
        reject: Callable[[bytes, bytes, int], None] = lambda body, signature, at: None,
        offloader: Offloader | None = None,
    ) -> None:
        """`store` returns once the delivery is durable in the database, or in the spool (None). It
        gets the deadline, by the event loop's clock, and the request's body, whose room it holds if
        it takes longer. `reject` gets the body, the signature and the time of a request that no key
        verifies by the deadline."""
        self._ring = keys if isinstance(keys, Keyring) else Keyring(keys)
        self._reject = reject
        self._store = store
        self._offloader = offloader or Offloader()
        self._clock = clock
        self._observe = observe
        self._storing: dict[asyncio.Task[StoreResult | None], asyncio.Task[_Identified]] = {}
        self._all_keys = asyncio.Lock()  # held while all keys are tried

    async def receive(
        self,
        signatures: Sequence[bytes],
        body: bytes,
        deadline: float | None = None,
        room: RequestBody | None = None,
    ) -> WebhookResponse:
        """Answer 200 once the delivery is on disk, 401 or 400 if it isn't a delivery, or else 503
        by the deadline (by the event loop's clock; by default `LONGEST_WAIT_S` from now). Even
        then, a verified delivery is stored, and its room is held until that.

        `signatures` holds the values of all headers named `logto-signature-sha-256`.
        """
        started = self._clock.now()
        try:
            if not self._ring.at(started):
                raise SignatureRejected(reason="no signing key is configured")
            request = _Request(body, read_signature(signatures), started)
            identified = None if request.is_large else self._identify_first(request)
            if identified is None and not request.is_large and not self._has_many_keys(request):
                raise self._set_aside(request)
            if identified is not None:
                verified, delivery = identified
                accepted = await self._store(delivery, deadline, room)
            else:
                verified, delivery, accepted = await self._store_slowly(request, deadline, room)
        except SignatureRejected as error:
            hint = _LIKELY_CAUSES if error.well_formed else _NOT_LOGTO
            return self.refuse(401, "invalid_signature", error, hint)
        except NotADelivery as error:
            return self.refuse(400, "not_a_delivery", error, "it is signed, but isn't from Logto")
        except (StoreUnavailable, RowRejected):
            return WebhookResponse(503, {"error": "not_stored"}, retry_after_s=RETRY_AFTER_S)
        self._ring.note_use(verified.key, body, started)
        if accepted is None:
            return WebhookResponse(200, {"spooled": True, "duplicate": False})
        took = self._clock.now() - started
        self._observe(
            DeliveryStored(accepted.id, delivery.event, delivery.subject, accepted.duplicate, took)
        )
        return WebhookResponse(200, {"id": str(accepted.id), "duplicate": accepted.duplicate})

    async def finish(self) -> None:
        """At the end, wait until verified deliveries are stored, for at most `LONGEST_WAIT_S`."""
        if not self._storing:
            return
        _, lost = await asyncio.wait(self._storing.values(), timeout=LONGEST_WAIT_S)
        if lost:
            self._observe(DeliveriesLost(len(lost)))

    async def _store_slowly(
        self, request: _Request, deadline: float | None, room: RequestBody | None
    ) -> tuple[VerifiedBody, NewDelivery, StoreResult | None]:
        """Verify and identify a large body, or one that needs all keys, without blocking the event
        loop. A late or cancelled request stops waiting, but its delivery is stored: Logto won't
        send it again."""
        loop = asyncio.get_running_loop()
        until = loop.time() + LONGEST_WAIT_S if deadline is None else deadline
        identifying = loop.create_task(self._identify_slowly(request, until))

        async def store() -> StoreResult | None:
            _, delivery = await identifying
            return await self._store(delivery, deadline, room)

        storing = loop.create_task(store())
        self._storing[storing] = identifying
        storing.add_done_callback(self._forget)
        if room is not None:
            room.hold()
            storing.add_done_callback(lambda _: room.close())
        await asyncio.wait({identifying}, timeout=max(0, until - loop.time()))
        if not identifying.done():
            raise StoreUnavailable(problem=TOO_LATE)
        accepted = await asyncio.shield(storing)
        return *identifying.result(), accepted

    async def _identify_slowly(self, request: _Request, until: float) -> _Identified:
        """Try the probable keys, and then all. Raises SignatureRejected, NotADelivery, and
        StoreUnavailable if all can't be tried by `until`."""
        identified = None
        if request.is_large:
            identified = await self._offloader.run(lambda: self._identify_first(request))
        try:
            async with asyncio.timeout_at(until):
                if identified is None and self._has_many_keys(request):
                    identified = await self._try_all(request)
        except TimeoutError:
            self._set_aside(request)
            raise StoreUnavailable(problem=TOO_LATE) from None
        if identified is None:
            raise self._set_aside(request)
        return identified

    async def _try_all(self, request: _Request) -> _Identified | None:
        """Try all keys, some at a time, for one request at a time. So requests that nobody signed,
        which anybody can send, hold up neither the event loop nor those that name their webhook."""
        keys = self._ring.at(request.at)
        async with self._all_keys:
            for start in range(0, len(keys), FEW):
                identify_it = partial(self._identify, request, keys[start : start + FEW])
                if request.is_large:
                    identified = await run_in_thread(identify_it)
                else:
                    identified = identify_it()
                    await self._offloader.give_way()
                if identified is not None:
                    return identified
        return None

    def _identify_first(self, request: _Request) -> _Identified | None:
        """Verify a request with the keys that probably signed it, and identify it."""
        return self._identify(request, self._ring.guess(request.body, request.at))

    def _identify(self, request: _Request, keys: Sequence[str]) -> _Identified | None:
        verified = try_keys(request.body, request.signature, keys)
        if verified is None:
            return None
        return verified, identify(verified, request.at, ahead=self._clock.ahead_ms)

    def _has_many_keys(self, request: _Request) -> bool:
        """Whether `_identify_first` doesn't try all keys."""
        return len(self._ring.at(request.at)) > FEW

    def _set_aside(self, request: _Request) -> SignatureRejected:
        """Give a request that no key verified to `reject`. Return the error."""
        self._reject(request.body, request.signature, request.at)
        return SignatureRejected(reason=NO_KNOWN_KEY, well_formed=True)

    def _forget(self, storing: asyncio.Task[StoreResult | None]) -> None:
        del self._storing[storing]
        retrieve_error(storing)

    def refuse(
        self, status: int, code: RefusedFor, error: LogtoWebhooksError, hint: str
    ) -> WebhookResponse:
        """Answer a 4xx, and report it."""
        self._observe(RequestRefused(status, code, str(error), hint))
        return WebhookResponse(status, {"error": code})
