"""What commands do, as methods: on one database, and with Logto where it must be asked."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

from msgspec.structs import replace

from logto_webhooks.core.events import catalog
from logto_webhooks.core.events.local import Source
from logto_webhooks.core.explain import Explained
from logto_webhooks.core.hooks import LATER, Hook, is_url, named, ours, subscription
from logto_webhooks.core.ports import Found, Logto, Status, Store, Waiting
from logto_webhooks.core.record import Kind
from logto_webhooks.errors import LogtoRefused, SettingInvalid
from logto_webhooks.service import endpoint, explain, manage
from logto_webhooks.service.endpoint import Tested
from logto_webhooks.service.given import limited, text_of
from logto_webhooks.service.handlers import Handlers
from logto_webhooks.service.look import Progressed, Reconciled
from logto_webhooks.service.person import Sides
from logto_webhooks.service.recover import Recovered
from logto_webhooks.service.rotation import Rotated, rotate
from logto_webhooks.settings import Settings
from logto_webhooks.wiring.api import api_of, keys_of, reconciliation_of, recovery_of, sides_of
from logto_webhooks.wiring.by_hand import ByHand
from logto_webhooks.wiring.clock import SystemClock
from logto_webhooks.wiring.databases import Database, database_for
from logto_webhooks.wiring.doctor import Examined
from logto_webhooks.wiring.given import Engine, given_database
from logto_webhooks.wiring.spool import spool_of

_TESTED: Final = "User.Created"  # by a webhook without events


def _silent(*told: object) -> None:
    """Tell nobody how far it came."""


class Operations(ByHand, Examined):
    """Everything that can be done by hand.

    A query is a Logto id, a local id, an email, a phone, a username or a name. All raise
    StoreUnavailable and SchemaMismatch; those that ask Logto ApiNotConfigured, LogtoUnreachable
    and LogtoRefused, too.
    """

    def __init__(self, settings: Callable[[], Settings], engine: Engine | None = None) -> None:
        """The database is the engine's, or else the settings'. Nothing is opened."""
        self.handlers: Handlers = Handlers()
        self._settings = settings
        self._engine = engine
        self._database: Database | None = None

    @property
    def database(self) -> Database:
        """The database; nothing is opened before it is used. Raises SettingInvalid."""
        if self._database is None:
            settings = self._settings()
            if self._engine is None:
                self._database = database_for(settings)
            else:
                self._database = given_database(self._engine, settings.schema)
        return self._database

    @property
    def _database_setting(self) -> str:
        if self._engine is not None:
            return "the application's engine"
        return self._settings().name_of("database_url")

    async def migrate(self) -> None:
        """Bring the schema up to this release."""
        await self.database.migrate()

    async def close(self) -> None:
        """Give back threads and connections; they are made again when they are needed."""
        if self._database is not None:
            await self._database.host.close()

    async def status(self) -> Status:
        """Count deliveries, records and jobs."""
        spool = spool_of(self._settings())
        return replace(await self._read(manage.status), spooled=spool.count() if spool else 0)

    async def waiting(self, limit: int = 100) -> list[Waiting]:
        """List the records that only Logto can settle, the longest waiting first."""
        most = limited(limit)
        return await self._read(lambda store: store.waiting(most))

    async def users(self, query: str = "", limit: int = 100) -> list[Found]:
        """Find users by a query, else by a part of an email, a username, a name or a phone."""
        sought, most = text_of("the query", query), limited(limit)
        return await self._read(lambda store: store.find("user", sought, most))

    async def organizations(self, query: str = "", limit: int = 100) -> list[Found]:
        """Find organizations by a query, else by a part of the name."""
        sought, most = text_of("the query", query), limited(limit)
        return await self._read(lambda store: store.find("organization", sought, most))

    async def explain_user(self, query: str) -> Explained | None:
        """Tell a user's life, and which delivery set each field; None if there is none.

        Raises SettingInvalid for a query that finds several.
        """
        return await self._explain("user", query)

    async def explain_organization(self, query: str) -> Explained | None:
        """The same of an organization, its members included."""
        return await self._explain("organization", query)

    async def compare_user(self, query: str) -> Sides:
        """Show a user here beside what Logto answers now. Raises as above."""
        async with self._asking() as logto:
            key = await self._read(lambda store: manage.only(store, "user", query))
            return await sides_of(logto, self.database, key.id)

    async def recover(
        self,
        since: int | None = None,
        *,
        dry_run: bool = False,
        progressed: Callable[[Recovered], None] = _silent,
    ) -> Recovered:
        """Bring back from Logto's log what was sent, `since` (ms) a moment, and isn't in the inbox;
        `dry_run` counts. Without `since` it goes on where it last ended."""
        await self.database.check()
        async with self._asking() as logto:
            recovery = recovery_of(self._settings(), logto, self.database, self._woken)
            return await recovery.run(since, dry_run, progressed)

    async def reconcile(
        self,
        user: str | None = None,
        *,
        dry_run: bool = False,
        progressed: Progressed = _silent,
    ) -> Reconciled:
        """Compare all records with Logto's own, or those of one user, and mend what differs."""
        await self.database.check()
        async with self._asking() as logto:
            reconciliation = reconciliation_of(logto, self.database)
            if user is None:
                return await reconciliation.run(dry_run, progressed)
            key = await self._read(lambda store: manage.only(store, "user", user))
            return await reconciliation.one_user(key.id, dry_run)

    async def backfill(
        self, *, run_handlers: bool = False, progressed: Progressed = _silent
    ) -> Reconciled:
        """Fill an empty database from Logto, as fast as Logto allows; handlers aren't told unless
        they are to be run."""
        await self.database.check()
        async with self._asking(fast=True) as logto:
            source: Source | None = "backfill" if run_handlers else None
            reconciliation = reconciliation_of(logto, self.database, source)
            return await reconciliation.run(False, progressed)

    async def endpoints(self) -> list[Hook]:
        """List Logto's webhooks."""
        async with self._asking() as logto:
            found, _ = await endpoint.hooks_of(logto)
            return found

    async def create_endpoint(self, url: str, *, name: str = endpoint.NAME) -> Hook:
        """Make a webhook with the events that the sync and the handlers need.

        Raises EndpointExists, SettingInvalid.
        """
        if not is_url(url):
            raise SettingInvalid(name="url", problem=f"{url!r} isn't like https://host/path")
        patterns = [each for one in self.handlers for each in one.registered.patterns]
        async with self._asking() as logto:
            return await endpoint.create(logto, url, name, subscription(patterns))

    async def test_endpoint(
        self, hook: str | None = None, *, event: str | None = None, timeout_s: float = 10.0
    ) -> Tested:
        """Have Logto send a test by a webhook, ours if none is named, and wait until it is here.

        Raises EndpointUnknown, UnknownEventName.
        """
        await self.database.check()
        async with self._asking() as logto:
            chosen = await self._chosen(logto, hook)
            sent = event or next((each for each in chosen.events if each not in LATER), _TESTED)
            try:
                return await endpoint.send_test(logto, self.database.host, chosen, sent, timeout_s)
            except LogtoRefused:
                catalog.named(sent)  # a later Logto may have it; so that isn't asked before
                raise

    async def rotate_endpoint(self, hook: str | None = None, *, overlap_s: float = 600) -> Rotated:
        """Change the key of a webhook at Logto, ours if none is named; the old one is accepted for
        the overlap. Raises EndpointUnknown."""
        await self.database.check()
        async with self._asking() as logto:
            chosen = await self._chosen(logto, hook)
            overlap_ms = round(overlap_s * 1000)
            return await rotate(logto, self.database.host, SystemClock(), chosen, overlap_ms)

    async def _chosen(self, logto: Logto, hook: str | None) -> Hook:
        found, _ = await endpoint.hooks_of(logto)
        if hook:
            return named(found, hook)
        settings = self._settings()
        learnt = await self._read(lambda store: store.keys_of_hooks.learnt())
        keys = {*keys_of(settings), *(each.key for each in learnt)}
        return ours(found, keys, settings.public_url)

    async def _explain(self, kind: Kind, query: str) -> Explained | None:
        lag_ms = self._settings().lag_ms

        def work(store: Store) -> Explained | None:
            return explain.explain(store, manage.only(store, kind, query), lag_ms)

        return await self._read(work)

    @contextlib.asynccontextmanager
    async def _asking(self, fast: bool = False) -> AsyncIterator[Logto]:
        logto = api_of(self._settings(), fast=fast)
        try:
            yield logto
        finally:
            await logto.close()

    def _woken(self) -> None:
        """The inbox got something."""
