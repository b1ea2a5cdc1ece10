"""Compare all records with Logto's, and correct the differences."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from logto_webhooks.apply import batch
from logto_webhooks.clock import Clock
from logto_webhooks.database.runner import TransactionRunner, run_or_rehearse
from logto_webhooks.database.store import RECONCILE, Checkpoint, Store
from logto_webhooks.errors import (
    WORTH_DIVIDING,
    InvalidApiResponse,
    RowRejected,
    StoreUnavailable,
    WrongTenant,
)
from logto_webhooks.event_loop import forever, run_in_thread
from logto_webhooks.events.local import Source
from logto_webhooks.instrumentation import Observer, Reconciled
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import (
    PAGE,
    ApiResponse,
    Span,
    SpanClock,
    TenantRole,
    make_span_clock,
)
from logto_webhooks.logto.pagination import ENDED, Ask, OffsetPager
from logto_webhooks.logto.tenant_check import TenantCheck
from logto_webhooks.reconcile import REFUSALS, cut_changes, is_answering, report_to
from logto_webhooks.reconcile.fetch import Fetcher, find_subject
from logto_webhooks.records.drift import Drift, agrees, drifts_of
from logto_webhooks.records.record import ROLE, Absent, ApiRead, Change, Key, Kind, Record

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

PIECE: Final = 200  # records per query
AGAIN: Final = 8  # how often records that changed while they were listed are fetched again
AGAIN_S: Final = 0.5
LOOK_S: Final = 30.0  # how often to check whether a run is due
FUTURE_MS: Final = 600_000  # by how much Logto's clock may be ahead of ours
MOST: Final = 1_000  # differences that are listed individually
MOST_LOCKED: Final = 20  # records that may be left out because they are locked
RESUME_MS: Final = 86_400_000  # how old a run may be to be resumed


class ReconcileResult(Struct, kw_only=True):
    """The result of a comparison with Logto. `fields` counts the columns that differed.

    `began` is the start (ms) of the comparison. If it was `resumed`, the counts cover only the last
    run. `not_compared` counts the records about which Logto gave no usable answer;
    `doubts` names them.
    """

    began: int = 0
    resumed: bool = False
    users: int = 0
    organizations: int = 0
    members: int = 0
    roles: int = 0
    drifted: int = 0
    fields: dict[str, int] = {}
    not_compared: int = 0
    drifts: list[Drift] = []
    doubts: list[str] = []  # what couldn't be compared, and why


# What is being listed, how many items so far, and which fraction of all, from 0 to 1.
Progressed = Callable[[str, int, float], None]


def _ignore(stage: str, listed: int, done: float) -> None:
    """Report no progress."""


class Reconciliation:
    """Compares all records, within the API's rate limit."""

    def __init__(
        self,
        logto: ManagementClient,
        host: TransactionRunner,
        clock: Clock,
        source: Source | None = "reconcile",
        name: str = RECONCILE,
    ) -> None:
        """`source` is the source of events for handlers. Without one, no handlers run. Only a run
        of the same `name` is resumed: what a command compares after an outage must not count as
        compared because a service did so before."""
        self._source = source
        self._name = name
        self._logto = logto
        self._host = host
        self._clock = clock
        self._tenant = TenantCheck(logto, host)

    async def run(self, dry_run: bool = False, progressed: Progressed = _ignore) -> ReconcileResult:
        """Compare all records. With `dry_run`, change nothing. A killed run is resumed.

        Raises WrongTenant, LogtoUnreachable, LogtoApiError, StoreUnavailable.
        """
        await self._tenant.ensure_same_tenant()
        run = await self._start(dry_run, progressed)
        await run.compare_all(self._clock.now())
        return run.result

    async def keep(self, every_s: int, observe: Observer) -> None:
        """Run whenever the last run is older than `every_s`. Errors are reported."""

        loop, ran_at = asyncio.get_running_loop(), -inf

        async def run_if_due() -> None:
            nonlocal ran_at
            # The last run is dated by Logto's clock, which may differ a lot from ours.
            if loop.time() - ran_at >= every_s and await self._is_due(every_s):
                result = await self.run()
                ran_at = loop.time()
                fields = ", ".join(f"{name}: {n}" for name, n in sorted(result.fields.items()))
                counts = (result.users, result.organizations, result.drifted)
                observe(Reconciled(*counts, fields, "; ".join(result.doubts)))

        await forever(run_if_due, LOOK_S, report_to(observe, LOOK_S))

    async def one_user(self, user_id: str, dry_run: bool = False) -> ReconcileResult:
        """Compare only one user, with roles and memberships. `users` is 0 if there is none.

        Raises what `run` raises, and InvalidApiResponse.
        """
        run = await self._start(dry_run, _ignore)
        run.result.began = self._clock.now()
        if api_responses.can_be_id(user_id):
            await self._tenant.ensure_same_tenant()
            await run.compare_user(user_id)
        return run.result

    async def _is_due(self, every_s: int) -> bool:
        last = await self._host.read(lambda store: store.checkpoint(RECONCILE))
        if last is None:
            return True
        passed_ms = self._clock.now() - last.at
        # A run that is dated in the future is from before the clock was set back.
        return passed_ms >= every_s * 1000 or passed_ms < -FUTURE_MS

    async def _start(self, dry: bool, progressed: Progressed) -> ReconcileRun:
        when = await make_span_clock(self._host)
        return ReconcileRun(
            self._logto,
            self._host,
            when,
            self._tenant,
            dry=dry,
            source=self._source,
            progressed=progressed,
            name=self._name,
        )


