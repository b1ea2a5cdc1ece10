"""The HTTP server: uvicorn with limits on connections, headers and time."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from logto_webhooks import event_loop
from logto_webhooks.errors import AddressUnavailable
from logto_webhooks.server.protocol import Connections, PatientProtocol, raise_limit

# Logto closes its idle connections after 4 to 13 s; a server that closes first loses a delivery.
KEEP_ALIVE_S: Final = 75
GRACE_S: Final = 5
ANSWER_S: Final = GRACE_S - 1.0  # after that, what is left is spooled
DROP_S: Final = 0.3  # so long before the end, clients that don't read their answers are dropped


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address. Raises AddressUnavailable."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets that name their protocol.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # On Windows, SO_REUSEADDR would let a second process take the same port.
        exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
        reuse = socket.SO_REUSEADDR if exclusive is None else exclusive
        listener.setsockopt(socket.SOL_SOCKET, reuse, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        problem = getattr(error, "strerror", None) or str(error)
        nowhere = isinstance(error, socket.gaierror) or error.args[0] == errno.EADDRNOTAVAIL
        option = "--host" if nowhere else "--port"
        raise AddressUnavailable(host=host, port=port, problem=problem, option=option) from None
    return listener


class Server:
    """Serves `app` until `stop`, and then answers open requests within `GRACE_S`."""

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        hurry: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """`hurry` makes the application answer open requests within some seconds."""

        class OfThisServer(PatientProtocol):
            open_connections = Connections(raise_limit())

        config = uvicorn.Config(
            _answer_cancelled(app),
            http=OfThisServer,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
        )
        self._server = _Server(config)
        self._listener = listener
        self._hurry = hurry

    async def run(self) -> None:
        """Serve until a signal that stops (`on_stop`), or `stop`."""
        event_loop.on_stop(self.stop)
        await self.serve()

    async def serve(self) -> None:
        """Serve until `stop`, without handling signals."""
        await self._server.serve([self._listener])

    def stop(self) -> None:
        """Stop listening, and make `run` return."""
        self._server.should_exit = True
        self._hurry(ANSWER_S)


def _answer_cancelled(app: ASGIApp) -> ASGIApp:
    """Answer 503 to the requests that uvicorn cancels after `GRACE_S`, such as slow ones. It would
    answer 500, and log a traceback for each."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            response = JSONResponse({"error": "stopping"}, 503, {"retry-after": str(GRACE_S)})
            with contextlib.suppress(RuntimeError):  # the answer has begun
                await response(scope, receive, send)

    return answer


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Before uvicorn cancels what is left, because a client that doesn't read can't be answered
        # 503, either. Uvicorn notices within 0.1 s that its requests have ended.
        dropping = asyncio.get_running_loop().call_later(GRACE_S - DROP_S, self._drop_unread)
        try:
            await super().shutdown(sockets)
        finally:
            dropping.cancel()

    def _drop_unread(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, PatientProtocol):
                connection.drop_unread()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise the signal again, so that the exit code is 143 instead of 0.
        yield
