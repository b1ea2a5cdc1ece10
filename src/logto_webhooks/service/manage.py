"""What people do by hand to an inbox, its handlers and their jobs, within a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.core.jobs import JobFilter
from logto_webhooks.core.lifecycle import JobState
from logto_webhooks.core.ports import Store
from logto_webhooks.core.record import Key, Kind
from logto_webhooks.errors import DeliveryUnknown, SettingInvalid
from logto_webhooks.service.replay import Replayed
from logto_webhooks.service.replay import replay as apply_again

_AT_ONCE: Final = 1_000
_UNNAMED: Final = "name jobs by their ids, or all of one with --handler (handler=)"


class Known(Struct, frozen=True, kw_only=True):
    """A handler with counts of its jobs; without `events` it isn't registered any more."""

    handler: str
    events: list[str]
    waiting: int = 0
    done: int = 0
    dead: int = 0
    discarded: int = 0


def only(store: Store, kind: Kind, query: str) -> Key:
    """The one user or organization that a query finds; else the query is taken for its id.

    Raises SettingInvalid if it finds several.
    """
    found = store.find(kind, query, 2)
    if len(found) > 1:
        raise SettingInvalid(name=f"the {kind}", problem=f"{query!r} finds more than one")
    return Key(kind, str(found[0].row[f"logto_{kind}_id"]) if found else query)


def replay(store: Store, ids: Sequence[int], lag_ms: int, **how: Any) -> Replayed:
    """Replay deliveries by id, or none of them. Raises DeliveryUnknown."""
    some = [(each, store.inbox.get(each)) for each in ids]
    for each, kept in some:
        if kept is None:
            raise DeliveryUnknown(id=each)
    return apply_again(store, [kept for _, kept in some if kept], lag_ms, **how)


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


def jobs_of(store: Store, handler: str | None, state: str) -> list[int]:
    """The ids of all jobs of a handler in a state. Raises SettingInvalid if none is named."""
    if handler is None:
        raise SettingInvalid(name="jobs", problem=_UNNAMED)
    found: list[int] = []
    after: int | None = None
    while True:
        wanted = JobFilter(handler=handler, state=JobState(state), after=after, limit=_AT_ONCE)
        page = [each.id for each in store.jobs.find(wanted)]
        found += page
        if len(page) < _AT_ONCE:
            return found
        after = page[-1]
