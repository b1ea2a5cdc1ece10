"""The commands as methods: list, replay, retry, recover, reconcile, diagnose."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks import events, validation
from logto_webhooks.apply.replay import (
    AT_ONCE,
    REPLAYED_AT_ONCE,
    JobReplay,
    ReplayResult,
    cut,
)
from logto_webhooks.apply.replay import replay as apply_again
from logto_webhooks.clock import SystemClock
from logto_webhooks.database import Database, Engine, database_for, wrap_engine
from logto_webhooks.database.jobs import Place
from logto_webhooks.database.mirror import RowFilter
from logto_webhooks.database.records import FoundRow, RefetchNeed
from logto_webhooks.database.runner import run_or_rehearse
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import DeliveryFilter, Status, StoredDelivery
from logto_webhooks.errors import (
    DeliveryUnknown,
    HandlerUnknown,
    InvalidHandler,
    InvalidMapping,
    JobUnknown,
    LogtoApiError,
    MapFileInvalid,
    NoLocalHandlers,
    SchemaMismatch,
    SettingInvalid,
    StoreUnavailable,
)
from logto_webhooks.event_loop import run_in_thread
from logto_webhooks.events.local import LOCAL, Source
from logto_webhooks.handlers import Handlers
from logto_webhooks.handlers.existing import (
    RATE,
    ExistingRows,
    Pacer,
    find_handler,
    run_for_existing,
)
from logto_webhooks.ingest.spool import spool_of
from logto_webhooks.jobs import JobFilter, JobMove, JobRow, JobState, job_targets
from logto_webhooks.logto import webhooks
from logto_webhooks.logto.api_responses import make_span_clock
from logto_webhooks.logto.webhooks import (
    LATER,
    RotationResult,
    TestResult,
    Webhook,
    find_our_webhook,
    find_webhook,
    is_ours,
    rotate_key,
    subscription,
)
from logto_webhooks.mapping import Mappings
from logto_webhooks.private_files import find_open_mode
from logto_webhooks.reconcile.fetch import UserComparison, compare_and_request_refetch
from logto_webhooks.reconcile.reconcile import Progressed, ReconcileResult
from logto_webhooks.reconcile.recover import RecoverResult
from logto_webhooks.records.record import Key, Kind
from logto_webhooks.runtime import (
    make_client,
    make_reconciliation,
    make_recovery,
    open_client,
    split_signing_keys,
)
from logto_webhooks.settings import Settings
from logto_webhooks.validation import check_limit, check_text, is_url

if TYPE_CHECKING:
    from logto_webhooks.database.mapped_rows import MappingCounts
    from logto_webhooks.doctor.faults import Finding
    from logto_webhooks.explain import Explained
    from logto_webhooks.logto.client import ManagementClient
    from logto_webhooks.mapping.check import Difference
    from logto_webhooks.mapping.file import MapFile
    from logto_webhooks.mapping.own_schema import OwnSchema
    from logto_webhooks.mapping.tally import AppliedMapping


class HandlerInfo(Struct, frozen=True, kw_only=True):
    """A handler with counts of its jobs. Without `events`, it isn't registered."""

    handler: str
    events: list[str]
    waiting: int = 0
    done: int = 0
    dead: int = 0
    discarded: int = 0


def resolve_one(store: Store, kind: Kind, query: str) -> Key:
    """Resolve a query to the record with this ID, or else to the one record that it matches, or the
    only one that isn't deleted. If it matches none, it is taken for a Logto ID.

    Raises SettingInvalid if it matches several.
    """
    itself = Key(kind, validation.check_text("the query", query))
    if store.read_heads([itself])[itself].kept:  # whatever username or name others have
        return itself
    rows = store.find(kind, query, 2)
    if rows and str(rows[0].row["id"]) == query.lower():
        rows = rows[:1]
    living = [row for row in rows if row.row["deleted_at"] is None]
    rows = living if len(living) == 1 else rows
    if len(rows) > 1:
        advice = f"see `logto-webhooks {kind}s {shlex.quote(query)}`, and use an ID"
        raise SettingInvalid(name=f"the {kind}", problem=f"several records match; {advice}")
    return Key(kind, str(rows[0].row[f"logto_{kind}_id"]) if rows else query)