class ReconcileRun:
    """One comparison. A `dry` one changes nothing, and stores no checkpoints."""

    def __init__(
        self,
        logto: ManagementClient,
        host: TransactionRunner,
        when: SpanClock,
        tenant: TenantCheck,
        *,
        dry: bool,
        source: Source | None,
        progressed: Progressed,
        name: str,
    ) -> None:
        self.result = ReconcileResult()
        self._name = name
        self._began = f"{name} began"
        self._began_at_last = f"{name} began by"
        self._logto = logto
        self._host = host
        self._fetcher = Fetcher(logto, host, when)
        self._when = when
        self._tenant = tenant
        # The records that were fetched, and roles that weren't listed, if stored dates don't tell.
        self._asked: set[Key] = set()
        self._roles: dict[Key, set[str]] = {}
        # Reads that are dated earlier (Logto's clock) may be from before this run.
        self._began_by = 0
        self._unequal: dict[Key, None] = {}
        self._differed: set[Key] = set()  # in a dry run
        self._left_out: set[str] = set()
        self._settles = False
        self._locked = 0
        self._dry = dry
        self._source = source
        self._progressed = progressed

    async def compare_all(self, now: int) -> None:
        """Compare all records, or what a killed run left."""
        reached, by = (
            await self._read_checkpoint(self._began),
            await self._read_checkpoint(self._began_at_last),
        )
        if not self._dry and reached and by and reached.count and reached.at > now - RESUME_MS:
            self.result.began, self.result.resumed = reached.at, True
            self._began_by = by.at
        try:
            await self._compare_users()
            await self._compare_organizations()
            await self._compare_roles()
            await self._settle()
        except WrongTenant:
            # The next run starts over, because it may use another Logto.
            await self._save({self._began: Checkpoint(self.result.began, 0)})
            raise
        began, drifted = self.result.began, self.result.drifted
        await self._save({RECONCILE: Checkpoint(began, drifted), self._began: Checkpoint(began, 0)})
        # Deliveries that were applied meanwhile didn't know of this comparison.
        await self._ask_unlisted("user", self._ask_user)
        await self._ask_unlisted("organization", self._ask_organization)

    async def compare_user(self, user_id: str) -> None:
        """Compare one user, with roles and memberships."""
        key = Key("user", user_id)
        known = await self._host.read(lambda store: store.inbox.known(key))
        async for piece in self._fetcher.fetch_user(user_id):
            if isinstance(piece[0], Absent) and key not in known:
                return
            self.result.users = 1
            await self._learn(piece)
        await self._settle()

    async def _compare_users(self) -> None:
        async for page, span, seen in self._list("users", self._logto.users):
            self.result.users = seen
            items = self._parse_ids("user", page)
            await self._learn(await self._read_items(api_responses.read_user, items, span))
        await self._ask_unlisted("user", self._ask_user)

    async def _compare_organizations(self) -> None:
        listed = self._list("organizations", self._logto.organizations)
        async for page, span, seen in listed:
            self.result.organizations = seen
            items = self._parse_ids("organization", page)
            read = api_responses.read_organization
            await self._learn(await self._read_items(read, items, span))
            for organization_id in items:
                await self._compare_members(organization_id)
        await self._ask_unlisted("organization", self._ask_organization)

    async def _compare_members(self, organization_id: str) -> None:
        async with self._survive_refusal("organization", organization_id):
            async for piece in self._fetcher.fetch_members(organization_id):
                self.result.members += sum(change.key.kind == "membership" for change in piece)
                await self._learn(piece)

    async def _compare_roles(self) -> None:
        """List the users of each role: listing the roles of each user would take a hundred times
        as long."""
        async for page in self._logto.roles():
            for item in page.content:
                try:
                    role = api_responses.parse_role(item)
                except InvalidApiResponse as error:
                    self._doubt(error)
                    continue
                if role is not None:
                    self.result.roles += 1
                    async with self._survive_refusal("role", role.id):
                        await self._compare_holders(role)
        await self._ask_unlisted("user", self._ask_roles, with_roles=True)

    async def _compare_holders(self, role: TenantRole) -> None:
        holders = partial(self._logto.holders, role.id)
        async for page, span, _ in self._list(f"role {role.id}", holders):
            users = self._parse_ids("user", page)
            await self._learn(api_responses.read_role_holders(role, users, span))

    async def _list(self, stage: str, ask: Ask) -> AsyncIterator[tuple[ApiResponse, Span, int]]:
        """Yield each page, its span, and the number of items listed so far."""
        listing = OffsetPager(ask, *await self._find_place(stage))
        async for page in listing.pages():
            span = self._when(page)
            if not self.result.began:
                self.result.began, self._began_by = span
                await self._save(
                    {
                        self._began: Checkpoint(span.at, 1),
                        self._began_at_last: Checkpoint(span.end, 1),
                    }
                )
            yield page, span, listing.seen
            await self._save_place(stage, listing.page, listing.total)
        await self._save_place(stage, ENDED, listing.total)
        if listing.missed:
            self._doubt(
                f"{listing.missed} {stage} changed pages while they were listed: run it again"
            )

    def _parse_ids(self, kind: Kind, page: ApiResponse) -> dict[str, Any]:
        items = {}
        for item in page.content:
            try:
                items[api_responses.parse_id(item, kind)] = item
            except InvalidApiResponse as error:
                self._doubt(error)
        return items

    async def _read_items(
        self, read: Callable[[str, Any, Span], Change], items: dict[str, Any], span: Span
    ) -> list[Change]:
        def read_all() -> list[Change]:
            changes = []
            for logto_id, item in items.items():
                try:
                    changes.append(read(logto_id, item, span))
                except InvalidApiResponse as error:
                    self._doubt(error)
            return changes

        return await run_in_thread(read_all)

    async def _ask_unlisted(
        self, kind: Kind, ask: Callable[[str], Awaitable[None]], with_roles: bool = False
    ) -> None:
        """Fetch stored records that weren't listed."""
        async for key in self._find_unread(kind, with_roles):
            async with self._survive_refusal(kind, key.id):
                await ask(key.id)

    async def _find_unread(self, kind: Kind, with_roles: bool) -> AsyncIterator[Key]:
        after: str | None = ""
        while after is not None:
            find = partial(
                Store.unread_keys,
                kind=kind,
                since=self._began_by,
                after=after,
                with_roles=with_roles,
            )
            keys, after = await self._host.read(find)
            for key in keys:
                # Some were fetched already. With roles, all stored roles of a user must have been.
                if self._roles.get(key, {""}) if with_roles else key not in self._asked:
                    yield key

    async def _ask_user(self, user_id: str) -> None:
        await self._learn([await self._fetcher.fetch_user_alone(user_id)])

    async def _ask_organization(self, organization_id: str) -> None:
        organization = await self._fetcher.fetch_organization(organization_id)
        await self._learn([organization])
        if not isinstance(organization, Absent):
            await self._compare_members(organization_id)

    async def _ask_roles(self, user_id: str) -> None:
        await self._learn([await self._fetcher.fetch_roles(user_id)])

    async def _settle(self) -> None:
        """Fetch records again that differ from Logto's answer, so that none is taken for equal."""
        for _ in range(AGAIN):
            keys = self._take_unequal()
            if not keys:
                return
            await asyncio.sleep(AGAIN_S)
            for key in keys:
                async with self._survive_refusal(key.kind, key.id):
                    if key.kind == "user":
                        async for piece in self._fetcher.fetch_user(key.id):
                            await self._learn(piece)
                    else:
                        await self._ask_organization(key.id)
        for key in self._take_unequal():
            self._doubt(
                f"the {key.kind} {key.id} differs from Logto's answer, because a newer delivery "
                "arrived: run it again"
            )

    def _take_unequal(self) -> list[Key]:
        """Return the users and organizations to fetch again, once each: those with data newer than
        the answer, and restored ones whose memberships are unknown."""
        keys, self._unequal, self._settles = list(self._unequal), {}, True
        if len(keys) > MOST:
            self._doubt(f"{len(keys) - MOST} records changed while they were listed: run it again")
        return keys[:MOST]

    async def _learn(self, changes: Sequence[Change]) -> None:
        """Apply Logto's answers, and count the differences. Raises WrongTenant."""
        if any(isinstance(change, Absent) for change in changes):
            await self._tenant.ensure_same_tenant()
        for piece in await run_in_thread(cut_changes, changes):
            await self._learn_piece(piece)

    async def _learn_piece(self, changes: Sequence[Change]) -> None:
        def learn(store: Store) -> list[tuple[Record, Record]]:
            return batch.apply_reads(store, changes, self._source)

        try:
            changed = await run_or_rehearse(self._host, learn, self._dry)
        except WORTH_DIVIDING as error:
            await self._learn_halves(changes, error)
            return
        self._remember(changes, [before for before, _ in changed])
        for before, after in changed:
            self._count(before.key, drifts_of(before, after))
        self._find_unequal(changes, [after for _, after in changed])

    async def _learn_halves(
        self, changes: Sequence[Change], error: RowRejected | StoreUnavailable
    ) -> None:
        """Apply each half separately, so that a bad or locked row, or one that takes long, doesn't
        harm others. Raises StoreUnavailable if there are more than MOST_LOCKED such rows."""
        if len(changes) == 1:
            key = changes[0].key
            if isinstance(error, StoreUnavailable):
                self._locked += 1
                if self._locked > MOST_LOCKED:
                    raise error
            self._doubt(f"the {key.kind} {key.id} can't be stored: {error}")
            return
        middle = len(changes) // 2
        await self._learn_piece(changes[:middle])
        await self._learn_piece(changes[middle:])

    def _remember(self, changes: Sequence[Change], before: Iterable[Record]) -> None:
        """Note what was fetched, if stored dates don't tell: a dry run writes none, and at the
        start of a run, a date may be from an earlier read."""
        asked = [
            change
            for change in changes
            if isinstance(change, ApiRead | Absent) and (self._dry or change.at < self._began_by)
        ]
        keys = {change.key for change in asked}
        for record in before:
            if record.key in keys:
                here = {name for name in record.groups if name.startswith(ROLE)}
                self._roles.setdefault(record.key, here)
        for change in asked:
            listed = [name for name in getattr(change, "contents", {}) if name.startswith(ROLE)]
            if listed:
                self._roles[change.key] = self._roles.get(change.key, set()) - set(listed)
            else:
                self._asked.add(change.key)

    def _count(self, key: Key, drifts: Sequence[Drift]) -> None:
        if not drifts or (self._settles and key in self._differed):
            return
        if self._dry:
            self._differed.add(key)
        result = self.result
        result.drifted += 1
        for field in (field for drift in drifts for field in drift.fields):
            result.fields[field] = result.fields.get(field, 0) + 1
        result.drifts += drifts[: MOST - len(result.drifts)]

    def _find_unequal(self, changes: Sequence[Change], records: Iterable[Record]) -> None:
        by_key = {record.key: record for record in records}
        for change in changes:
            record = by_key.get(change.key)
            if record is not None and not agrees(record, change):
                self._unequal[find_subject(change.key)] = None
        for key, record in by_key.items():
            if key.kind == "user" and record.is_restored:
                self._unequal[key] = None

    @asynccontextmanager
    async def _survive_refusal(self, kind: str, logto_id: str) -> AsyncIterator[None]:
        """Go on with other records if Logto gives no usable answer about one. Raises
        LogtoUnreachable or LogtoApiError if it doesn't answer other requests either."""
        try:
            yield
        except InvalidApiResponse as error:
            self._doubt(error)
        except REFUSALS as error:
            if not await is_answering(self._logto):
                raise
            name = f"{kind} {logto_id}"
            if name not in self._left_out:  # it may be fetched more than once
                self._left_out.add(name)
                self.result.not_compared = len(self._left_out)
                self._doubt(f"the {name} wasn't compared: {error}")

    def _doubt(self, why: InvalidApiResponse | str) -> None:
        """Note what couldn't be compared."""
        self.result.doubts.append(str(why))

    async def _find_place(self, stage: str) -> tuple[int, int | None]:
        """Return the page at which to resume a stage, and the total of the page before."""
        page = await self._read_checkpoint(f"{self._name} {stage}")
        total = await self._read_checkpoint(f"{self._name} {stage} total")
        if not self.result.resumed or not page or page.at != self.result.began:
            return 1, None
        return page.count, total.count if total else None

    async def _save_place(self, stage: str, page: int, total: int | None) -> None:
        name, began = f"{self._name} {stage}", self.result.began
        await self._save(
            {name: Checkpoint(began, page), f"{name} total": Checkpoint(began, total or 0)}
        )
        listed = min((page - 1) * PAGE, total or 0)
        self._progressed(stage, listed, listed / total if total else 1.0)

    async def _read_checkpoint(self, name: str) -> Checkpoint | None:
        return await self._host.read(lambda store: store.checkpoint(name))

    async def _save(self, checkpoints: dict[str, Checkpoint]) -> None:
        def save(store: Store) -> None:
            for name, checkpoint in checkpoints.items():
                store.save_checkpoint(name, checkpoint)

        if not self._dry:
            await self._host.run(save)
