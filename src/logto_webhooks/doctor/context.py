"""The facts that checks use. Each is read once."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Struct

from logto_webhooks.clock import SystemClock, to_iso
from logto_webhooks.database import Database
from logto_webhooks.database.migrate import DatabaseInfo
from logto_webhooks.database.runner import run_or_rehearse
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import Status, identify
from logto_webhooks.errors import RowRejected, StoreUnavailable
from logto_webhooks.jobs import RegisteredHandler
from logto_webhooks.logto import delivery_log
from logto_webhooks.logto.api_responses import ApiResponse
from logto_webhooks.logto.webhooks import Webhook, is_ours, parse_webhook
from logto_webhooks.settings import Settings, split_keys
from logto_webhooks.signing_keys import WebhookKey, trust
from logto_webhooks.validation import is_url, strip_url

if TYPE_CHECKING:
    import httpx2

    from logto_webhooks.logto.client import ManagementClient
    from logto_webhooks.mapping.own_schema import OwnSchema

T = TypeVar("T")
DAY_MS: Final = 86_400_000
LIMIT_S: Final = 10.0  # Logto's time limit for a response
MOST: Final = 1_000  # entries that are read of a webhook's log
_RECENT: Final = 200  # deliveries that are searched for webhook IDs
_FRESH_MS: Final = 3_600_000  # a failure is reported this long, even if it was recovered


class DoctorTarget(Struct, frozen=True, kw_only=True):
    """What is checked. Nothing is opened before a check needs it.

    `database_setting` is the name of the setting with the database's URL. `open_files` returns the
    modes of files that other users can read, by path. Without an application, `handlers` and
    `databases` are None; `databases` returns the database that the handlers run on, and the
    application's. `spooled` deliveries wait in the spool directory. Others can write to it if there
    is a `spool_problem`. A URL must answer within `limit_s`. `inspect_own_schema` compares the
    application's mapped tables with its mappings. `find_handler_problem` says why the application
    doesn't start, and `uses_api` whether it uses Logto's API.
    """

    settings: Settings
    least_free_mb: int
    limit_s: float
    open: Callable[[], Database]
    database_setting: str
    open_files: Callable[[], Mapping[str, str]]
    make_client: Callable[[], ManagementClient]
    handlers: Sequence[RegisteredHandler] | None = None
    databases: Callable[[], tuple[str, str]] | None = None
    spooled: int = 0
    spool_problem: str = ""
    inspect_own_schema: Callable[[], Awaitable[OwnSchema]]
    find_handler_problem: Callable[[], str | None]
    uses_api: Callable[[], bool]

    @property
    def keys(self) -> tuple[str, ...]:
        """The signing keys that are set."""
        return split_keys(self.settings.signing_key)


class LogSummary(Struct, kw_only=True):
    """Counts of the newest entries of the last day. `causes` counts failures. `recovered` counts
    those that failed more than an hour ago and are now in the inbox.

    Deliveries that aren't in the inbox: `answered` ones were logged as a success, `recent` ones may
    still be recovered, and `late` ones should have been recovered.
    """

    entries: int = 0
    total: int = 0
    causes: dict[str, int] = {}
    recovered: int = 0
    late: int = 0
    recent: int = 0
    answered: int = 0


class OurWebhooks(Struct, frozen=True):
    """The webhooks that lead here. `by_path` means that only the path of their URL matches, so they
    may belong to another system."""

    webhooks: list[Webhook]
    by_path: bool


Read = Callable[["CheckContext"], Awaitable[T]]


def _read_once(read: Read[T]) -> Read[T]:
    """Read a fact when a check first needs it, and cache it."""

    @functools.wraps(read)
    async def read_or_return(context: CheckContext) -> T:
        if read not in context.facts:
            context.facts[read] = await read(context)
        fact: T = context.facts[read]
        return fact

    return read_or_return


class CheckContext:
    """The facts that checks share. `passed` has the names of the checks that passed."""

    def __init__(self, target: DoctorTarget) -> None:
        self.target = target
        self.settings = target.settings
        self.passed: set[str] = set()
        self.facts: dict[object, Any] = {}
        self._logto: ManagementClient | None = None

    async def close(self) -> None:
        """Close the connections to Logto."""
        if self._logto is not None:
            await self._logto.close()

    async def read(self, work: Callable[[Store], T]) -> T:
        """Read something from the database."""
        return await self.target.open().host.read_long(work)

    @_read_once
    async def database_info(self) -> DatabaseInfo:
        """Inspect the database."""
        return await self.target.open().inspect()

    async def find_refusal(self) -> str | None:
        """Return why a delivery can't be stored now; None if it can. The one that is tried isn't
        kept."""
        now = SystemClock().now()
        body = b'{"event": "Test", "createdAt": "%s"}' % to_iso(now).encode()
        delivery = identify(trust(body), now)
        try:
            await run_or_rehearse(
                self.target.open().host, lambda store: store.add([delivery]), dry=True
            )
        except (RowRejected, StoreUnavailable) as error:
            return error.problem
        return None

    @_read_once
    async def status(self) -> Status:
        """Count deliveries and records."""
        return await self.read(lambda store: store.status())

    @_read_once
    async def registered_handlers(self) -> list[RegisteredHandler]:
        """Read the registered handlers."""
        return await self.read(lambda store: store.jobs.handlers())

    @_read_once
    async def webhook_pages(self) -> list[ApiResponse]:
        """List Logto's webhooks, page by page."""
        self._logto = self._logto or self.target.make_client()
        return [page async for page in self._logto.webhooks()]

    async def webhooks(self) -> list[Webhook]:
        """List Logto's webhooks."""
        items = [item for page in await self.webhook_pages() for item in page.content]
        return [webhook for item in items if (webhook := parse_webhook(item))]

    async def our_webhooks(self) -> list[Webhook]:
        """List the webhooks that lead here; none if the API can't be used."""
        return (await self.find_our_webhooks()).webhooks if "api" in self.passed else []

    @_read_once
    async def find_our_webhooks(self) -> OurWebhooks:
        """Find our webhooks by key or URL, or else by received deliveries, or else by the path."""
        webhooks = await self.webhooks()
        keys = {*self.target.keys, *(key.key for key in await self.learned_keys())}
        url = self.settings.public_url
        named = [webhook for webhook in webhooks if is_ours(webhook, keys, url)]
        senders: set[str] = set()
        if not named and "database" in self.passed:
            recent = await self.read(lambda store: store.recent(_RECENT))
            senders = {sender for row in recent if (sender := delivery_log.find_sender(row.body))}
        known = named or [webhook for webhook in webhooks if webhook.id in senders]
        path = self.settings.path.rstrip("/")
        alike = [each for each in webhooks if strip_url(each.url).rstrip("/").endswith(path)]
        return OurWebhooks(known or alike, by_path=not known)

    async def learned_keys(self) -> list[WebhookKey]:
        """Read the signing keys that Logto's API has returned."""
        if "database" not in self.passed:
            return []
        return await self.read(lambda store: store.webhook_keys.learnt())

    @_read_once
    async def log_summary(self) -> LogSummary:
        """Summarize the last day in Logto's log of our webhooks."""
        summary = LogSummary()
        [last] = (await self.webhook_pages())[-1:]
        # By our clock, because a wrong Date would hide what is recent.
        now, end = last.asked_at, max(last.asked_at, last.date or 0) + 1000
        for webhook in await self.our_webhooks():
            await self._read_log(webhook.id, now, end, summary)
        return summary

    async def _read_log(self, webhook_id: str, now: int, end: int, summary: LogSummary) -> None:
        assert self._logto
        count = 0
        async for page in self._logto.log(webhook_id, now - DAY_MS, end):
            summary.total += 0 if count else page.total or 0
            count += len(page.content)
            await self._count_entries(page.content, now, summary)
            if count >= MOST:
                break

    async def _count_entries(self, entries: Sequence[Any], now: int, summary: LogSummary) -> None:
        """Count failures, and entries that are missing in the inbox. An entry that can't be read is
        neither."""
        parsed = {
            id(entry): delivery
            for entry in entries
            if (delivery := delivery_log.parse_delivery(entry, now))
        }
        deliveries = list(parsed.values())
        host = self.target.open().host
        results = await run_or_rehearse(host, lambda store: store.add(deliveries), True)
        stored = zip(parsed, results, strict=True)
        missing = {entry_id for entry_id, result in stored if not result.duplicate}
        summary.entries += len(entries)
        recover_ms = 2 * self.settings.recover_every_s * 1000
        for entry in entries:
            ended_at = delivery_log.read_end(entry)
            if ended_at is None:
                continue
            cause, is_missing = delivery_log.failure_cause(entry), id(entry) in missing
            if cause == delivery_log.ANSWERED:
                summary.answered += is_missing
                continue
            if is_missing or ended_at > now - _FRESH_MS:
                summary.causes[cause] = summary.causes.get(cause, 0) + 1
            else:
                summary.recovered += 1
            if is_missing:
                is_recent = ended_at > now - recover_ms
                summary.recent += is_recent
                summary.late += not is_recent


