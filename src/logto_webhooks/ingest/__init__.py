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
from logto_webhooks.event_loop import Offloader
from logto_webhooks.ingest.body import RequestBody
from logto_webhooks.ingest.group_commit import LONGEST_WAIT_S, TOO_LATE, retrieve_error
from logto_webhooks.instrumentation import (
    DeliveriesLost,
    DeliveryStored,
    Observer,
    RefusedFor,
    RequestRefused,
)
from logto_webhooks.signing_keys import Keyring, VerifiedBody, verify

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
        verifies."""
        self._ring = keys if isinstance(keys, Keyring) else Keyring(keys)
        self._reject = reject
        self._store = store
        self._offloader = offloader or Offloader()
        self._clock = clock
        self._observe = observe
        self._storing: dict[asyncio.Task[StoreResult | None], asyncio.Task[NewDelivery]] = {}

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
            keys = self._ring.at(started)
            verified = verify(body, signatures, keys)
            if len(body) < LARGE:
                delivery = identify(verified, started, ahead=self._clock.ahead_ms)
                accepted = await self._store(delivery, deadline, room)
            else:
                delivery, accepted = await self._store_large(verified, started, deadline, room)
        except SignatureRejected as error:
            hint = _LIKELY_CAUSES if error.well_formed else _NOT_LOGTO
            if error.well_formed:
                self._reject(body, signatures[0], started)
            return self.refuse(401, "invalid_signature", error, hint)
        except NotADelivery as error:
            return self.refuse(400, "not_a_delivery", error, "it is signed, but isn't from Logto")
        except (StoreUnavailable, RowRejected):
            return WebhookResponse(503, {"error": "not_stored"}, retry_after_s=RETRY_AFTER_S)
        self._ring.note_use(keys[verified.key], body, started)
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

    async def _store_large(
        self, verified: VerifiedBody, started: int, deadline: float | None, room: RequestBody | None
    ) -> tuple[NewDelivery, StoreResult | None]:
        """Identify the delivery in a thread, because it would block the event loop. A late or
        cancelled request stops waiting, but its delivery is stored: Logto won't send it again."""
        loop = asyncio.get_running_loop()
        identify_it = partial(identify, verified, started, ahead=self._clock.ahead_ms)
        identifying = loop.create_task(self._offloader.run(identify_it))

        async def store() -> StoreResult | None:
            return await self._store(await identifying, deadline, room)

        storing = loop.create_task(store())
        self._storing[storing] = identifying
        storing.add_done_callback(self._forget)
        if room is not None:
            room.hold()
            storing.add_done_callback(lambda _: room.close())
        left_s = LONGEST_WAIT_S if deadline is None else deadline - loop.time()
        await asyncio.wait({identifying}, timeout=max(0, left_s))
        if not identifying.done():
            raise StoreUnavailable(problem=TOO_LATE)
        accepted = await asyncio.shield(storing)
        return identifying.result(), accepted

    def _forget(self, storing: asyncio.Task[StoreResult | None]) -> None:
        del self._storing[storing]
        retrieve_error(storing)

    def refuse(
        self, status: int, code: RefusedFor, error: LogtoWebhooksError, hint: str
    ) -> WebhookResponse:
        """Answer a 4xx, and report it."""
        self._observe(RequestRefused(status, code, str(error), hint))
        return WebhookResponse(status, {"error": code})