def replay(store: Store, ids: Sequence[int], lag_ms: int, **how: Any) -> ReplayResult:
    """Replay deliveries by ID, all or none. Raises DeliveryUnknown, HandlerUnknown."""
    if how.get("handler") is not None:
        check_handler(store, how["handler"])
    deliveries = {id: store.inbox.get(id) for id in ids}
    unknown = [id for id, delivery in deliveries.items() if delivery is None]
    if unknown:
        raise DeliveryUnknown(unknown)
    stored = [delivery for delivery in deliveries.values() if delivery]
    return apply_again(store, stored, lag_ms, **how)


def status(store: Store) -> Status:
    """Count deliveries and records, jobs by state, and waiting jobs of unregistered handlers."""
    counts = store.jobs.counts()
    registered = {handler.name for handler in store.jobs.handlers()}
    jobs = dict.fromkeys((state.value for state in JobState), 0)
    for row in counts:
        jobs[row.state] += row.count
    waiting = [row for row in counts if row.state == JobState.WAITING]
    unrunnable = {row.handler: row.count for row in waiting if row.handler not in registered}
    return replace(store.status(), jobs=jobs, unrunnable=unrunnable)


def list_handlers(store: Store) -> list[HandlerInfo]:
    """List all handlers that are registered, or have jobs."""
    counts: dict[str, dict[str, int]] = {}
    for row in store.jobs.counts():
        counts.setdefault(row.handler, {})[row.state] = row.count
    events = {handler.name: list(handler.patterns) for handler in store.jobs.handlers()}
    names = sorted(events.keys() | counts.keys())
    return [
        HandlerInfo(handler=name, events=events.get(name, []), **counts.get(name, {}))
        for name in names
    ]


def forget_handler(store: Store, name: str) -> int | None:
    """Forget a handler, and discard the first AT_ONCE of its waiting jobs. Return how many there
    were; None if the handler is unknown."""
    is_known = any(handler.name == name for handler in store.jobs.handlers())
    discarded = store.jobs.forget(name, AT_ONCE)
    return discarded if is_known or discarded else None


def check_job_ids(store: Store, ids: Sequence[int]) -> list[int]:
    """Check that there is a job for each ID. Raises JobUnknown."""
    existing: set[int] = set()
    for start in range(0, len(ids), AT_ONCE):
        piece = tuple(ids[start : start + AT_ONCE])
        existing |= {job.id for job in store.jobs.find(JobFilter(ids=piece, limit=len(piece)))}
    unknown = [id for id in ids if id not in existing]
    if unknown:
        raise JobUnknown(unknown)
    return list(ids)


def check_move(store: Store, handler: str, state: str, move: JobMove) -> JobState:
    """Check that the jobs of a handler in a state can be moved, and return the state. Raises
    HandlerUnknown, and SettingInvalid for a state that doesn't allow the move."""
    checked = validation.check_state(state, JobState)
    if checked not in job_targets(move):
        done = "retried" if move is JobMove.REPEAT else "discarded"
        allowed = ", ".join(job_targets(move))
        problem = f"{checked} jobs can't be {done}; allowed: {allowed}"
        raise SettingInvalid(name="the state", problem=problem)
    check_handler(store, handler)
    return checked


def check_handler(store: Store, name: str) -> None:
    """Check that a handler is registered, or has jobs. Raises HandlerUnknown."""
    names = [handler.name for handler in store.jobs.handlers()]
    if name in names:
        return
    names = sorted({*names, *(row.handler for row in store.jobs.counts())})
    if name in names:
        return
    raise HandlerUnknown(name, names)


def check_local_handlers(store: Store) -> None:
    """Check that a handler of local events is registered. Raises NoLocalHandlers."""
    handlers = store.jobs.handlers()
    if not any(handler.wants(name) for handler in handlers for name in LOCAL):
        raise NoLocalHandlers([handler.name for handler in handlers])


