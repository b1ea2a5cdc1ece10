"""Refetch records that only Logto can settle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from logto_webhooks.apply import batch
from logto_webhooks.database.records import RefetchNeed
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.errors import (
    WORTH_DIVIDING,
    InvalidApiResponse,
    NoAnswer,
    WrongTenant,
    describe,
)
from logto_webhooks.event_loop import forever, run_in_thread
from logto_webhooks.instrumentation import ApiUnavailable, Observer, Refetched
from logto_webhooks.logto.api_responses import make_span_clock
from logto_webhooks.logto.tenant_check import TenantCheck
from logto_webhooks.reconcile import REFUSALS, cut_changes, is_answering
from logto_webhooks.reconcile.fetch import Fetcher, find_subject
from logto_webhooks.records.record import (
    CONFIRMED_MS,
    MEMBERS,
    RESTORED,
    ROLE,
    Absent,
    Change,
    Key,
)

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

AT_ONCE: Final = 500  # records per step
POLL_S: Final = 1.0
# A request about one record that Logto doesn't answer takes seconds, so it is repeated rarely.
REFUSED_S: Final = 5.0
LONGEST_REFUSED_S: Final = 900.0
SLOW_S: Final = 2.0  # a subject that takes longer goes on beside the others
MOST_SLOW: Final = 8
AGAIN_S: Final = 0.5
LONGEST_REFETCH_WAIT_S: Final = 60.0
GONE: Final = "gone"  # whether it is still gone decides about the application's rows


class Refetcher:
    """Fetches records that wait for it, one subject after the other. One that takes long, such as
    an organization with many members, goes on beside the others."""

    def __init__(self, logto: ManagementClient, host: TransactionRunner, observe: Observer) -> None:
        self._logto = logto
        self._host = host
        self._observe = observe
        self._tenant = TenantCheck(logto, host)
        self._tries: dict[Key, tuple[int, float]] = {}  # subject -> tries, not before (monotonic)
        self._slow: dict[Key, asyncio.Task[None]] = {}  # subjects that take long

    async def keep(self) -> None:
        """Fetch records until cancelled. Errors are reported, and the step is tried again."""
        stalls = 0

        async def step() -> None:
            nonlocal stalls
            await self.step()
            stalls = 0

        def report(error: Exception) -> float:
            nonlocal stalls
            stalls += 1
            wait_s = min(2.0 ** min(stalls, 10), LONGEST_REFETCH_WAIT_S)
            self._observe(ApiUnavailable(describe(error), wait_s))
            return wait_s

        try:
            await forever(step, POLL_S, report)
        finally:
            await self._end_slow()

    async def drain(self) -> None:
        """Fetch until nothing waits. Raises LogtoUnreachable, LogtoApiError, StoreUnavailable."""
        try:
            while await self._read_waiting():
                if not await self.step():
                    await asyncio.sleep(AGAIN_S)
        finally:
            await self._end_slow()

    async def step(self) -> int:
        """Fetch each due subject once. Return how many. A subject for which Logto gives no usable
        answer goes on waiting, and doesn't delay others. One that takes long isn't waited for.

        Raises LogtoUnreachable, LogtoApiError, StoreUnavailable if Logto answers nothing at all.
        """
        waiting = await self._read_waiting()
        subjects: dict[Key, list[RefetchNeed]] = {}
        for need in waiting:
            subjects.setdefault(find_subject(need.key), []).append(need)
        self._tries = {key: tried for key, tried in self._tries.items() if key in subjects}
        now = time.monotonic()
        due = [
            key
            for key in subjects
            if self._tries.get(key, (0, 0))[1] <= now and key not in self._slow
        ]
        # One list of members replaces many requests for single records.
        due.sort(key=lambda key: not any(MEMBERS in subject.reason for subject in subjects[key]))
        # Subjects that failed come after the others, even if an error ends this step.
        due.sort(key=lambda key: self._tries.get(key, (0, 0))[0])
        for subject in due:
            settling = asyncio.create_task(self._settle(subject, subjects[subject]))
            self._slow[subject] = settling
            await self._wait_for(settling)
        self._forget_done()
        return len(due)

    async def _wait_for(self, settling: asyncio.Task[None]) -> None:
        """Wait until a subject is settled, or until there is room for one that takes long. Raises
        what those that are done raised."""
        try:
            await asyncio.wait({settling}, timeout=SLOW_S)
            if len(self._slow) >= MOST_SLOW:
                await asyncio.wait(self._slow.values(), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._end_slow()
            raise
        self._forget_done()

    def _forget_done(self) -> None:
        done = [subject for subject, settling in self._slow.items() if settling.done()]
        for settling in [self._slow.pop(subject) for subject in done]:
            settling.result()

    async def _end_slow(self) -> None:
        slow, self._slow = list(self._slow.values()), {}
        for settling in slow:
            settling.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    async def _read_waiting(self) -> list[RefetchNeed]:
        most = AT_ONCE + len(self._tries)

        def find(store: Store) -> list[RefetchNeed]:
            gone = store.mappings.list_unconfirmed(most, CONFIRMED_MS)
            needs = [RefetchNeed(key=key, reason=GONE, doubtful=False) for key in gone]
            return store.waiting(most) + needs

        return await self._host.read(find)

    async def _settle(self, subject: Key, waiting: Sequence[RefetchNeed]) -> None:
        name = f"{subject.kind}:{subject.id}"
        tries, _ = self._tries.get(subject, (0, 0))
        wait = min(AGAIN_S * 2.0 ** min(tries, 10), LONGEST_REFETCH_WAIT_S)
        self._tries[subject] = (tries + 1, time.monotonic() + wait)
        try:
            if subject.kind == "user":
                await self._refetch_user(subject.id, waiting)
            else:
                await self._refetch_organization(subject.id, waiting)
        # Others can still be settled.
        except WrongTenant as error:
            self._observe(ApiUnavailable(describe(error), wait))
        except (InvalidApiResponse, *WORTH_DIVIDING) as error:
            self._observe(ApiUnavailable(describe(error), wait, name))
        except REFUSALS as error:
            wait = min(REFUSED_S * 2.0 ** min(tries, 10), LONGEST_REFUSED_S)
            self._tries[subject] = (tries + 1, time.monotonic() + wait)
            if not await is_answering(self._logto):
                raise
            self._observe(ApiUnavailable(describe(error), wait, name))
        else:
            reasons = sorted({f"{need.key.kind}: {need.reason}" for need in waiting})
            self._observe(Refetched(name, tuple(reasons)))

    async def _refetch_user(self, user_id: str, waiting: Sequence[RefetchNeed]) -> None:
        fetcher = Fetcher(self._logto, self._host, await make_span_clock(self._host))
        pairs = [need.key for need in waiting if need.key.kind == "membership"]
        reasons = [need.reason for need in waiting if need.key.kind == "user"]
        is_back = any(RESTORED in reason for reason in reasons)
        if reasons:
            user = await fetcher.fetch_user_alone(user_id)
            is_back |= await self._learn(user)
            if isinstance(user, Absent):
                return  # older memberships ended, too
        if is_back:
            async for piece in fetcher.fetch_belongings(user_id):
                await self._learn(*piece)
            return
        if any(ROLE in reason for reason in reasons):
            await self._learn(await fetcher.fetch_roles(user_id))
        if pairs:
            await self._learn(*await fetcher.fetch_memberships(user_id, pairs))

    async def _refetch_organization(
        self, organization_id: str, waiting: Sequence[RefetchNeed]
    ) -> None:
        fetcher = Fetcher(self._logto, self._host, await make_span_clock(self._host))
        organization = await fetcher.fetch_organization(organization_id)
        is_back = await self._learn(organization)
        is_back |= any(MEMBERS in need.reason or RESTORED in need.reason for need in waiting)
        if is_back and not isinstance(organization, Absent):
            async for piece in fetcher.fetch_members(organization_id):
                await self._learn(*piece)

    async def _learn(self, *changes: Change) -> bool:
        """Apply answers. Return whether they restored a user or an organization. Raises WrongTenant
        if this Logto isn't ours, so that records it never had don't count as deleted."""
        if any(isinstance(change, Absent) for change in changes):
            await self._tenant.ensure_same_tenant()
        pieces = await run_in_thread(cut_changes, changes)
        return any([await self._learn_piece(piece) for piece in pieces])

    async def _learn_piece(self, changes: Sequence[Change]) -> bool:
        """Apply answers, in halves if that takes too long."""
        try:
            changed = await self._host.run_large(
                lambda store: batch.apply_reads(store, changes, "read")
            )
        except NoAnswer:
            if len(changes) == 1:
                raise
            middle = len(changes) // 2
            halves = [changes[:middle], changes[middle:]]
            return any([await self._learn_piece(half) for half in halves])
        return any(after.is_restored for _, after in changed)
