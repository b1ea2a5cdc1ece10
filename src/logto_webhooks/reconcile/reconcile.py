"""Compare all records with Logto's own, and correct what differs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from logto_webhooks.clock import Clock
from logto_webhooks.database.checkpoints import RECONCILE
from logto_webhooks.database.store import Store, TransactionRunner
from logto_webhooks.errors import InvalidApiResponse, WrongTenant, describe
from logto_webhooks.event_loop import forever
from logto_webhooks.events.local import Source
from logto_webhooks.instrumentation import ApiUnavailable, Observer, Reconciled
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import ApiResponse, Span, TenantRole
from logto_webhooks.logto.clock_skew import make_span_clock
from logto_webhooks.logto.pagination import ENDED, Ask, OffsetPager
from logto_webhooks.logto.tenant_check import TenantCheck
from logto_webhooks.reconcile import members, user
from logto_webhooks.reconcile.run import Progressed, ReconcileResult, ReconcileRun
from logto_webhooks.records.record import Absent, Change, Key, Kind

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

PIECE: Final = 200  # records that are asked about in one go
AGAIN: Final = 3  # how often those are asked about again that changed while they were listed
AGAIN_S: Final = 0.5
LOOK_S: Final = 30.0  # how often it is seen whether a look is due
FUTURE_MS: Final = 600_000  # by how much Logto's clock may be ahead of ours
_About = Callable[[str, Any, Span], Change]


def _silent(stage: str, listed: int, done: float) -> None:
    """Tell nobody."""


class Reconciliation:
    """Compares everything, within the API's budget."""

    def __init__(
        self,
        logto: ManagementClient,
        host: TransactionRunner,
        clock: Clock,
        source: Source | None = "reconcile",
    ) -> None:
        """`source` is what handlers are told; without one they are told nothing."""
        self._source = source
        self._logto = logto
        self._host = host
        self._clock = clock
        self._tenant = TenantCheck(logto, host)

    async def run(self, dry_run: bool = False, progressed: Progressed = _silent) -> ReconcileResult:
        """Look at all; with `dry_run` change nothing. A look that was killed is gone on with.

        Raises WrongTenant, LogtoUnreachable, LogtoApiError, StoreUnavailable.
        """
        await self._tenant.ensure_same_tenant()
        look = await self._look(dry_run, progressed)
        await look.resume(self._clock.now())
        try:
            await self._users(look)
            await self._organizations(look)
            await self._roles(look)
            await self._settle(look)
        except WrongTenant:
            await look.forget_place()
            raise
        await look.end()
        return look.found

    async def keep(self, every_s: int, observe: Observer) -> None:
        """Look whenever the last look is older; what is wrong is reported, and tried again."""

        async def look() -> None:
            if await self._is_due(every_s):
                result = await self.run()
                fields = ", ".join(f"{name}: {n}" for name, n in sorted(result.fields.items()))
                counts = (result.users, result.organizations, result.drifted)
                observe(Reconciled(*counts, fields, "; ".join(result.doubts)))

        def report(error: Exception) -> float:
            observe(ApiUnavailable(describe(error), LOOK_S))
            return LOOK_S

        await forever(look, LOOK_S, report)

    async def _is_due(self, every_s: int) -> bool:
        last = await self._host.read(lambda store: store.checkpoint(RECONCILE))
        if last is None:
            return True
        passed_ms = self._clock.now() - last.at
        # A look that is dated in the future is of before the clock was set back.
        return passed_ms >= every_s * 1000 or passed_ms < -FUTURE_MS

    async def one_user(self, user_id: str, dry_run: bool = False) -> ReconcileResult:
        """Look at one user alone, with roles and memberships; `users` is 0 if there is none.

        Raises as `run`, and InvalidApiResponse.
        """
        look = await self._look(dry_run, _silent)
        look.found.began = self._clock.now()
        if not api_responses.can_be_id(user_id):
            return look.found
        await self._tenant.ensure_same_tenant()
        changes = await user.user_changes(self._logto, self._host, user_id, look.when)
        key = Key("user", user_id)
        known = await self._host.read(lambda store: store.inbox.known(key))
        if isinstance(changes[0], Absent) and key not in known:
            return look.found
        look.found.users = 1
        await look.learn(changes)
        await self._settle(look)
        return look.found

    async def _settle(self, look: ReconcileRun) -> None:
        """Ask again about those that aren't what Logto answered: never take one for equal."""
        for _ in range(AGAIN):
            keys = look.unequal()
            if not keys:
                return
            await asyncio.sleep(AGAIN_S)
            for key in keys:
                try:
                    if key.kind == "user":
                        await look.learn(
                            await user.user_changes(self._logto, self._host, key.id, look.when)
                        )
                    else:
                        await self._ask_organization(look, key.id)
                except InvalidApiResponse as error:
                    look.doubt(error)
        for key in look.unequal():
            look.doubt(
                f"the {key.kind} {key.id} isn't what Logto answers: what came of it is newer; "
                "run it again"
            )

    async def _look(self, dry: bool, progressed: Progressed) -> ReconcileRun:
        when = await make_span_clock(self._host)
        return ReconcileRun(
            self._host,
            when,
            self._tenant,
            dry=dry,
            source=self._source,
            progressed=progressed,
        )

    async def _users(self, look: ReconcileRun) -> None:
        async for page, span, seen in self._listed(look, "users", self._logto.users):
            look.found.users = seen
            items = _items(look, "user", page)
            await look.learn(_told(look, api_responses.read_user, items, span))
        await self._rest(look, "user", self._ask_user)

    async def _organizations(self, look: ReconcileRun) -> None:
        listed = self._listed(look, "organizations", self._logto.organizations)
        async for page, span, seen in listed:
            look.found.organizations = seen
            items = _items(look, "organization", page)
            await look.learn(_told(look, api_responses.read_organization, items, span))
            for item in items:
                await self._members(look, item)
        await self._rest(look, "organization", self._ask_organization)

    async def _members(self, look: ReconcileRun, organization_id: str) -> None:
        try:
            pieces = await members.member_changes(
                self._logto, self._host, organization_id, look.when
            )
        except InvalidApiResponse as error:
            look.doubt(error)
            return
        for piece in pieces:
            look.found.members += sum(change.key.kind == "membership" for change in piece)
            await look.learn(piece)

    async def _roles(self, look: ReconcileRun) -> None:
        """Ask each role who has it: to ask each user would take a hundred times as long."""
        async for page in self._logto.roles():
            for item in page.content:
                try:
                    role = api_responses.parse_role(item)
                except InvalidApiResponse as error:
                    look.doubt(error)
                    continue
                if role is not None:
                    look.found.roles += 1
                    await self._holders(look, role)
        await self._rest(look, "user", self._ask_roles, with_roles=True)

    async def _holders(self, look: ReconcileRun, role: TenantRole) -> None:
        holders = partial(self._logto.holders, role.id)
        async for page, span, _ in self._listed(look, f"role {role.id}", holders):
            await look.learn(
                api_responses.read_role_holders(role, _items(look, "user", page), span)
            )

    async def _listed(
        self, look: ReconcileRun, stage: str, ask: Ask
    ) -> AsyncIterator[tuple[ApiResponse, Span, int]]:
        """Each page, when it was true, and how many were listed by then."""
        start, total = await look.place(stage)
        listing = OffsetPager(ask, start, total)
        async for page in listing.pages():
            span = look.when(page)
            await look.start(span.at)
            yield page, span, listing.seen
            await look.keep_place(stage, listing.page, listing.total)
        await look.keep_place(stage, ENDED, listing.total)
        if listing.missed:
            look.doubt(
                f"{listing.missed} of the {stage} moved while they were listed: run it again"
            )

    async def _rest(
        self,
        look: ReconcileRun,
        kind: Kind,
        ask: Callable[[ReconcileRun, str], Any],
        with_roles: bool = False,
    ) -> None:
        """Ask about those whom no list named."""
        unread = self._unread(look, kind, with_roles)
        async for key in unread:
            try:
                await ask(look, key.id)
            except InvalidApiResponse as error:
                look.doubt(error)

    async def _unread(self, look: ReconcileRun, kind: Kind, with_roles: bool) -> AsyncIterator[Key]:
        after = ""
        while True:

            def find(store: Store, after: str = after) -> list[Key]:
                began = look.found.began
                return store.keys(
                    kind, PIECE, after=after, unread_since=began, with_roles=with_roles
                )

            keys = await self._host.read(find)
            for key in keys:
                if not look.asked_about(key, with_roles):
                    yield key
            if not keys:
                return
            after = keys[-1].id

    async def _ask_user(self, look: ReconcileRun, user_id: str) -> None:
        answered = await self._logto.user(user_id)
        await look.learn([api_responses.read_user(user_id, answered.content, look.when(answered))])

    async def _ask_organization(self, look: ReconcileRun, organization_id: str) -> None:
        answered = await self._logto.organization(organization_id)
        told = api_responses.read_organization(
            organization_id, answered.content, look.when(answered)
        )
        await look.learn([told])
        if answered.content is not None:
            await self._members(look, organization_id)

    async def _ask_roles(self, look: ReconcileRun, user_id: str) -> None:
        await look.learn([await user.fetch_roles(self._logto, user_id, look.when)])


def _items(look: ReconcileRun, kind: Kind, page: ApiResponse) -> dict[str, Any]:
    items = {}
    for item in page.content:
        try:
            items[api_responses.parse_id(item, kind)] = item
        except InvalidApiResponse as error:
            look.doubt(error)
    return items


def _told(look: ReconcileRun, about: _About, items: dict[str, Any], span: Span) -> list[Change]:
    changes = []
    for logto_id, item in items.items():
        try:
            changes.append(about(logto_id, item, span))
        except InvalidApiResponse as error:
            look.doubt(error)
    return changes
