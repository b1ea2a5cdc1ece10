"""What comes through a tunnel: verified, and forwarded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from logto_webhooks.core.delivery import identify
from logto_webhooks.core.ports import Clock
from logto_webhooks.core.signature import verify
from logto_webhooks.errors import NotADelivery, SignatureRejected
from logto_webhooks.service.listen import Answer, Forward, Forwarded, forwarded


class Relay:
    """Between the tunnel and the application: anybody can reach the one, only Logto the other."""

    def __init__(
        self, forward: Forward, clock: Clock, show: Callable[[Forwarded], None], count: int | None
    ) -> None:
        """`enough` is set after so many."""
        self.enough = asyncio.Event()
        self._forward = forward
        self._clock = clock
        self._show = show
        self._left = count
        self._open = asyncio.Event()
        self._keys: tuple[str, ...] = ()

    def open(self, key: str) -> None:
        """Take what is signed with the webhook's key; until it is known, who comes waits."""
        self._keys = (key,)
        self._open.set()

    async def take(self, body: bytes, signatures: Sequence[bytes]) -> Answer:
        """Pass a delivery on, and the application's answer back."""
        await self._open.wait()
        try:
            verified = verify(body, signatures, self._keys)
            delivery = identify(verified, self._clock.now())
        except SignatureRejected:
            return Answer(status=401)
        except NotADelivery:
            return Answer(status=400)
        if self.enough.is_set():
            return Answer(status=503)
        answer = await self._forward(body)
        self._show(forwarded(delivery, answer))
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self.enough.set()
        return answer
