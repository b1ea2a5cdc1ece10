"""The facts that checks look at, read once each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

from msgspec import Struct

from logto_webhooks.clock import Clock
from logto_webhooks.database.migrate import DatabaseInfo
from logto_webhooks.database.runner import TransactionRunner, run_or_rehearse
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import Status
from logto_webhooks.doctor.faults import strip_url
from logto_webhooks.jobs import RegisteredHandler
from logto_webhooks.logto import delivery_log
from logto_webhooks.logto.api_responses import ApiResponse
from logto_webhooks.logto.webhooks import Webhook, is_ours, parse_webhook
from logto_webhooks.signing_keys import WebhookKey

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

T = TypeVar("T")
DAY_MS: Final = 86_400_000
LIMIT_S: Final = 10.0  # Logto's, for a response of a webhook
MOST: Final = 1_000  # entries of a webhook's log that are read
_RECENT: Final = 200  # deliveries that are searched for IDs of webhooks
_FRESH_MS: Final = 3_600_000  # a failure is reported for so long, even if it was recovered
Problem = Literal[
    "address_refused",
    "address_unknown",
    "address_unreachable",
    "address_timeout",
    "tls_expired",
    "tls_untrusted",
    "tls_name",
]


class ProbeResult(Struct, frozen=True, kw_only=True):
    """What a URL answered, or the problem. `error` is the error's name if it answered like our
    service; `limit_s` was the time limit.
    """

    took_ms: int = 0
    status: int = 0
    error: str = ""
    location: str = ""
    problem: Problem | None = None
    limit_s: float = LIMIT_S


class DoctorDatabase(Protocol):
    """A database that can be inspected."""

    @property
    def host(self) -> TransactionRunner:
        """Runs transactions."""

    async def premises(self) -> DatabaseInfo:
        """Inspect it, whatever its schema. Raises StoreUnavailable."""


class DoctorTarget(Struct, frozen=True, kw_only=True):
    """What is checked. Nothing is opened before a check needs it.

    `database_setting` names the setting that the database's URL came from. `open_files` returns the
    modes of files that other users can read, by path. `local_url` is where `serve` listens with
    these settings. `signs_of_admin` says why the endpoint looks like Logto's admin side, if it
    does. `missing` names the variables of credentials that aren't set. `handlers` are the
    application's, None if none is named; `databases` returns the one they run on, and the
    application's. `spooled` deliveries wait in the spool directory.
    """

    keys: Sequence[str]
    public_url: str | None
    local_url: str
    path: str
    recover_every_s: int
    least_free_mb: int
    missing: Sequence[str]
    signs_of_admin: str
    open: Callable[[], DoctorDatabase]
    database_setting: str
    open_files: Callable[[], Mapping[str, str]]
    ask: Callable[[], ManagementClient]
    post: Callable[[str], Awaitable[ProbeResult]]
    clock: Clock
    handlers: Sequence[RegisteredHandler] | None = None
    databases: Callable[[], tuple[str, str]] | None = None
    spooled: int = 0


class LogSummary(Struct, kw_only=True):
    """What the newest entries of the last day say. `causes` counts failures; `recovered` those
    that failed more than an hour ago, and are in the inbox now.

    Of the deliveries that aren't in the inbox, Logto logged `answered` as a success. Of the others,
    the `recent` ones may still be recovered, the `late` ones should have been.
    """

    entries: int = 0
    total: int = 0
    causes: dict[str, int] = {}
    recovered: int = 0
    late: int = 0
    recent: int = 0
    answered: int = 0


class OurWebhooks(Struct, frozen=True):
    """The webhooks that lead here; `by_path` if only the path of their URL says so, so that they
    may be another system's."""

    hooks: list[Webhook]
    by_path: bool


