"""Decide which handlers get a job for an event or a changed record."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

import msgspec

from logto_webhooks.deliveries import ClaimedDelivery
from logto_webhooks.events import (
    Event,
    OrganizationMembershipUpdated,
    OrganizationUserAdded,
    OrganizationUserRemoved,
    TestPayload,
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
from logto_webhooks.events.registry import ALIASES, DERIVED
from logto_webhooks.jobs import NewJob, RegisteredHandler

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
    handlers = [each for each in handlers if each.tests != other]
    name = ALIASES.get(event.event, event.event)
    jobs = [_job(each, name, claimed, None) for each in _wanting(handlers, name)]
    for derived, user in _derived(event):
        jobs += [_job(each, derived, claimed, user) for each in _wanting(handlers, derived)]
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
    return [each for each in handlers if is_wanted(each, name)]


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