Problem = Literal[
    "address_invalid",
    "address_refused",
    "address_unknown",
    "address_unreachable",
    "address_timeout",
    "tls_expired",
    "tls_untrusted",
    "tls_name",
]
_MOST_BYTES: Final = 4_096
_BODY: Final = b'{"event":"doctor"}'
_HEADERS: Final = {"content-type": "application/json", "user-agent": "logto-webhooks doctor"}
# OpenSSL's codes for invalid certificates.
_EXPIRED: Final = 10
_WRONG_NAME: Final = (62, 64)  # for a host, for an IP address


class ProbeResult(Struct, frozen=True, kw_only=True):
    """The response of a URL, or the problem. `error` is the error's name if our service seems to
    answer."""

    took_ms: int = 0
    status: int = 0
    error: str = ""
    location: str = ""
    problem: Problem | None = None


async def probe_url(url: str, limit_s: float) -> ProbeResult:
    """Post once, unsigned, within a time limit, without following redirects."""
    if not is_url(url):  # Logto accepts any text
        return ProbeResult(problem="address_invalid")
    # Imported here, because applications need no HTTP client.
    import httpx2

    async with httpx2.AsyncClient(timeout=None) as client:
        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(limit_s),
                client.stream("POST", url, content=_BODY, headers=_HEADERS) as response,
            ):
                error_name = await _read_error(response)
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError) as error:
            return ProbeResult(problem=_find_problem(error))
        took_ms = round((time.monotonic() - began) * 1000)
    location = str(response.headers.get("location", ""))
    with contextlib.suppress(httpx2.InvalidURL):
        location = str(response.url.join(location))
    return ProbeResult(
        took_ms=took_ms, status=response.status_code, error=error_name, location=location
    )


async def _read_error(response: httpx2.Response) -> str:
    """Read the error's name from a response of our service; read only a little of others."""
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > _MOST_BYTES:
            return ""
    try:
        return msgspec.json.decode(body, type=dict[str, str]).get("error", "")
    except msgspec.DecodeError:
        return ""


def _find_problem(error: BaseException) -> Problem:
    """Find the cause that the HTTP client wraps."""
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case TimeoutError():
                return "address_timeout"
            case ssl.SSLCertVerificationError(verify_code=code):
                if code == _EXPIRED:
                    return "tls_expired"
                return "tls_name" if code in _WRONG_NAME else "tls_untrusted"
            case ConnectionRefusedError():
                return "address_refused"
            case socket.gaierror():
                return "address_unknown"
        cause = cause.__cause__ or cause.__context__
    return "address_unreachable"
