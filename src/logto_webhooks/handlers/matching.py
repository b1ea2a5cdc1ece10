"""Decide which handlers get a job for an event or a changed record."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Final

import msgspec

from logto_webhooks.deliveries import ClaimedDelivery
from logto_webhooks.errors import InvalidHandler, UnknownEventName
from logto_webhooks.events import (
    ALIASES,
    BY_NAME,
    DERIVED,
    Event,
    OrganizationMembershipUpdated,
    OrganizationUserAdded,
    OrganizationUserRemoved,
    TestPayload,
    UnknownEvent,
)
from logto_webhooks.events.local import (
    LOCAL,
    LocalEvent,
    LocalMemberEvent,
    LocalOrganizationCreated,
    LocalOrganizationEvent,
    LocalUserCreated,
    LocalUserEvent,
)
from logto_webhooks.jobs import NewJob, RegisteredHandler, Tests

_CREATED: Final = (LocalUserCreated, LocalOrganizationCreated)
_NEVER_BY_A_STAR: Final = DERIVED | LOCAL.keys()


def wants(pattern: str, name: str) -> bool:
    """Whether a pattern means an event; those that this package makes must be named."""
    if name in _NEVER_BY_A_STAR and not pattern.startswith(("Organization.User.", "Local")):
        return False
    return fnmatchcase(name, pattern)


def jobs_for_event(
    event: Event, claimed: ClaimedDelivery, handlers: Sequence[RegisteredHandler], since: int
) -> list[NewJob]:
    """The jobs that an applied delivery makes: none if it is older than `since` (ms)."""
    if claimed.occurred_at < since:
        return []
    other = "no" if isinstance(event, TestPayload) else "only"
    handlers = [handler for handler in handlers if handler.tests != other]
    name = ALIASES.get(event.event, event.event)
    jobs = [_job(handler, name, claimed, None) for handler in _wanting(handlers, name)]
    for derived, user in _derived(event):
        jobs += [_job(handler, derived, claimed, user) for handler in _wanting(handlers, derived)]
    return jobs


def jobs_for_change(
    event: LocalEvent, mark: str, handlers: Sequence[RegisteredHandler], delivery_id: int | None
) -> list[NewJob]:
    """The jobs of a record's own event; `mark` is what no other change has."""
    subject = _subject(event)
    once = isinstance(event, _CREATED) and not event.restored  # per Logto id
    key = f"{event.name}:{subject}" + ("" if once else f":{mark}")
    return [
        NewJob(
            handler=handler.name,
            key=key,
            event=event.name,
            subject=subject,
            queue_key=subject if handler.ordered else key,
            delivery_id=delivery_id,
            payload=msgspec.json.encode(event),
        )
        for handler in _wanting(handlers, event.name)
        if handler.tests != "only"
    ]


def is_wanted(handler: RegisteredHandler, name: str) -> bool:
    """Whether a handler wants an event."""
    return any(wants(pattern, name) for pattern in handler.patterns)


def _wanting(handlers: Sequence[RegisteredHandler], name: str) -> list[RegisteredHandler]:
    return [handler for handler in handlers if is_wanted(handler, name)]


def _job(
    handler: RegisteredHandler, name: str, claimed: ClaimedDelivery, user: str | None
) -> NewJob:
    subject = f"user:{user}" if user is not None else claimed.subject or f"event:{name}"
    key = claimed.digest.hex() + (f":{name}:{user}" if user is not None else "")
    return NewJob(
        handler=handler.name,
        key=key,
        event=name,
        subject=subject,
        queue_key=subject if handler.ordered else key,
        occurred_at=claimed.occurred_at,
        delivery_id=claimed.id,
    )


def _derived(event: Event) -> list[tuple[str, str]]:
    if not isinstance(event, OrganizationMembershipUpdated):
        return []
    added = [(OrganizationUserAdded.name, user) for user in event.added_user_ids]
    return added + [(OrganizationUserRemoved.name, user) for user in event.removed_user_ids]


def _subject(event: LocalEvent) -> str:
    match event:
        case LocalUserEvent():
            return f"user:{event.user.logto_user_id}"
        case LocalOrganizationEvent():
            return f"organization:{event.organization.logto_organization_id}"
        case LocalMemberEvent():
            return f"user:{event.user_id}"
    raise TypeError(event)


What = type[Event] | type[LocalEvent] | str
_KNOWN: Final[dict[str, type[Event] | type[LocalEvent]]] = {**BY_NAME, **LOCAL}
_SENT: Final = tuple(name for name in BY_NAME if name not in DERIVED)
_EACH: Final = 'Give classes such as events.UserCreated, or names, each by itself; for all, "*".'
_BY_NAME_ONLY: Final = (
    'What is made here is meant by its name alone, or by a pattern that begins with "Local" or '
    '"Organization.User.".'
)
_NO_TEST: Final = "Logto's console sends no test of what is made here."


def parse_patterns(what: Sequence[What], *, unknown: bool, tests: Tests) -> tuple[str, ...]:
    """The names and patterns of what is given; each means an event that can come, by the very rule
    by which jobs are made. `unknown` lets pass what this release doesn't know.

    Raises UnknownEventName, and InvalidHandler for a function.
    """
    return tuple(dict.fromkeys(_pattern(event, unknown, tests) for event in what))


def match_classes(patterns: Sequence[str], tests: Tests) -> list[type]:
    """The classes of the events that a handler is given."""
    if tests == "only":
        return [TestPayload]
    meant = [name for name in _KNOWN if _mean(patterns, name)]
    found: list[type] = [_KNOWN[name] for name in meant]
    if any(pattern == "*" or not _comes(pattern, tuple(_KNOWN)) for pattern in patterns):
        found.append(UnknownEvent)
    if tests == "too" and any(name in _SENT for name in meant):
        found.append(TestPayload)
    return found


def _pattern(what: What, unknown: bool, tests: Tests) -> str:
    name = _name(what)
    names = _SENT if tests == "only" else tuple(_KNOWN)
    if _comes(name, names) or (unknown and name and name.isprintable()):
        return name
    raise UnknownEventName(name=name, hint=_hint(name, tests))


def _name(what: Any) -> str:
    if isinstance(what, str):
        return ALIASES.get(what, what)
    if not isinstance(what, type):
        if callable(what):
            problem = "write what it is for, in parentheses: @logto.on(events.UserCreated)"
            raise InvalidHandler(name=getattr(what, "__qualname__", repr(what)), problem=problem)
        raise UnknownEventName(name=what, hint=_EACH)
    if issubclass(what, Event | LocalEvent) and what.name:
        return what.name
    raise UnknownEventName(name=what.__name__, hint=_EACH)


def _hint(name: str, tests: Tests) -> str:
    if any(fnmatchcase(known_name, name) for known_name in _KNOWN):
        return _NO_TEST if tests == "only" else _BY_NAME_ONLY
    if "*" in name or "?" in name:
        return "No event that this release knows is like that."
    near = get_close_matches(name, _KNOWN, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(_KNOWN)}."


def _mean(patterns: Sequence[str], name: str) -> bool:
    return any(wants(pattern, name) for pattern in patterns)


def _comes(pattern: str, names: Sequence[str]) -> bool:
    return any(wants(pattern, name) for name in names)
