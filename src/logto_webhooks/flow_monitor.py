"""Watch the flow of deliveries on behalf of all processes on a database."""

from __future__ import annotations

from typing import Final

from logto_webhooks.checkpoints import FLOW, SILENT
from logto_webhooks.deliveries import DeliveryFilter
from logto_webhooks.flow import DAY_MS, DAYS, Flow, Silence, find_silence
from logto_webhooks.forever import forever
from logto_webhooks.instrumentation.events import FlowResumed, FlowStopped, Observer
from logto_webhooks.interfaces import Clock, Progress, Store, TransactionRunner

LOOK_S: Final = 60.0
_RECENT: Final = 20  # what Logto's log brought back is no flow


class FlowMonitor:
    """Looks every minute; `silence` is what it found."""

    def __init__(
        self, host: TransactionRunner, clock: Clock, observe: Observer, after_s: float | None
    ) -> None:
        """`after_s` without a delivery is silence; None learns it, 0 never says so."""
        self._host = host
        self._clock = clock
        self._observe = observe
        self._after_ms = None if after_s is None else round(after_s * 1000)
        self.silence: Silence | None = None

    async def keep(self) -> None:
        """Look, over and over."""
        if self._after_ms != 0:
            await forever(self.look, LOOK_S)

    async def look(self) -> None:
        """Note what came, and tell when the flow stops or goes on. Raises StoreUnavailable."""
        before, now = self.silence, self._clock.now()
        self.silence = found = await self._host.run(lambda store: self._judged(store, now))
        if found and (before is None or before.why != found.why):
            usual_s = None if found.usual_ms is None else found.usual_ms // 1000
            self._observe(FlowStopped(found.why, (now - found.since) // 1000, usual_s))
        elif before and not found:
            self._observe(FlowResumed((now - before.since) // 1000))

    def _judged(self, store: Store, now: int) -> Silence | None:
        found = find_silence(record_flow(store), now, self._after_ms)
        told = Progress(found.since, 1) if found else Progress(0, 0)
        if store.progress(SILENT) != told:
            store.progress(SILENT, told)
        return found


def record_flow(store: Store) -> Flow:
    """Note the newest delivery, and the gap before it; return all that is known of the flow."""
    newest = _newest(store)
    known = store.progress(FLOW)
    if newest is not None and known is None:
        known = store.progress(FLOW, Progress(newest, newest))
    if newest is not None and known is not None and newest > known.at:
        _note_gap(store, newest, newest - known.at)
        known = store.progress(FLOW, Progress(newest, known.count))
    oldest = (known.at if known else 0) - DAYS * DAY_MS
    kept = (store.progress(_of_day(day)) for day in range(DAYS))
    gaps = [each for each in kept if each and each.at > oldest]
    return Flow(
        began=known.count if known else None,
        last=known.at if known else None,
        gaps=tuple(each.count for each in gaps),
        rejected=store.keys_of_hooks.aside(known.at if known else 0, known=known is not None),
    )


def _newest(store: Store) -> int | None:
    recent = store.inbox.search(DeliveryFilter(limit=_RECENT))
    return next((each.received_at for each in recent if each.origin == "webhook"), None)


def _note_gap(store: Store, at: int, gap: int) -> None:
    name = _of_day(at // DAY_MS)
    kept = store.progress(name)
    same_day = kept is not None and kept.at // DAY_MS == at // DAY_MS
    if kept is None or not same_day or kept.count < gap:
        store.progress(name, Progress(at, gap))


def _of_day(day: int) -> str:
    return f"gap:{day % DAYS}"
