"""Send requests: with a rate limit, time limits, and retries where these may help."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from math import floor
from typing import Any, Final

import httpx2
import msgspec
from msgspec import Struct

from logto_webhooks import canonical_json
from logto_webhooks.clock import Clock
from logto_webhooks.deliveries import LARGE
from logto_webhooks.errors import LogtoUnreachable
from logto_webhooks.event_loop import run_in_thread
from logto_webhooks.logto.errors import ApiReply, no_address, redirected

AT_ONCE: Final = 4


class RateLimiter:
    """Limits requests per second, including token requests."""

    def __init__(
        self,
        per_second: float,
        sleep: Callable[[float], Awaitable[None]],
        monotonic: Callable[[], float],
    ) -> None:
        self._gap = 1 / per_second
        self._sleep = sleep
        self._monotonic = monotonic
        self._next = monotonic()
        self._places = asyncio.Semaphore(AT_ONCE)
        self._line = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait in line, then hold one of the places within the block."""
        async with self._places:
            async with self._line:
                wait = self._next - self._monotonic()
                if wait > 0:
                    await self._sleep(wait)
                # Counted from its actual start, so that a late one isn't too close to the next.
                self._next = self._monotonic() + self._gap
            yield


TRIES: Final = 4
FIRST_WAIT_S: Final = 0.5
LONGEST_WAIT_S: Final = 30.0


def retry_delay(tries: int, asked_for: float | None, jitter: float) -> float | None:
    """Return the seconds to wait after a number of failed tries; None to give up.

    `asked_for` are the seconds that the answer asked for. Else the waits start at half a second and
    double. `jitter` (0 to 1) adds up to the same again, so that requests that failed together
    aren't retried together.
    """
    if tries >= TRIES:
        return None
    if asked_for is not None:
        return min(asked_for, LONGEST_WAIT_S)
    return FIRST_WAIT_S * 2.0 ** (tries - 1) * (1 + jitter)


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After: seconds, or a date, which is relative to the Date header."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    until, now = parse_date(text), parse_date(headers.get("date", ""))
    return None if until is None or now is None else max(0.0, (until - now) / 1000)


def parse_date(text: str) -> int | None:
    """Return a header's date in milliseconds since the epoch; None if it isn't a date."""
    try:
        return round(parsedate_to_datetime(text).timestamp() * 1000)
    except (ValueError, OverflowError):
        return None


CONNECT_S: Final = 5.0
REQUEST_S: Final = 30.0
# The limit of an answer, decompressed. A page of a hundred users has some 100 KiB.
MOST_BYTES: Final = 32 * 2**20
# Logto closes idle connections after 5 s. By closing them first, we lose no request.
_LIMITS: Final = httpx2.Limits(max_connections=AT_ONCE, keepalive_expiry=4.0)

# httpx2's own messages may quote a header or an answer.
_PROBLEMS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (httpx2.ConnectTimeout, "no connection in time"),
    (TimeoutError, "no answer in time"),
    (httpx2.RemoteProtocolError, "the answer is incomplete, or isn't HTTP"),
    (httpx2.DecodingError, "the answer is incomplete"),
)


SECOND_MS: Final = 1000  # the precision of the header Date
_RECENT_S: Final = 60.0  # in this time, two clocks drift apart by only a few milliseconds


class ServerClock:
    """Computes a lower bound of the server's time at a request, from the `Date` of its answers.

    An answer is made no earlier than its Date, and before it arrives. So each one bounds how far
    our monotonic clock is ahead of the server's, and the smallest recent bound is the best. It
    improves with more answers, from a second to milliseconds. Our wall clock and those of other
    hosts aren't used.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque()  # asked (s), ahead (ms)

    def read(self, asked: float, took_ms: int, date: int) -> int:
        """Return ms on the server's clock. `asked` is in seconds on our monotonic clock."""
        arrived_ms = asked * 1000 + took_ms
        while self._recent and self._recent[0][0] < asked - _RECENT_S:
            self._recent.popleft()
        at = self._note(asked, arrived_ms - date)
        if at > date + SECOND_MS:  # its clock was set back, or another server answers
            self._recent.clear()
            at = self._note(asked, arrived_ms - date)
        return at

    def _note(self, asked: float, ahead: float) -> int:
        self._recent.append((asked, ahead))
        return floor(asked * 1000 - min(ahead for _, ahead in self._recent))


class FailedTry(Struct, frozen=True):
    """A failed try. `asked_for` are the seconds that Logto asked us to wait."""

    problem: str
    asked_for: float | None = None


