"""Receiving: verify, identify, join the batch that is being committed, answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from msgspec import Struct

from logto_webhooks.core.delivery import Delivery, identify
from logto_webhooks.core.inbox import Accepted
from logto_webhooks.core.ports import Clock, Host, Observer
from logto_webhooks.core.reports import NotStored, Refused, RefusedFor, Stored
from logto_webhooks.core.signature import VerifiedBody, verify
from logto_webhooks.errors import (
    LogtoWebhooksError,
    NotADelivery,
    RowRejected,
    SignatureRejected,
    StoreUnavailable,
)
from logto_webhooks.service.keyring import Keyring
from logto_webhooks.service.patience import Patience

MAX_ROWS: Final = 512
LARGE: Final = 256 * 2**10
MAX_BYTES: Final = 16 * 2**20
LONGEST_WAIT_S: Final = 8.0  # Logto waits 10 s
RETRY_AFTER_S: Final = 5

_LIKELY_CAUSES: Final = (
    "likely the key of another hook, a key that was rotated, or a proxy that changed the body"
)
_NOT_LOGTO: Final = "likely not a call of Logto, or a proxy that changed the headers"


def _forgotten(body: bytes, signature: bytes, at: int) -> None:
    """Keep nothing of it."""


class Answer(Struct, frozen=True):
    """What the receiver answers. Logto stores it, so it holds nothing of a person."""

    status: int
    content: dict[str, str | bool]
    retry_after_s: int | None = None


class Aside(Protocol):
    """Runs a function where it holds back nobody."""

    async def __call__(
        self, function: Callable[[VerifiedBody, int], Delivery], body: VerifiedBody, at: int, /
    ) -> Delivery:
        """Return what it returns."""


class Receiver:
    """Takes the raw parts of a request and gives the answer, whatever the web framework."""

    def __init__(
        self,
        keys: Sequence[str] | Keyring,
        store: Callable[[Delivery], Awaitable[Accepted]],
        clock: Clock,
        observe: Observer,
        aside: Aside = asyncio.to_thread,
        reject: Callable[[bytes, bytes, int], None] = _forgotten,
        ahead: Callable[[], int] = lambda: 0,
    ) -> None:
        """`store` returns once the delivery is durable; `aside` runs what takes long; `reject`
        gets the body, the signature and the moment of what no key signed; `ahead` tells how far
        Logto's clock is ahead of ours (ms)."""
        self._ring = keys if isinstance(keys, Keyring) else Keyring(keys)
        self._reject = reject
        self._store = store
        self._aside = aside
        self._clock = clock
        self._observe = observe
        self._ahead = ahead

    def _identify(self, body: VerifiedBody, at: int) -> Delivery:
        return identify(body, at, ahead=self._ahead())

    async def receive(self, signatures: Sequence[bytes], body: bytes) -> Answer:
        """Answer 200 once the delivery is on disk, 401 or 400 for what isn't one, else 503.

        `signatures` holds the values of all headers named `logto-signature-sha-256`.
        """
        started = self._clock.now()
        try:
            keys = self._ring.at(started)
            verified = verify(body, signatures, keys)
            if len(body) < LARGE:
                delivery = self._identify(verified, started)
            else:  # it would hold back all others
                delivery = await self._aside(self._identify, verified, started)
            accepted = await self._store(delivery)
        except SignatureRejected as error:
            hint = _LIKELY_CAUSES if error.well_formed else _NOT_LOGTO
            if error.well_formed:
                self._reject(body, signatures[0], started)
            return self.refuse(401, "invalid_signature", error, hint)
        except NotADelivery as error:
            return self.refuse(400, "not_a_delivery", error, "it is signed, but not by Logto")
        except (StoreUnavailable, RowRejected):
            return Answer(503, {"error": "not_stored"}, retry_after_s=RETRY_AFTER_S)
        self._ring.note_use(keys[verified.key], body, started)
        took = self._clock.now() - started
        self._observe(
            Stored(accepted.id, delivery.event, delivery.subject, accepted.duplicate, took)
        )
        return Answer(200, {"id": str(accepted.id), "duplicate": accepted.duplicate})

    def refuse(self, status: int, code: RefusedFor, error: LogtoWebhooksError, hint: str) -> Answer:
        """Answer a 4xx, and report it."""
        self._observe(Refused(status, code, str(error), hint))
        return Answer(status, {"error": code})


class _Waiting(Struct, frozen=True, eq=False):
    delivery: Delivery
    answer: asyncio.Future[Accepted]


class GroupCommit:
    """One transaction for all requests that wait: handed over and woken per batch."""

    def __init__(self, host: Host, observe: Observer, stored: Callable[[], None]) -> None:
        """`stored` is called after every batch that holds something new."""
        self._host = host
        self._observe = observe
        self._stored = stored
        self._patience = Patience(LONGEST_WAIT_S)
        self._waiting: list[_Waiting] = []
        self._committing: asyncio.Task[None] | None = None

    async def add(self, delivery: Delivery) -> Accepted:
        """Return once it is committed. Raises StoreUnavailable or RowRejected."""
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all())
        waiting = _Waiting(delivery, self._committing.get_loop().create_future())
        self._waiting.append(waiting)
        try:
            with self._patience.limit():
                return await waiting.answer
        except TimeoutError:
            slow = StoreUnavailable(problem=f"it took longer than {LONGEST_WAIT_S:.0f} s")
            self._observe(NotStored(1, str(slow)))
            raise slow from None

    async def _commit_all(self) -> None:
        try:
            while await self._gathered() and (batch := self._next_batch()):
                await self._commit(batch)
        finally:
            self._committing = None

    async def _gathered(self) -> bool:
        # Let those in who are at the door, or were just answered and ask again: a batch of all
        # costs little more than a batch of one.
        for _ in range(2):
            await asyncio.sleep(0)
        return True

    def _next_batch(self) -> list[_Waiting]:
        # Who gave up waiting isn't stored for nobody.
        self._waiting = [each for each in self._waiting if not each.answer.done()]
        size = rows = 0
        for each in self._waiting[:MAX_ROWS]:
            size += len(each.delivery.body)
            if rows and size > MAX_BYTES:
                break
            rows += 1
        batch, self._waiting = self._waiting[:rows], self._waiting[rows:]
        return batch

    async def _commit(self, batch: list[_Waiting]) -> None:
        deliveries = [each.delivery for each in batch]
        try:
            accepted = await self._host.run(lambda store: store.add(deliveries))
        except RowRejected as error:
            if len(batch) == 1:
                self._fail(batch, error)
                return
            # One bad row harms nobody else: halve until it is alone.
            await self._commit(batch[: len(batch) // 2])
            await self._commit(batch[len(batch) // 2 :])
        except Exception as error:
            self._fail(batch, error)
        else:
            for each, answer in zip(batch, accepted, strict=True):
                if not each.answer.done():
                    each.answer.set_result(answer)
            if not all(answer.duplicate for answer in accepted):
                self._stored()

    def _fail(self, batch: list[_Waiting], error: Exception) -> None:
        known = isinstance(error, LogtoWebhooksError)
        problem = str(error) if known else f"unexpected {type(error).__name__}"
        self._observe(NotStored(len(batch), problem))
        for each in batch:
            if not each.answer.done():
                each.answer.set_exception(StoreUnavailable(problem=problem))