T = TypeVar("T")
TIMEOUT_S: Final = 30.0
LEAST_FREE_MB: Final = 1_024
_WAIT_S: Final = 0.2  # between tries to reach Logto, because somebody waits for the result
_DEFAULT_TEST_EVENT: Final = "User.Created"  # of a webhook without events
_UNCLEAR: Final = "either pass job IDs, or use --handler NAME for all its dead jobs"


def _ignore_progress(*progress: object) -> None:
    """Report no progress."""


class Admin:
    """The commands as methods.

    A query is a Logto id, a local id, an email, a phone, a username or a name. All methods raise
    StoreUnavailable and SchemaMismatch. Those that use Logto's API also raise ApiNotConfigured,
    LogtoUnreachable and LogtoApiError.
    """

    def __init__(self, settings: Callable[[], Settings], engine: Engine | None = None) -> None:
        """The database is the engine's, or else the settings'. Nothing is opened."""
        self.mappings = Mappings()
        self.handlers: Handlers = Handlers(self.mappings)
        self._settings = settings
        self._engine = engine
        self._database: Database | None = None

    @property
    def database(self) -> Database:
        """Return the database, which is opened when first used. Raises SettingInvalid."""
        if self._database is None:
            settings = self._settings()
            if self._engine is None:
                self._database = database_for(settings)
            else:
                self._database = wrap_engine(self._engine, settings.schema)
        self._database.host.project = self.mappings.write
        return self._database

    @property
    def _database_setting(self) -> str:
        if self._engine is not None:
            return "the application's engine"
        return self._settings().name_of("database_url")

    async def migrate(self) -> None:
        """Upgrade the schema to this release."""
        await self.database.migrate()

    async def close(self) -> None:
        """Close threads and connections. They are opened again when needed."""
        if self._database is not None:
            await self._database.host.close()

    async def status(self) -> Status:
        """Count deliveries, records and jobs."""
        spool = spool_of(self._settings())
        counted = await self._read(status)
        return replace(counted, spooled=await run_in_thread(spool.count) if spool else 0)

    async def waiting(self, limit: int = 100) -> list[RefetchNeed]:
        """List the records that need a refetch, the longest waiting first."""
        most = check_limit(limit)
        return await self._read(lambda store: store.waiting(most))

    async def users(self, query: str = "", limit: int = 100) -> list[FoundRow]:
        """Find users by id, email, phone or username, or else by a part of an email, username, name
        or phone."""
        checked, most = check_text("the query", query), check_limit(limit)
        return await self._read(lambda store: store.find("user", checked, most))

    async def organizations(self, query: str = "", limit: int = 100) -> list[FoundRow]:
        """Find organizations by id or name, or else by a part of the name."""
        checked, most = check_text("the query", query), check_limit(limit)
        return await self._read(lambda store: store.find("organization", checked, most))

    async def explain_user(self, query: str) -> Explained | None:
        """Return a user's history, and the delivery that set each field, or None if no user is
        found.

        Raises SettingInvalid if several users match.
        """
        return await self._explain("user", query)

    async def explain_organization(self, query: str) -> Explained | None:
        """Return an organization's history, including its members, as `explain_user` does."""
        return await self._explain("organization", query)

    async def compare_user(self, query: str) -> UserComparison:
        """Compare a stored user with Logto's current answer."""
        async with open_client(self._settings()) as logto:
            key = await self._read(lambda store: resolve_one(store, "user", query))
            host = self.database.host
            when = await make_span_clock(host)
            return await compare_and_request_refetch(logto, host, key.id, when)

    async def recover(
        self,
        since: int | None = None,
        *,
        dry_run: bool = False,
        progressed: Callable[[RecoverResult], None] = _ignore_progress,
    ) -> RecoverResult:
        """Restore the deliveries in Logto's log that aren't in the inbox, since `since` (ms), or
        since the end of the last recovery. With `dry_run`, only count them."""
        await self.database.check()
        async with open_client(self._settings()) as logto:
            recovery = make_recovery(self._settings(), logto, self.database, self._wake)
            return await recovery.run(since, dry_run, progressed)

    async def reconcile(
        self,
        user: str | None = None,
        *,
        dry_run: bool = False,
        progressed: Progressed = _ignore_progress,
    ) -> ReconcileResult:
        """Compare all records, or those of one user, with Logto, and correct the differences."""
        await self._begin_changes(dry_run)
        async with open_client(self._settings()) as logto:
            reconciliation = make_reconciliation(logto, self.database, name="reconcile by command")
            if user is None:
                return await reconciliation.run(dry_run, progressed)
            key = await self._read(lambda store: resolve_one(store, "user", user))
            return await reconciliation.one_user(key.id, dry_run)

    async def backfill(
        self, *, run_handlers: bool = False, progressed: Progressed = _ignore_progress
    ) -> ReconcileResult:
        """Fill an empty database from Logto, as fast as Logto allows. With `run_handlers`, handlers
        run for each row that changes, whatever its age.

        Raises NoLocalHandlers if there is no such handler, neither in this object nor registered by
        a process.
        """
        await self._begin_changes()
        if run_handlers:
            await self._register()
            await self._read(check_local_handlers)
        async with open_client(self._settings(), fast=True) as logto:
            source: Source | None = "backfill" if run_handlers else None
            reconciliation = make_reconciliation(logto, self.database, source, "backfill")
            return await reconciliation.run(False, progressed)

    async def endpoints(self) -> list[Webhook]:
        """List Logto's webhooks."""
        async with open_client(self._settings()) as logto:
            found, _ = await webhooks.list_webhooks(logto)
            return found

    async def find_ours(self, webhooks: Sequence[Webhook]) -> set[str]:
        """Return the IDs of the webhooks that have your URL, or a key from your settings or from
        the database, which keeps rotated keys. The database needn't exist."""
        settings = self._settings()
        keys = set(split_signing_keys(settings))
        with contextlib.suppress(StoreUnavailable, SchemaMismatch):
            keys.update(await self._read_learnt_keys())
        return {webhook.id for webhook in webhooks if is_ours(webhook, keys, settings.public_url)}

    async def create_endpoint(self, url: str, *, name: str = webhooks.NAME) -> Webhook:
        """Create a webhook with the events that the sync and the handlers need.

        Raises WebhookExists, SettingInvalid.
        """
        if not is_url(url):
            raise SettingInvalid(name="url", problem=f"{url!r} must look like https://host/path")
        patterns = [name for handler in self.handlers for name in handler.registered.patterns]
        async with open_client(self._settings()) as logto:
            return await webhooks.create_webhook(logto, url, name, subscription(patterns))

    async def test_endpoint(
        self, webhook: str | None = None, *, event: str | None = None, timeout_s: float = 10.0
    ) -> TestResult:
        """Make a webhook send a test payload, and wait until it arrives. The default is yours, or
        the only one.

        Raises WebhookUnknown, UnknownEventName.
        """
        await self.database.check()
        async with open_client(self._settings()) as logto:
            found = await self._find_webhook(logto, webhook, or_only=True)
            sent = event or next(
                (name for name in found.events if name not in LATER), _DEFAULT_TEST_EVENT
            )
            try:
                return await webhooks.send_test(logto, self.database.host, found, sent, timeout_s)
            except LogtoApiError:
                events.named(sent)  # checked only now: a later Logto may have it
                raise

    async def rotate_endpoint(
        self, webhook: str | None = None, *, overlap_s: float = 600
    ) -> RotationResult:
        """Rotate the key of a webhook (by default yours) in Logto. The old key is accepted during
        the overlap.

        Raises WebhookUnknown.
        """
        await self.database.check()
        async with open_client(self._settings()) as logto:
            found = await self._find_webhook(logto, webhook)
            overlap_ms = round(overlap_s * 1000)
            return await rotate_key(logto, self.database.host, SystemClock(), found, overlap_ms)

    async def deliveries(self, filter: DeliveryFilter | None = None) -> list[StoredDelivery]:
        """List deliveries in the inbox, newest first."""
        checked = validation.check_delivery_filter(filter or DeliveryFilter())
        return await self._read(lambda store: store.inbox.search(checked))

    async def delivery(self, id: int) -> StoredDelivery | None:
        """Return one delivery with its body, or None if the id is unknown."""
        [checked] = validation.check_ids("delivery", [id])
        return await self._read(lambda store: store.inbox.get(checked))

    async def replay(
        self,
        ids: Sequence[int],
        *,
        handler: str | None = None,
        rerun: bool = False,
        sync_only: bool = False,
        dry_run: bool = False,
    ) -> ReplayResult:
        """Apply deliveries again, and run their dead and discarded jobs again.

        With `rerun`, jobs that are done also run again. With `sync_only`, no jobs run, and pending
        deliveries are left out. With a `handler`, only its jobs run, and only deliveries that were
        never applied are applied. `dry_run` returns the expected differences. Raises
        DeliveryUnknown, HandlerUnknown, and SettingInvalid for an invalid id.
        """
        lag_ms, checked = self._settings().lag_ms, validation.check_ids("delivery", ids)

        def work(store: Store) -> ReplayResult:
            how = {"handler": handler, "sync_only": sync_only, "dry_run": dry_run}
            return replay(store, checked, lag_ms, **how)

        await self._begin_changes(dry_run)
        result = await run_or_rehearse(self.database.host, work, dry_run)
        if sync_only:
            return result
        jobs, run = 0, JobReplay(checked, handler, rerun)
        while not run.is_over:
            rows = await self._read(run.find_jobs)
            jobs += await run_or_rehearse(self.database.host, partial(run.run, rows=rows), dry_run)
        return replace(result, jobs=result.jobs + jobs)

    async def replay_all(
        self,
        filter: DeliveryFilter,
        *,
        handler: str | None = None,
        rerun: bool = False,
        sync_only: bool = False,
        dry_run: bool = False,
        progressed: Callable[[int, int, int], None] = _ignore_progress,
    ) -> ReplayResult:
        """Replay all deliveries that match now, as `replay` does: the oldest first, after the
        filter's `after`, in short transactions. The filter's `limit` and order don't count.

        `progressed` gets the ID up to which deliveries were replayed, how many these were, and how
        many there are. Raises what `replay` raises.
        """
        checked = validation.check_delivery_filter(filter)
        wanted = replace(checked, oldest_first=True, limit=REPLAYED_AT_ONCE)
        if handler is not None:
            await self._read(lambda store: check_handler(store, handler))
        total, newest = await self._read(lambda store: store.inbox.count(wanted))
        result, done = ReplayResult(), 0
        progressed(wanted.after or 0, done, total)
        while sizes := await self._read(partial(_read_sizes, wanted=wanted, newest=newest)):
            for page in cut(sizes, sizes):
                result = result.plus(
                    await self.replay(
                        page, handler=handler, rerun=rerun, sync_only=sync_only, dry_run=dry_run
                    )
                )
                done += len(page)
                progressed(page[-1], done, total)
                wanted = replace(wanted, after=page[-1])
        return result

    async def jobs(self, filter: JobFilter | None = None) -> list[JobRow]:
        """List jobs, newest first."""
        checked = validation.check_job_filter(filter or JobFilter())
        return await self._read(lambda store: store.jobs.find(checked))

    async def retry_jobs(
        self, ids: Sequence[int] = (), *, handler: str | None = None, state: str | None = None
    ) -> int:
        """Run jobs again, at the end of their queues: by id, or all of a handler in one state (by
        default "dead"). A job that waits for its next attempt runs now.

        Returns how many jobs will run again, not counting running ones. Raises JobUnknown,
        HandlerUnknown, and SettingInvalid for an invalid id or state, or too many jobs at once.
        """
        return await self._move(ids, handler, state, JobMove.REPEAT)

    async def discard_jobs(
        self, ids: Sequence[int] = (), *, handler: str | None = None, state: str | None = None
    ) -> int:
        """Discard jobs, including running ones. Returns how many were discarded.

        Raises JobUnknown, HandlerUnknown, SettingInvalid.
        """
        return await self._move(ids, handler, state, JobMove.DISCARD)

    async def known_handlers(self) -> list[HandlerInfo]:
        """List the registered handlers with the number of their jobs in each state."""
        return await self._read(list_handlers)

    async def forget_handler(self, name: str) -> int | None:
        """Forget a handler that you have removed, and discard its waiting jobs.

        Returns the number of discarded jobs, or None if the handler is unknown.
        """
        checked = validation.check_text("the handler", name)
        discarded = await self._write(lambda store: forget_handler(store, checked))
        more = discarded or 0
        while discarded is not None and more:
            more = await self._write(lambda store: store.jobs.forget(checked, AT_ONCE))
            discarded += more
        return discarded

    async def run_handler(
        self,
        name: str,
        *,
        user: str | None = None,
        organization: str | None = None,
        email: str | None = None,
        since: int | None = None,
        until: int | None = None,
        rate: float = RATE,
        dry_run: bool = False,
        progressed: Progressed = _ignore_progress,
    ) -> list[ExistingRows]:
        """Run a handler of LocalUserCreated, LocalOrganizationCreated or LocalMemberAdded for the
        rows that exist already. Its events have the source "existing".

        For each row, the handler gets one job, unless it has had one before: so you can stop this
        and run it again. A process with the handler's code runs the jobs. At most `rate` are made
        per second. `user` and `organization` are queries that match one record. `email` is a part
        of an email. `since` and `until` (ms, exclusive) limit when the user or the organization
        was created in Logto. With `dry_run`, only count the jobs.

        Raises HandlerUnknown if the handler is neither in this object nor registered by a process,
        NotForRows for a handler of other events, and SettingInvalid.
        """
        pacer = Pacer(rate)
        checked = validation.check_text("the handler", name)
        in_email = None if email is None else check_text("the email", email)
        for name_of_limit, limit in (("since", since), ("until", until)):
            validation.check_moment(name_of_limit, limit)
        await self.database.check()
        own = self.handlers.by_name.get(checked) if dry_run else None
        if own is None:
            await self._register()
            handler = await self._read(lambda store: find_handler(store, checked))
        else:
            handler = own.registered

        def resolve(store: Store) -> RowFilter:
            return RowFilter(
                user=None if user is None else resolve_one(store, "user", user).id,
                organization=(
                    None
                    if organization is None
                    else resolve_one(store, "organization", organization).id
                ),
                email=in_email,
                since=since,
                until=until,
            )

        results = await run_for_existing(
            self.database.host,
            handler,
            await self._read(resolve),
            pacer,
            dry_run=dry_run,
            progressed=progressed,
        )
        self._wake()
        return results

    async def mapping_counts(self) -> list[MappingCounts]:
        """Count the records of each registered mapping by the state of their rows."""
        return await self._read(lambda store: store.mappings.counts())

    async def check_mappings(self) -> list[Difference]:
        """Compare your mapped tables with the mirror, and change nothing. Returns all differences:
        if there may be many, iterate over `find_mapping_differences`."""
        return [difference async for difference in self.find_mapping_differences()]

    async def find_mapping_differences(
        self, *, excluded: Counter[str] | None = None
    ) -> AsyncIterator[Difference]:
        """Compare your mapped tables with the mirror, and change nothing. Yields the differences as
        they are found, and keeps none of them.

        Adds to `excluded`, by mapping, how many records get no row because of `where` or
        `create=False`.
        """
        from logto_webhooks.mapping.check import find_differences

        await self.database.check()
        async for page in find_differences(self.database.host, self.mappings, excluded):
            for difference in page:
                yield difference

    async def apply_mappings(
        self,
        *,
        dry_run: bool = False,
        allow_deletes: bool = False,
        progressed: Callable[[int], None] = _ignore_progress,
    ) -> list[AppliedMapping]:
        """Write the mapped rows of all records, and try again what was refused. With `dry_run`,
        only count what would be linked, created and changed. With `allow_deletes`, also delete and
        unlink rows that are held, because they are too many."""
        from logto_webhooks.mapping.apply import apply_all

        await self.database.check()
        host = self.database.host
        return await apply_all(host, self.mappings, dry_run, progressed, allow_deletes)

    async def forget_mapping(self, name: str) -> bool:
        """Forget a mapping that you have removed. Its table isn't changed. Returns whether it was
        registered."""
        checked = validation.check_text("the mapping", name)
        is_known = await self._write(lambda store: store.mappings.remove(checked))
        after: str | None = ""
        while after is not None:  # again, the rest of what was interrupted is forgotten
            forget = partial(_forget_rows, name=checked, after=after)
            count, after = await self._write(forget)
            is_known = is_known or count > 0
        return is_known

    async def diagnose(
        self,
        only: Sequence[str] = (),
        *,
        timeout_s: float = TIMEOUT_S,
        least_free_mb: int = LEAST_FREE_MB,
        application: Admin | None = None,
        files: Sequence[Path] = (),
        read_map_file: Callable[[], MapFile | None] = lambda: None,
    ) -> list[Finding]:
        """Run the checks of `doctor`. Returns a finding for each: what is wrong, and how to fix it.

        `only` selects checks by name, together with the checks that they depend on. Each check can
        take `timeout_s`. `application` is your application, if its handlers run here, and should
        use this database. `files` are additional files that contain secrets. `read_map_file`
        returns the file with mapped tables. Raises SettingInvalid for an unknown check.
        """
        settings = self._settings()
        # Imported here, like `explain` below, so that other commands start faster.
        from logto_webhooks import doctor
        from logto_webhooks.doctor.context import LIMIT_S, DoctorTarget

        spool = spool_of(settings)
        target = DoctorTarget(
            settings=settings,
            least_free_mb=least_free_mb,
            limit_s=min(LIMIT_S, timeout_s / 2),
            spooled=await run_in_thread(spool.count) if spool else 0,
            spool_problem=spool.find_stranger() if spool else "",
            open=lambda: self.database,
            database_setting=self._database_setting,
            open_files=lambda: _find_open_files([*files, *self._list_files()]),
            make_client=partial(make_client, settings, longest_wait_s=_WAIT_S),
            handlers=[handler.registered for handler in self.handlers] or None,
            databases=None if application is None else partial(_locate_both, self, application),
            find_handler_problem=(application or self)._find_handler_problem,
            uses_api=(application or self)._uses_api,
            inspect_own_schema=partial((application or self)._inspect_own_schema, read_map_file),
        )
        return await doctor.diagnose(target, only, timeout_s)

    def _find_handler_problem(self) -> str | None:
        """Say why the application wouldn't start, if one of its handlers can't be called."""
        try:
            self.handlers.fit(self.database.host.provides)
        except InvalidHandler as error:
            return str(error)
        return None

    def _uses_api(self) -> bool:
        return self._settings().uses_api

    async def _inspect_own_schema(self, read_map_file: Callable[[], MapFile | None]) -> OwnSchema:
        from logto_webhooks.mapping.file import map_tables
        from logto_webhooks.mapping.own_schema import OwnSchema, inspect_own_schema

        try:
            map_file = read_map_file()
            if map_file is not None:
                await map_tables(self.database.host, map_file, self.mappings)
        except (MapFileInvalid, InvalidMapping, SettingInvalid) as error:
            return OwnSchema(file_problem=str(error))
        if not self.mappings:
            return OwnSchema()
        return await self._read(partial(inspect_own_schema, mappings=self.mappings))

    async def _move(
        self, ids: Sequence[int], handler: str | None, state: str | None, move: JobMove
    ) -> int:
        # The oldest first, because each goes to the end of its queue.
        selected = sorted(await self._select_jobs(ids, handler, state, move))
        moved = 0
        # A long transaction would delay the receiver.
        for start in range(0, len(selected), AT_ONCE):
            piece = selected[start : start + AT_ONCE]
            moved += await self._write(partial(_move_jobs, ids=piece, move=move))
        return moved

    async def _select_jobs(
        self, ids: Sequence[int], handler: str | None, state: str | None, move: JobMove
    ) -> list[int]:
        named = validation.check_ids("job", ids)
        if bool(named) is (handler is not None) or (named and state is not None):
            raise SettingInvalid(name="the selection of jobs", problem=_UNCLEAR)
        if handler is None:
            return await self._read(lambda store: check_job_ids(store, named))
        wanted = JobState.DEAD if state is None else state
        checked = await self._read(lambda store: check_move(store, handler, wanted, move))
        ids_of_handler: list[int] = []
        after: Place | None = None
        # Only the IDs, and all of them before the first is moved: a job that is done again at once
        # would otherwise be found again.
        while places := await self._read(
            partial(_list_places, handler=handler, state=checked, after=after)
        ):
            ids_of_handler += [place[-1] for place in places]
            after = places[-1]
        return ids_of_handler

    async def _register(self) -> None:
        """Register this object's own handlers, if it has any."""
        registered = [handler.registered for handler in self.handlers]
        if registered:
            await self._write(lambda store: store.jobs.register(registered))

    async def _begin_changes(self, dry_run: bool = False) -> None:
        """Check the database before records change. Unless this is a dry run, register the
        mappings, so that their rows follow, also if no running process has ever had them."""
        await self.database.check()
        if self.mappings and not dry_run:
            registered = self.mappings.registered
            await self.database.host.run(lambda store: store.mappings.register(registered))

    async def _read(self, work: Callable[[Store], T]) -> T:
        await self.database.check()
        return await self.database.host.read_long(work)

    async def _write(self, work: Callable[[Store], T]) -> T:
        await self.database.check()
        return await self.database.host.run(work)

    def _list_files(self) -> Sequence[Path]:
        try:
            return self.database.files
        except SettingInvalid:
            return ()  # the check of the database says so

    async def _find_webhook(
        self, logto: ManagementClient, query: str | None, *, or_only: bool = False
    ) -> Webhook:
        found, _ = await webhooks.list_webhooks(logto)
        if query:
            return find_webhook(found, query)
        settings = self._settings()
        keys = {*split_signing_keys(settings), *await self._read_learnt_keys()}
        return find_our_webhook(found, keys, settings.public_url, or_only=or_only)

    async def _read_learnt_keys(self) -> list[str]:
        return [key.key for key in await self._read(lambda store: store.webhook_keys.learnt())]

    async def _explain(self, kind: Kind, query: str) -> Explained | None:
        lag_ms = self._settings().lag_ms

        from logto_webhooks.explain import explain_stored

        subject = await self._read(lambda store: resolve_one(store, kind, query))
        return await explain_stored(self.database.host, subject, lag_ms)

    def _wake(self) -> None:
        """Do nothing: no worker runs here."""


