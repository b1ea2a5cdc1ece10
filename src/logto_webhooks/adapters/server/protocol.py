"""HTTP on one connection: uvicorn's, with limits, and fewer calls of the system."""

from __future__ import annotations

import asyncio
from typing import Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from logto_webhooks.adapters.server.corked import Corked

HEADERS_S: Final = 8.0
PIPELINE: Final = 8  # requests that wait behind another; Logto never sends any


class PatientProtocol(HttpToolsProtocol):
    """Drops a client that doesn't finish its headers in time, or that sends request after request
    without reading the answers; uvicorn would wait for ever, and keep all of them."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Who connects has something to say."""
        super().connection_made(Corked(cast(asyncio.Transport, transport), self.loop))
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Give the headers of a request, once begun, a deadline; most come in one piece."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._arm()
        if len(self.pipeline) > PIPELINE:
            self._drop()

    def on_headers_complete(self) -> None:
        """The headers are here."""
        self._disarm()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_S, self._drop)

    def _drop(self) -> None:
        self.transport.abort()

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
