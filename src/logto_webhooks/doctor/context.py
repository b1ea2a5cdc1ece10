"""What the checks look at, read once each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

from msgspec import Struct

from logto_webhooks.database.dry_run import run_or_rehearse
from logto_webhooks.database.inspect import DatabaseInfo
from logto_webhooks.doctor.remote import LogSummary, OurWebhooks, find_leading_here, tally
from logto_webhooks.doctor.url_probe import Probed
from logto_webhooks.interfaces import ApiResponse, Clock, Logto, Status, Store, TransactionRunner
from logto_webhooks.jobs import RegisteredHandler
from logto_webhooks.logto import delivery_log
from logto_webhooks.logto.webhooks import Webhook, parse_webhook
from logto_webhooks.signing_keys import WebhookKey

T = TypeVar("T")
DAY_MS: Final = 86_400_000
MOST: Final = 1_000  # entries of a webhook's log
_RECENT: Final = 200  # deliveries that are asked for the id of their hook


class DoctorDatabase(Protocol):
    """A database, and what it says of itself."""

    @property
    def host(self) -> TransactionRunner:
        """What runs work on it."""

    async def premises(self) -> DatabaseInfo:
        """Tell, whatever its schema. Raises StoreUnavailable."""


class DoctorTarget(Struct, frozen=True, kw_only=True):
    """What is looked at; nothing of it is opened before a check needs it.

    `database_setting` names the setting that the database's URL came from. `open_files` are the
    modes of files that others can read, by their paths.
    `local_url` is where `serve` listens with the same settings. `signs_of_admin` is what says that
    the credentials are of Logto's admin side. `missing` are the variables of
    credentials that aren't set. `handlers` are the application's,
    None if it isn't known; `databases` tells on which they run, and which is the application's.
    `spooled` deliveries wait in the spool directory.
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
    ask: Callable[[], Logto]
    post: Callable[[str], Awaitable[Probed]]
    clock: Clock
    handlers: Sequence[RegisteredHandler] | None = None
    databases: Callable[[], tuple[str, str]] | None = None
    spooled: int = 0


class CheckContext:
    """What is known of a patient; `well` are the checks that found nothing broken."""

    def __init__(self, patient: DoctorTarget) -> None:
        self.patient = patient
        self.well: set[str] = set()
        self._known: dict[Callable[[], Awaitable[Any]], Any] = {}
        self._logto: Logto | None = None

    async def close(self) -> None:
        """Give back the connections to Logto."""
        if self._logto is not None:
            await self._logto.close()

    async def premises(self) -> DatabaseInfo:
        """What the database says of itself."""
        return await self._once(self._premises)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Read something of the database."""
        return await self.patient.open().host.read(work)

    async def status(self) -> Status:
        """What is counted."""
        return await self._once(self._status)

    async def listed(self) -> list[ApiResponse]:
        """Logto's webhooks, page by page."""
        return await self._once(self._listed)

    async def hooks(self) -> list[Webhook]:
        """Logto's webhooks."""
        items = [item for page in await self.listed() for item in page.content]
        return [hook for each in items if (hook := parse_webhook(each))]

    async def ours(self) -> list[Webhook]:
        """Those that lead here; none if Logto can't be asked."""
        return (await self.leading()).hooks if "api" in self.well else []

    async def leading(self) -> OurWebhooks:
        """Those that lead here, and how that is known."""
        return await self._once(self._ours)

    async def learnt(self) -> list[WebhookKey]:
        """The keys that Logto told."""
        if "database" not in self.well:
            return []
        return await self.read(lambda store: store.keys_of_hooks.learnt())

    async def registered(self) -> list[RegisteredHandler]:
        """The handlers for which jobs are made."""
        return await self._once(self._registered)

    async def log(self) -> LogSummary:
        """What Logto's log of the last day says of our webhooks."""
        return await self._once(self._log)

    async def _once(self, ask: Callable[[], Awaitable[T]]) -> T:
        if ask not in self._known:
            self._known[ask] = await ask()
        known: T = self._known[ask]
        return known

    async def _premises(self) -> DatabaseInfo:
        return await self.patient.open().premises()

    async def _status(self) -> Status:
        return await self.read(lambda store: store.status())

    async def _registered(self) -> list[RegisteredHandler]:
        return await self.read(lambda store: store.jobs.handlers())

    async def _listed(self) -> list[ApiResponse]:
        self._logto = self._logto or self.patient.ask()
        return [page async for page in self._logto.hooks()]

    async def _ours(self) -> OurWebhooks:
        seen: set[str] = set()
        if "database" in self.well:
            recent = await self.read(lambda store: store.recent(_RECENT))
            seen = {hook for each in recent if (hook := delivery_log.read_hook_id(each.body))}
        patient, hooks = self.patient, await self.hooks()
        keys = {*patient.keys, *(each.key for each in await self.learnt())}
        return find_leading_here(hooks, keys, patient.public_url, seen, patient.path)

    async def _log(self) -> LogSummary:
        looked = LogSummary()
        [last] = (await self.listed())[-1:]
        now = last.date + 1000 if last.date else last.asked_at
        for hook in await self.ours():
            await self._look_into(hook.id, now, looked)
        return looked

    async def _look_into(self, hook: str, now: int, looked: LogSummary) -> None:
        assert self._logto
        seen = 0
        async for page in self._logto.log(hook, now - DAY_MS, now):
            looked.total += 0 if seen else page.total or 0
            seen += len(page.content)
            await self._compare(page.content, now, looked)
            if seen >= MOST:
                break

    async def _compare(self, entries: Sequence[Any], now: int, looked: LogSummary) -> None:
        told = [
            (each, made) for each in entries if (made := delivery_log.parse_delivery(each, now))
        ]
        deliveries = [made for _, made in told]
        host = self.patient.open().host
        accepted = await run_or_rehearse(host, lambda store: store.add(deliveries), True)
        missing = [
            entry for (entry, _), each in zip(told, accepted, strict=True) if not each.duplicate
        ]
        tally(looked, entries, missing, now, 2 * self.patient.recover_every_s * 1000)
