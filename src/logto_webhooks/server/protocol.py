"""The HTTP protocol with limits. It sends the head and body of an answer together, because each
separate write is a system call and a packet."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

resource: Any = None
with contextlib.suppress(ImportError):  # Windows has no such module
    resource = importlib.import_module("resource")

MOST: Final = 4_096
_UNLIMITED: Final = 2**20
_LOOK_EVERY_S: Final = 0.1


class Connection(Protocol):
    """A connection that can be closed early."""

    is_brief: bool

    def may_be_closed(self, now: float) -> bool:
        """Whether it is idle or slow."""

    def is_waited_for(self) -> bool:
        """Whether a complete request is being answered, and the client reads."""

    def drop(self) -> None:
        """Close it at once."""


class Connections:
    """All open connections, and their limits."""

    def __init__(self, limit: int, most: int = MOST) -> None:
        """`limit` is how many file descriptors the process may have."""
        reserved = min(256, max(16, limit // 3))
        self._crowded_from = limit - reserved
        self._full_from = limit - reserved // 2
        self._most = most
        self._open: dict[Connection, None] = {}  # the oldest first
        self._brief: dict[Connection, None] = {}
        self._next_look = 0.0

    def add(self, connection: Connection, descriptor: int, now: float) -> None:
        """Add a new connection. Its file descriptor says how many are in use, because the system
        assigns the lowest free number."""
        is_crowded = descriptor >= self._crowded_from or len(self._open) >= self._most
        if is_crowded and not self._close_one(now):
            connection.is_brief = True
            self._brief[connection] = None
            most_brief = self._full_from - self._crowded_from
            if descriptor >= self._full_from or len(self._brief) > most_brief:
                self._close_a_brief_one()
        else:
            self._open[connection] = None

    def remove(self, connection: Connection) -> None:
        """Remove a closed connection."""
        self._open.pop(connection, None)
        self._brief.pop(connection, None)

    def _close_one(self, now: float) -> bool:
        if now < self._next_look:
            return False
        for connection in self._open:
            if connection.may_be_closed(now):
                self.remove(connection)
                connection.drop()
                return True
        self._next_look = now + _LOOK_EVERY_S  # checking thousands takes a while
        return False

    def _close_a_brief_one(self) -> None:
        oldest = next(
            (connection for connection in self._brief if not connection.is_waited_for()), None
        )
        if oldest is not None:
            self.remove(oldest)
            oldest.drop()


def raise_limit() -> int:
    """Raise the limit of file descriptors as far as the system allows, because a shell's usual
    1,024 are soon used up. Return the limit."""
    if resource is None:  # Windows has no such limit
        return _UNLIMITED
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _UNLIMITED if limit == resource.RLIM_INFINITY else limit


class CoalescingTransport(asyncio.Transport):
    """Delays each write until the next one, or until the event loop's next iteration. `on_close` is
    called before it closes."""

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        on_close: Callable[[], None],
    ) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._on_close = on_close
        self._held = b""

    def write(self, data: Any) -> None:
        """Send data soon, unless it is closing: uvicorn goes on with an answer if another request
        waits behind it."""
        if self.is_closing():
            return
        if self._held:
            data, self._held = self._held + data, b""
            self._transport.write(data)
        else:
            self._held = bytes(data)
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Send the delayed write, and close."""
        self._on_close()
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether it is closed or closing."""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return information on the connection."""
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """Stop reading."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Continue reading."""
        self._transport.resume_reading()

    def _flush(self) -> None:
        data, self._held = self._held, b""
        if data and not self.is_closing():
            self._transport.write(data)


HEADERS_S: Final = 8.0
UNREAD_S: Final = 15.0  # how long a client may leave an answer unread
HEAD_BYTES: Final = 64 * 2**10
HEADERS: Final = 200
PIPELINE: Final = 8  # requests that wait behind another; Logto doesn't pipeline
IDLE_S: Final = 15.0  # Logto closes its own idle connections after 4 to 13 s
SLOW_S: Final = 2.0
LINGER_S: Final = 1.0
_HOP: Final = {b"upgrade", b"http2-settings"}
_TOO_LARGE: Final = {414: b'{"error":"url_too_long"}', 431: b'{"error":"headers_too_large"}'}


