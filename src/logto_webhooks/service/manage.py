"""What people do by hand to an inbox, its handlers and their jobs, within a transaction."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.core.jobs import JobFilter
from logto_webhooks.core.lifecycle import JobMove, JobState, job_targets
from logto_webhooks.core.ports import Status, Store
from logto_webhooks.core.record import Key, Kind
from logto_webhooks.errors import DeliveryUnknown, HandlerUnknown, JobUnknown, SettingInvalid
from logto_webhooks.service import given
from logto_webhooks.service.paging import AT_ONCE, all_jobs
from logto_webhooks.service.replay import Replayed
from logto_webhooks.service.replay import replay as apply_again


class Known(Struct, frozen=True, kw_only=True):
    """A handler with counts of its jobs; without `events` it isn't registered any more."""

    handler: str
    events: list[str]
    waiting: int = 0
    done: int = 0
    dead: int = 0
    discarded: int = 0


def only(store: Store, kind: Kind, query: str) -> Key:
    """The one user or organization that a query finds, the living one before those that are
    deleted; else the query is taken for its id.

    Raises SettingInvalid if it finds several.
    """
    found = store.find(kind, given.text_of("the query", query), 2)
    living = [each for each in found if each.row["deleted_at"] is None]
    found = living if len(living) == 1 else found
    if len(found) > 1:
        named = f"see `logto-webhooks {kind}s {shlex.quote(query)}`, and name one by its id"
        raise SettingInvalid(name=f"the {kind}", problem=f"it finds more than one; {named}")
    return Key(kind, str(found[0].row[f"logto_{kind}_id"]) if found else query)


def replay(store: Store, ids: Sequence[int], lag_ms: int, **how: Any) -> Replayed:
    """Replay deliveries by id, or none of them. Raises DeliveryUnknown, HandlerUnknown."""
    if how.get("handler") is not None:
        check_handler(store, how["handler"])
    some = {each: store.inbox.get(each) for each in ids}
    unknown = [each for each, kept in some.items() if kept is None]
    if unknown:
        raise DeliveryUnknown(unknown)
    return apply_again(store, [kept for kept in some.values() if kept], lag_ms, **how)


def status(store: Store) -> Status:
    """Count deliveries and records, and jobs by state; of whom nobody registered what waits."""
    counts = store.jobs.counts()
    known = {each.name for each in store.jobs.handlers()}
    jobs = dict.fromkeys((state.value for state in JobState), 0)
    for each in counts:
        jobs[each.state] += each.count
    waiting = [each for each in counts if each.state == JobState.WAITING]
    unrunnable = {each.handler: each.count for each in waiting if each.handler not in known}
    return replace(store.status(), jobs=jobs, unrunnable=unrunnable)


def known(store: Store) -> list[Known]:
    """All handlers that are registered, or have jobs."""
    counts: dict[str, dict[str, int]] = {}
    for each in store.jobs.counts():
        counts.setdefault(each.handler, {})[each.state] = each.count
    events = {each.name: list(each.patterns) for each in store.jobs.handlers()}
    names = sorted(events.keys() | counts.keys())
    return [
        Known(handler=name, events=events.get(name, []), **counts.get(name, {})) for name in names
    ]


def forget(store: Store, name: str) -> int | None:
    """Forget a handler; None if nothing is known of it."""
    is_known = any(each.name == name for each in store.jobs.handlers())
    discarded = store.jobs.forget(name)
    return discarded if is_known or discarded else None


def named_jobs(store: Store, ids: Sequence[int]) -> list[int]:
    """The same ids, if there is a job of each. Raises JobUnknown."""
    known: set[int] = set()
    for start in range(0, len(ids), AT_ONCE):
        some = tuple(ids[start : start + AT_ONCE])
        known |= {each.id for each in store.jobs.find(JobFilter(ids=some, limit=len(some)))}
    unknown = [each for each in ids if each not in known]
    if unknown:
        raise JobUnknown(unknown)
    return list(ids)


def jobs_of(store: Store, handler: str, state: str, move: JobMove) -> list[int]:
    """The ids of all jobs of a handler in a state. Raises HandlerUnknown, and SettingInvalid for a
    state in which they can't be moved so."""
    wanted = given.state_of(state, JobState)
    if wanted not in job_targets(move):
        can = ", ".join(job_targets(move))
        problem = f"what is {wanted} can't be: {can} can"
        raise SettingInvalid(name="the state", problem=problem)
    check_handler(store, handler)
    return [each.id for each in all_jobs(store, JobFilter(handler=handler, state=wanted))]


def check_handler(store: Store, name: str) -> None:
    """Raises HandlerUnknown for one that isn't registered, and has no jobs."""
    names = [each.name for each in store.jobs.handlers()]
    if name in names:
        return
    names = sorted({*names, *(each.handler for each in store.jobs.counts())})
    if name in names:
        return
    raise HandlerUnknown(name, names)