def _read_sizes(store: Store, *, wanted: DeliveryFilter, newest: int) -> dict[int, int]:
    return store.inbox.sizes(wanted, newest)


def _list_places(
    store: Store, *, handler: str, state: JobState, after: Place | None
) -> list[Place]:
    return store.jobs.list_places(handler, state, after, AT_ONCE)


def _forget_rows(store: Store, *, name: str, after: str) -> tuple[int, str | None]:
    return store.mappings.forget(name, after)


def _move_jobs(store: Store, *, ids: Sequence[int], move: JobMove) -> int:
    return len(store.jobs.move(ids, move))


def _find_open_files(files: Iterable[Path]) -> dict[str, str]:
    modes = {str(file): find_open_mode(file) for file in files}
    return {path: mode for path, mode in modes.items() if mode}


def _locate_both(ours: Admin, theirs: Admin) -> tuple[str, str]:
    return locate(ours.database), locate(theirs.database)


def locate(database: Database) -> str:
    """Return the place of a database, without its user and driver."""
    _, separator, rest = database.name.partition("://")
    if not separator:
        return str(Path(database.name).resolve())
    hosts, _, name = rest.rpartition("/")
    return f"{','.join(_with_port(host) for host in hosts.split(','))}/{name}"


def _with_port(host: str) -> str:
    return host if re.search(r"[^:\]]:[0-9]+$|\]:[0-9]+$", host) else f"{host}:5432"
