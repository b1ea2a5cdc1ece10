"""Applying deliveries again, and running again what didn't succeed."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from logto_webhooks.core.drift import Drift, drift_of
from logto_webhooks.core.events import parse
from logto_webhooks.core.inbox import Kept
from logto_webhooks.core.jobs import JobFilter
from logto_webhooks.core.lifecycle import JobMove
from logto_webhooks.core.ports import Store
from logto_webhooks.core.projection import plan
from logto_webhooks.core.signature import vouch
from logto_webhooks.errors import MalformedEvent
from logto_webhooks.service import sync

_JOBS = 10_000  # of one delivery


class Replayed(Struct, frozen=True, kw_only=True):
    """What a replay did, or would do: deliveries, jobs that are to run again, and what differs."""

    deliveries: int
    jobs: int
    drifts: list[Drift]

    def plus(self, more: Replayed) -> Replayed:
        """Count both."""
        return Replayed(
            deliveries=self.deliveries + more.deliveries,
            jobs=self.jobs + more.jobs,
            drifts=self.drifts + more.drifts,
        )


def replay(
    store: Store,
    some: Sequence[Kept],
    lag_ms: int,
    *,
    handler: str | None = None,
    rerun: bool = False,
    sync_only: bool = False,
    tell: bool = False,
) -> Replayed:
    """Let deliveries be applied again, and their jobs that are dead or discarded run again.

    With `rerun` those that are done, too, but of handlers that are left out of that; only of
    one `handler`, if it is named. `sync_only` applies here and now, and no handler is told; to
    `tell` what would differ, roll this back.
    """
    at_once = sync_only or tell
    drifts = [drift for each in some if at_once for drift in _applied(store, each, lag_ms)]
    jobs: list[int] = []
    if not sync_only:
        store.inbox.again([each.id for each in some])
        jobs = [job for each in some for job in _to_repeat(store, each.id, handler, rerun)]
    moved = store.jobs.move(jobs, JobMove.REPEAT)
    return Replayed(deliveries=len(some), jobs=len(moved), drifts=drifts)


def _applied(store: Store, kept: Kept, lag_ms: int) -> list[Drift]:
    try:
        changes = plan(parse(vouch(kept.body)), lag_ms)
    except MalformedEvent:
        return []
    pairs = sync.learn(store, changes, None)
    return [drift for pair in pairs if (drift := drift_of(*pair)) is not None]


def _to_repeat(store: Store, delivery_id: int, handler: str | None, rerun: bool) -> list[int]:
    left_out = {each.name for each in store.jobs.handlers() if not each.rerun}
    wanted = JobFilter(delivery_id=delivery_id, handler=handler, limit=_JOBS)
    return [
        each.id
        for each in store.jobs.find(wanted)
        if each.state in ("dead", "discarded")
        or (rerun and each.state == "done" and each.handler not in left_out)
    ]