class PatientProtocol(HttpToolsProtocol):
    """Drops a client that doesn't finish its headers or read an answer in time, or that sends many
    requests without reading the answers: uvicorn would wait for ever, and keep them all. Limits the
    size of headers and trailers, and ignores trailers. Answers a request that offers to upgrade the
    protocol in HTTP/1.1 (RFC 9110, 7.8)."""

    open_connections: Connections  # all of the server
    is_brief = False
    _deadline: asyncio.TimerHandle | None = None
    _read_deadline: asyncio.TimerHandle | None = None
    _since = 0.0
    _unread = 0  # bytes since the parser last reported headers, a body, or an end
    _is_refused = False
    _too_large = 0
    _offers_upgrade = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the deadline for the first headers."""
        coalescing = CoalescingTransport(
            cast(asyncio.Transport, transport), self.loop, self._arm_read_deadline
        )
        super().connection_made(coalescing)
        self._since = self.loop.time()
        self._arm()
        accepted = transport.get_extra_info("socket")
        self.open_connections.add(self, accepted.fileno() if accepted else 0, self._since)

    def data_received(self, data: bytes) -> None:
        """Parse data. Headers that aren't complete get a deadline."""
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        self._unread += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse()
            return
        if self._unread > HEAD_BYTES:
            self._too_large = 414 if len(self.url) > HEAD_BYTES else 431
            self._refuse()
            return
        if self.cycle is None or self.cycle.response_complete:
            self._arm()
        if len(self.pipeline) > PIPELINE:
            self.drop()

    def on_headers_complete(self) -> None:
        """Check the headers, and begin to answer."""
        if self._unread > HEAD_BYTES or len(self.headers) > HEADERS:
            self._measure()
        self._unread = 0
        if self.parser.should_upgrade():
            self._offers_upgrade = True
            return
        self._disarm()
        self._since = self.loop.time()
        super().on_headers_complete()
        if self.is_brief:
            self.cycle.keep_alive = False
        self.headers = []  # for the trailers

    def on_body(self, body: bytes) -> None:
        """Pass on a part of the body."""
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request, unless it is parsed again without its upgrade."""
        self._unread = 0
        if not self._offers_upgrade:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Note since when the connection is idle."""
        self._since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the deadline for reading what was sent."""
        super().pause_writing()
        self._arm_read_deadline()

    def resume_writing(self) -> None:
        """End the deadline, unless the rest must be read before the connection can close."""
        if not self.transport.is_closing():
            self._disarm_read_deadline()
        super().resume_writing()

    def eof_received(self) -> None:
        """Start the deadline, because the connection closes."""
        self._arm_read_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up."""
        self._disarm()
        self.open_connections.remove(self)
        super().connection_lost(exc)
        self._disarm_read_deadline()  # last, because uvicorn closes the transport again

    def may_be_closed(self, now: float) -> bool:
        """Whether it is slow, or idle for longer than Logto keeps a connection."""
        if self._read_deadline is not None:
            return now - (self._read_deadline.when() - UNREAD_S) >= SLOW_S
        if self._deadline is not None:
            return now - (self._deadline.when() - HEADERS_S) >= SLOW_S
        if self.cycle is None or self.cycle.response_complete:
            return now - self._since >= IDLE_S
        return self.cycle.more_body and now - self._since >= SLOW_S

    def is_waited_for(self) -> bool:
        """Whether a complete request is being answered, and the client reads."""
        cycle = self.cycle
        if cycle is None or self._read_deadline is not None:
            return False
        return not (cycle.response_complete or cycle.more_body)

    def drop_unread(self) -> None:
        """Close it at once if an answer is unread."""
        if self._read_deadline is not None:
            self.drop()

    def drop(self) -> None:
        """Close it at once."""
        self.transport.abort()

    def _feed(self, data: bytes) -> None:
        while len(self.pipeline) <= PIPELINE:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._remove_upgrade() + data[upgrade.args[0] :]
            else:
                return

    def _remove_upgrade(self) -> bytes:
        """Return the head without its upgrade, for a new parser that reads what follows as a
        body."""
        self._offers_upgrade = False
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            raise httptools.HttpParserError("this server isn't a proxy")
        lines = [b" ".join((method, self.url, b"HTTP/" + version.encode()))]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in _HOP)
            if name not in _HOP and value:
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"\r\n".join([*lines, b"", b""])

    def _measure(self) -> None:
        """Measure the head itself, because the bytes received may include a body."""
        size = sum(len(name) + len(value) + 4 for name, value in self.headers)
        if len(self.url) > HEAD_BYTES:
            self._too_large = 414
        elif len(self.url) + size > HEAD_BYTES or len(self.headers) > HEADERS:
            self._too_large = 431
        if self._too_large:
            raise ValueError("the head is too large")

    def _refuse(self) -> None:
        """Answer an invalid or too large request. Read on for a moment, because otherwise the
        client couldn't read the answer."""
        self._disarm()
        self._is_refused = True
        cycle = self.cycle
        if self.pipeline or (cycle and cycle.response_started and not cycle.response_complete):
            self.drop()  # an answer would mix with others
            return
        if self._too_large:
            self.logger.warning("Refused a request with more than %s bytes of headers.", HEAD_BYTES)
            status, content = self._too_large, _TOO_LARGE[self._too_large]
        else:
            self.logger.warning("Invalid HTTP request received.")
            status, content = 400, b'{"error":"not_http"}'
        head = STATUS_LINE[status] + (
            b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        )
        self.transport.write(head % len(content) + content)
        self._deadline = self.loop.call_later(LINGER_S, self.drop)

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_S, self.drop)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _arm_read_deadline(self) -> None:
        if self._read_deadline is None:
            self._read_deadline = self.loop.call_later(UNREAD_S, self.drop)

    def _disarm_read_deadline(self) -> None:
        if self._read_deadline is not None:
            self._read_deadline.cancel()
            self._read_deadline = None