class CheckContext:
    """The facts that checks share, read once each. `passed` names the checks without a fault."""

    def __init__(self, target: DoctorTarget) -> None:
        self.target = target
        self.passed: set[str] = set()
        self._results: dict[Callable[[], Awaitable[Any]], Any] = {}
        self._logto: ManagementClient | None = None

    async def close(self) -> None:
        """Close the connections to Logto."""
        if self._logto is not None:
            await self._logto.close()

    async def read(self, work: Callable[[Store], T]) -> T:
        """Read something from the database."""
        return await self.target.open().host.read(work)

    async def database_info(self) -> DatabaseInfo:
        """Inspect the database."""
        return await self._once(self._inspect_database)

    async def status(self) -> Status:
        """Count deliveries and records."""
        return await self._once(self._count)

    async def hook_pages(self) -> list[ApiResponse]:
        """List Logto's webhooks, page by page."""
        return await self._once(self._list_hooks)

    async def hooks(self) -> list[Webhook]:
        """List Logto's webhooks."""
        items = [item for page in await self.hook_pages() for item in page.content]
        return [hook for item in items if (hook := parse_webhook(item))]

    async def our_hooks(self) -> list[Webhook]:
        """List the webhooks that lead here; none if the API can't be used."""
        return (await self.found_hooks()).hooks if "api" in self.passed else []

    async def found_hooks(self) -> OurWebhooks:
        """Find the webhooks that lead here."""
        return await self._once(self._find_hooks)

    async def learned_keys(self) -> list[WebhookKey]:
        """Read the signing keys that Logto's API has returned."""
        if "database" not in self.passed:
            return []
        return await self.read(lambda store: store.keys_of_hooks.learnt())

    async def registered_handlers(self) -> list[RegisteredHandler]:
        """Read the handlers that get jobs."""
        return await self._once(self._read_handlers)

    async def log_summary(self) -> LogSummary:
        """Summarize the last day of Logto's log of our webhooks."""
        return await self._once(self._summarize_log)

    async def _once(self, read: Callable[[], Awaitable[T]]) -> T:
        if read not in self._results:
            self._results[read] = await read()
        result: T = self._results[read]
        return result

    async def _inspect_database(self) -> DatabaseInfo:
        return await self.target.open().premises()

    async def _count(self) -> Status:
        return await self.read(lambda store: store.status())

    async def _read_handlers(self) -> list[RegisteredHandler]:
        return await self.read(lambda store: store.jobs.handlers())

    async def _list_hooks(self) -> list[ApiResponse]:
        self._logto = self._logto or self.target.ask()
        return [page async for page in self._logto.hooks()]

    async def _find_hooks(self) -> OurWebhooks:
        seen: set[str] = set()
        if "database" in self.passed:
            recent = await self.read(lambda store: store.recent(_RECENT))
            seen = {hook for row in recent if (hook := delivery_log.read_hook_id(row.body))}
        target, hooks = self.target, await self.hooks()
        keys = {*target.keys, *(key.key for key in await self.learned_keys())}
        return _find_our_hooks(hooks, keys, target.public_url, seen, target.path)

    async def _summarize_log(self) -> LogSummary:
        summary = LogSummary()
        [last] = (await self.hook_pages())[-1:]
        now = last.date + 1000 if last.date else last.asked_at
        for hook in await self.our_hooks():
            await self._read_log(hook.id, now, summary)
        return summary

    async def _read_log(self, hook: str, now: int, summary: LogSummary) -> None:
        assert self._logto
        count = 0
        async for page in self._logto.log(hook, now - DAY_MS, now):
            summary.total += 0 if count else page.total or 0
            count += len(page.content)
            await self._compare(page.content, now, summary)
            if count >= MOST:
                break

    async def _compare(self, entries: Sequence[Any], now: int, summary: LogSummary) -> None:
        parsed = [
            (entry, delivery)
            for entry in entries
            if (delivery := delivery_log.parse_delivery(entry, now))
        ]
        deliveries = [delivery for _, delivery in parsed]
        host = self.target.open().host
        results = await run_or_rehearse(host, lambda store: store.add(deliveries), True)
        missing = [
            entry
            for (entry, _), result in zip(parsed, results, strict=True)
            if not result.duplicate
        ]
        _tally(summary, entries, missing, now, 2 * self.target.recover_every_s * 1000)


def _tally(
    summary: LogSummary, entries: Sequence[Any], missing: Sequence[Any], now: int, recover_ms: int
) -> None:
    """Count entries, some of which are `missing` here; recent ones are of the last `recover_ms`."""
    summary.entries += len(entries)
    gone = {id(entry) for entry in missing}
    for entry in entries:
        cause = delivery_log.failure_cause(entry)
        if cause == delivery_log.ANSWERED:
            summary.answered += id(entry) in gone
        elif id(entry) in gone or entry["createdAt"] > now - _FRESH_MS:
            summary.causes[cause] = summary.causes.get(cause, 0) + 1
        else:
            summary.recovered += 1
    for entry in missing:
        if delivery_log.failure_cause(entry) != delivery_log.ANSWERED:
            recent = entry["createdAt"] > now - recover_ms
            summary.recent += recent
            summary.late += not recent


def _find_our_hooks(
    hooks: Sequence[Webhook],
    keys: Collection[str],
    public_url: str | None,
    seen: Collection[str],
    path: str,
) -> OurWebhooks:
    """Find our webhooks by key or URL, else by received deliveries, else by the path alone."""
    named = [hook for hook in hooks if is_ours(hook, keys, public_url)]
    known = [hook for hook in hooks if hook.id in seen]
    path = path.rstrip("/")
    alike = [hook for hook in hooks if strip_url(hook.url).rstrip("/").endswith(path)]
    return OurWebhooks(named or known or alike, by_path=not (named or known))