class Transport:
    """Sends requests to one server, over a few connections that are opened on first use."""

    def __init__(
        self,
        endpoint: str,
        limiter: RateLimiter,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]],
        request_s: float,
        monotonic: Callable[[], float],
    ) -> None:
        self.endpoint = endpoint
        self._limiter = limiter
        self._clock = clock
        self._sleep = sleep
        self._request_s = request_s
        self._monotonic = monotonic
        self._server_clock = ServerClock()
        self._client: httpx2.AsyncClient | None = None

    async def send(
        self,
        method: str,
        path: str,
        authorization: str,
        *,
        params: Mapping[str, int] | None = None,
        form: Mapping[str, str] | None = None,
        content: object = None,
        again: bool = True,
    ) -> ApiReply:
        """Send a request, and retry it unless `again` is off. `content` is sent as JSON.

        Raises LogtoUnreachable, and LogtoApiError on a redirect.
        """
        request = self._open().build_request(
            method,
            self._make_url(path),
            headers={"authorization": authorization},
            params=params,
            data=form,
            json=content,
        )
        return await self._send_until_answered(request, again)

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _make_url(self, path: str) -> httpx2.URL:
        try:
            url = httpx2.URL(self.endpoint + path)
        except httpx2.InvalidURL:
            raise no_address(self.endpoint) from None
        if not url.host or (url.port or 0) > 65535:
            raise no_address(self.endpoint)
        return url

    async def _send_until_answered(self, request: httpx2.Request, again: bool) -> ApiReply:
        tries = 1 if again else TRIES
        while isinstance(outcome := await self._try(request), FailedTry):
            delay = retry_delay(tries, outcome.asked_for, random.random())
            if delay is None:
                raise LogtoUnreachable(endpoint=self.endpoint, problem=outcome.problem)
            await self._sleep(delay)
            tries += 1
        return outcome

    async def _try(self, request: httpx2.Request) -> ApiReply | FailedTry:
        async with self._limiter.turn():
            asked_at, asked = self._clock.now(), self._monotonic()
            try:
                async with asyncio.timeout(self._request_s):
                    response, content = await self._fetch(request)
            except (httpx2.TransportError, httpx2.DecodingError, TimeoutError) as error:
                return FailedTry(_describe(error))
            took = round((self._monotonic() - asked) * 1000)
        return await self._read(response, content, asked_at, asked, took)

    async def _fetch(self, request: httpx2.Request) -> tuple[httpx2.Response, bytes | None]:
        """Return the answer with its content; None if that is too large. It is decompressed in
        small pieces, because a few bytes may decompress to gigabytes."""
        response = await self._open().send(request, stream=True)
        try:
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MOST_BYTES:
                    return response, None
                await asyncio.sleep(0)  # one network read may yield several pieces
            return response, bytes(content)
        finally:
            await response.aclose()

    def _open(self) -> httpx2.AsyncClient:
        if self._client is None:
            timeout = httpx2.Timeout(None, connect=CONNECT_S)
            self._client = httpx2.AsyncClient(timeout=timeout, limits=_LIMITS)
        return self._client

    async def _read(
        self,
        response: httpx2.Response,
        body: bytes | None,
        asked_at: int,
        asked: float,
        took: int,
    ) -> ApiReply | FailedTry:
        status, headers = response.status_code, response.headers
        if response.has_redirect_location:
            raise redirected(self.endpoint, _find_origin(response))
        if status == 429 or status >= 500:
            return FailedTry(f"it answers {status}", read_retry_after(headers))
        content, unreadable = None, body is None
        try:
            content = await _decode(response, body) if body is not None else None
        except msgspec.DecodeError:
            return FailedTry("the answer is incomplete, or isn't JSON")
        except ValueError:  # complete, but nested too deeply, or with a number out of range
            unreadable = True
        date = parse_date(headers.get("date", ""))
        return ApiReply(
            status=status,
            content=content,
            unreadable=unreadable,
            asked_at=asked_at,
            took=took,
            date=date,
            asked_after=None if date is None else self._server_clock.read(asked, took, date),
            total=_parse_count(headers.get("total-number", "")),
        )


def _describe(error: Exception) -> str:
    for kind, problem in _PROBLEMS:
        if isinstance(error, kind):
            return problem
    if isinstance(error, httpx2.ConnectError):
        return str(error) or "no connection"
    return f"the connection was lost ({type(error).__name__})"


def _find_origin(response: httpx2.Response) -> str:
    target = response.url.join(response.headers["location"])
    return f"{target.scheme}://{target.netloc.decode('ascii')}"


async def _decode(response: httpx2.Response, body: bytes) -> Any:
    if not response.headers.get("content-type", "").startswith("application/json"):
        return None
    if len(body) >= LARGE:  # it would block the event loop
        return await run_in_thread(canonical_json.decode, body)
    return canonical_json.decode(body)


def _parse_count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
