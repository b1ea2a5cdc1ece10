"""Recover deliveries from Logto's log that the inbox lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.batch_sizes import cut_by_size
from logto_webhooks.clock import Clock, to_iso
from logto_webhooks.database.runner import TransactionRunner, run_or_rehearse
from logto_webhooks.database.store import RECOVER, Checkpoint, Store
from logto_webhooks.deliveries import NewDelivery, ReceivedBody, StoreResult
from logto_webhooks.errors import InvalidApiResponse, LogtoWebhooksError, WrongTenant
from logto_webhooks.event_loop import forever, run_in_thread
from logto_webhooks.instrumentation import LogRecovered, Observer
from logto_webhooks.logto import delivery_log
from logto_webhooks.logto.api_responses import make_span_clock
from logto_webhooks.logto.tenant_check import TenantCheck
from logto_webhooks.logto.webhooks import leads_here, parse_webhook
from logto_webhooks.reconcile import PIECE_BYTES, REFUSALS, report_to
from logto_webhooks.signing_keys import is_key, read_webhook_id

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

OVERLAP_MS: Final = 15_000
UNSEEN_MS: Final = 600_000  # more overlap of the first run: a clock may have been set back before
FIRST_MS: Final = 86_400_000  # how far back the first run reads
MOST: Final = 1_000  # entries per stretch of time, unless it is as short as SHORTEST_MS
SHORTEST_MS: Final = 1_000
AGAIN_S: Final = 30.0  # until a failed run is repeated
_RECENT: Final = 200  # deliveries that are searched for the IDs of their webhooks


class RecoverResult(Struct, kw_only=True):
    """The result of a recovery up to `until` (ms). `causes` counts missing deliveries by cause."""

    since: int
    until: int
    done: float = 0  # from 0 to 1
    webhooks: list[str] = []
    entries: int = 0
    recovered: int = 0
    causes: dict[str, int] = {}
    doubts: list[str] = []  # why something may still be missing


class Recovery:
    """Reads the part of Logto's log that wasn't read yet."""

    def __init__(
        self,
        logto: ManagementClient,
        host: TransactionRunner,
        clock: Clock,
        keys: Sequence[str],
        public_url: str | None = None,
        stored: Callable[[], None] = lambda: None,
    ) -> None:
        """`stored` is called when new deliveries are in the inbox."""
        self._logto = logto
        self._host = host
        self._clock = clock
        self._keys = keys
        self._public_url = public_url
        self._stored = stored
        self._tenant = TenantCheck(logto, host)
        self._now = 0  # a lower bound of the time at Logto
        self._oldest = 0  # among the entries of the current webhook
        self._overlap = OVERLAP_MS
        self._last_look: tuple[float, int] | None = None  # monotonic, and the time at Logto

    async def run(
        self,
        since: int | None = None,
        dry_run: bool = False,
        progress: Callable[[RecoverResult], None] = lambda result: None,
    ) -> RecoverResult:
        """Recover deliveries, or only count them with `dry_run`. Without `since` (ms), start for
        each webhook where its last run ended.

        Raises LogtoUnreachable, LogtoApiError, InvalidApiResponse, StoreUnavailable.
        """
        asked_at = self._clock.now()
        result = RecoverResult(since=asked_at, until=asked_at)
        webhook_ids, until, keys = await self._find_webhooks(result)
        if not dry_run:
            await self._confirm_keys(keys, asked_at, is_ours=bool(webhook_ids))
        self._overlap = self._measure_overlap()
        leaves_gap = False
        errors: list[LogtoWebhooksError] = []
        for number, webhook_id in enumerate(webhook_ids):

            def tell(done: float, number: int = number) -> None:
                result.done = (number + done) / len(webhook_ids)
                progress(result)

            try:
                leaves_gap |= await self._read_log(webhook_id, since, until, result, dry_run, tell)
            except (*REFUSALS, InvalidApiResponse) as error:
                errors.append(error)  # the logs of the others can still be read
        if errors:
            raise errors[0]
        reached = 0 if leaves_gap else self._now  # `result.recovered` counts in any case
        await self._save_checkpoint(RECOVER, reached, result.recovered, dry_run or not webhook_ids)
        return result

    async def _read_log(
        self,
        webhook_id: str,
        since: int | None,
        until: int,
        result: RecoverResult,
        dry_run: bool,
        tell: Callable[[float], None],
    ) -> bool:
        """Read the log of a webhook, and `tell` how much of it is done. Return whether a part
        before `since` remains unread."""
        start = await self._find_start(webhook_id, result)
        # After a gap, the log isn't complete, so the next run must begin where it would now.
        is_apart = since is not None and since > start
        if is_apart:
            result.doubts.append(
                f"the log of the webhook {webhook_id} wasn't read from {to_iso(start)} to "
                f"{to_iso(since or 0)}: run `recover` without --since"
            )
        start = start if since is None else since
        result.since = min(result.since, start)
        self._oldest = self._now
        stretches = [(start, until)] if start < until else []
        while stretches:
            begin, end = stretches.pop()
            if await self._take(webhook_id, begin, end, result, dry_run):
                name = _name_checkpoint(webhook_id)
                await self._save_checkpoint(name, end, 0, dry_run or is_apart)
                tell((end - start) / max(until - start, 1))
            else:
                middle = (begin + end) // 2
                stretches += [(middle, end), (begin, middle)]
        if delivery_log.is_cut(await self._read_recent(), webhook_id, start, self._oldest):
            problem = f"the log of the webhook {webhook_id} starts at {to_iso(self._oldest)}"
            result.doubts.append(f"{problem}, so earlier failures are unknown: run `reconcile`")
        return is_apart

    async def keep(self, seconds: float, observe: Observer) -> None:
        """Recover now, and then repeatedly. Errors are reported, and the run is repeated."""

        async def recover() -> None:
            result = await self.run()
            causes = ", ".join(f"{why}: {count}" for why, count in result.causes.items())
            doubts = "; ".join(result.doubts)
            observe(LogRecovered(result.entries, result.recovered, causes, doubts))

        await forever(recover, seconds, report_to(observe, min(seconds, AGAIN_S)))

    async def _find_webhooks(
        self, result: RecoverResult
    ) -> tuple[list[str], int, dict[str, str | None]]:
        """Return the IDs of the webhooks that lead here, until when to read Logto's log, and the
        keys of all webhooks by their IDs. A key is None if it can't be read."""
        recent = await self._read_recent()
        seen = {sender for each in recent if (sender := read_webhook_id(each.body))}
        # A webhook may send rarely, and its key may have been rotated since the settings were made.
        learnt = await self._host.read(lambda store: store.webhook_keys.learnt())
        seen.update(key.webhook_id for key in learnt)
        keys = {*self._keys, *(key.key for key in learnt)}
        all_keys: dict[str, str | None] = {}
        has_unreadable = False
        when, latest = await make_span_clock(self._host), self._clock.now()
        async for page in self._logto.webhooks():
            # By Logto's clock, which dates its entries. The end may be too late, but the log is
            # complete only up to the earliest possible time of the request.
            self._now, end = when(page)
            result.since = result.until = self._now
            latest = max(latest, end)
            for item in page.content:
                webhook = parse_webhook(item)
                if webhook is None:
                    has_unreadable = True
                    continue
                key = webhook.signing_key
                all_keys[webhook.id] = key if is_key(key) else None
                if leads_here(webhook, seen, keys, self._public_url):
                    result.webhooks.append(webhook.id)
                    if not webhook.enabled:
                        result.doubts.append(f"the webhook {webhook.id} is disabled")
        if has_unreadable:
            result.doubts.append(_UNREADABLE_WEBHOOK)
            # It may be any of those that aren't listed.
            for known in learnt:
                all_keys.setdefault(known.webhook_id, None)
        if not result.webhooks:
            result.doubts.append(_NOWHERE)
        return result.webhooks, latest, all_keys

    async def _confirm_keys(
        self, keys: Mapping[str, str | None], asked_at: int, *, is_ours: bool
    ) -> None:
        """Compare the keys that Logto's API returned before with those that its webhooks have now,
        so that a key that was replaced or whose webhook was deleted isn't accepted for ever."""
        learnt = await self._host.read(lambda store: store.webhook_keys.learnt())
        in_use = [key for key in learnt if key.until is None]
        deleted = {key.webhook_id for key in in_use} - keys.keys()
        replaced = [
            replace(key, key=now, learnt_at=asked_at)
            for key in in_use
            if (now := keys.get(key.webhook_id)) not in (None, key.key)
        ]
        if deleted and not is_ours:
            try:
                await self._tenant.ensure_same_tenant()
            except WrongTenant:
                return

        def confirm(store: Store) -> None:
            store.webhook_keys.forget(deleted)
            store.webhook_keys.learn(replaced)

        if deleted or replaced:
            await self._host.run(confirm)

    async def _read_recent(self) -> list[ReceivedBody]:
        return await self._host.read(lambda store: store.recent(_RECENT))

    async def _find_start(self, webhook_id: str, result: RecoverResult) -> int:
        reached = await self._host.read(
            lambda store: store.checkpoint(_name_checkpoint(webhook_id))
        )
        if reached and not self._is_of_future(reached):
            return min(reached.at, self._now) - self._overlap
        start = self._now - FIRST_MS - OVERLAP_MS
        if reached:
            problem = f"it was noted as read up to {to_iso(reached.at)}, which is in the future"
            result.doubts.append(
                f"the log of the webhook {webhook_id} was read from {to_iso(start)} on, because "
                f"{problem}: run `reconcile`"
            )
        return start

    def _measure_overlap(self) -> int:
        """Return how much of what was read is read again (ms): if a clock was set back since the
        last look, newer entries have older dates."""
        last_look, self._last_look = self._last_look, (monotonic(), self._now)
        if last_look is None:
            return OVERLAP_MS + UNSEEN_MS
        passed_ms = int((monotonic() - last_look[0]) * 1000)
        return OVERLAP_MS + max(0, passed_ms - (self._now - last_look[1]))

    def _is_of_future(self, reached: Checkpoint) -> bool:
        """Whether a checkpoint is in the future, because a wrong clock dated it."""
        return reached.at > self._now + OVERLAP_MS

    async def _take(
        self, webhook_id: str, begin: int, end: int, result: RecoverResult, dry: bool
    ) -> bool:
        """Add missing deliveries of a stretch to the inbox. If it has too many, return False.

        Raises InvalidApiResponse if pages lack entries: the stretch would count as complete.
        """
        listed = total = 0
        async for page in self._logto.log(webhook_id, begin, end):
            total = page.total or 0
            if total > MOST and end - begin > SHORTEST_MS:
                return False
            listed += len(page.content)
            await self._add(page.content, result, dry, page.date)
        if listed < total:
            problem = f"its log lists {listed} of {total} entries"
            raise InvalidApiResponse(kind="webhook", id=webhook_id, problem=problem)
        return True

    async def _add(
        self, entries: Sequence[dict[str, Any]], result: RecoverResult, dry: bool, date: int | None
    ) -> None:
        now = self._clock.now()
        ahead = 0 if date is None else max(0, date - now)  # how far Logto's clock is ahead of ours
        parsed = await run_in_thread(_parse, entries, now, ahead)
        deliveries = [delivery for _, delivery in parsed if delivery]
        result.entries += len(entries)
        self._oldest = min([self._oldest, *(delivery.occurred_at for delivery in deliveries)])
        if len(deliveries) < len(parsed) and _UNREADABLE not in result.doubts:
            result.doubts.append(_UNREADABLE)
        results: list[StoreResult] = []
        sizes = [len(delivery.body) for delivery in deliveries]
        for piece in cut_by_size(deliveries, sizes, PIECE_BYTES):
            add = partial(_add_deliveries, deliveries=piece)
            results += await run_or_rehearse(self._host, add, dry)
        stored = iter(results)
        new = [entry for entry, delivery in parsed if delivery and not next(stored).duplicate]
        result.recovered += len(new)
        for entry in new:
            why = delivery_log.failure_cause(entry)
            result.causes[why] = result.causes.get(why, 0) + 1
        if new and not dry:
            self._stored()

    async def _save_checkpoint(self, name: str, at: int, count: int, dry: bool) -> None:
        def note(store: Store) -> None:
            before = store.checkpoint(name) or Checkpoint(0, 0)
            kept = 0 if self._is_of_future(before) else before.at
            reached = max(min(at, self._now), kept)
            store.save_checkpoint(name, Checkpoint(reached, before.count + count))

        if not dry:
            await self._host.run(note)


def _add_deliveries(store: Store, deliveries: Sequence[NewDelivery]) -> list[StoreResult]:
    return store.add(deliveries)


def _parse(
    entries: Sequence[dict[str, Any]], now: int, ahead: int
) -> list[tuple[dict[str, Any], NewDelivery | None]]:
    return [(entry, delivery_log.parse_delivery(entry, now, ahead)) for entry in entries]


_UNREADABLE: Final = "an entry of the log contains no delivery"
_UNREADABLE_WEBHOOK: Final = (
    "Logto lists a webhook that can't be read, so deliveries from it may be missing"
)
_NOWHERE: Final = (
    "no webhook of this Logto leads here: none has the signing key or LOGTO_WEBHOOKS_PUBLIC_URL, "
    "and none has sent a delivery; set one of them"
)


def _name_checkpoint(webhook_id: str) -> str:
    return f"{RECOVER}:{webhook_id}"
