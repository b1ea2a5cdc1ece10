"""One person, as Logto knows it now: the record, the roles, the organizations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from msgspec import Struct

from logto_webhooks.core import answers
from logto_webhooks.core.answers import Span
from logto_webhooks.core.merge import merge
from logto_webhooks.core.mirror import Part, parts_of, row_of
from logto_webhooks.core.ports import Host, Logto, Store
from logto_webhooks.core.record import Absent, Change, Key, Read, Record
from logto_webhooks.service.clocks import When
from logto_webhooks.service.rehearse import perform

_ALL: Final = 2**31


class Sides(Struct, frozen=True, kw_only=True):
    """Somebody here and at Logto, by column; None where there is nobody (any more)."""

    ours: dict[str, Any] | None
    logto: dict[str, Any] | None
    differ: list[str]


async def roles_of(logto: Logto, user_id: str, when: When) -> Read:
    """What the list of a user's roles says. Raises AnswerMalformed, LogtoUnreachable,
    LogtoRefused."""
    pages = [page async for page in logto.roles_of(user_id)]
    items = [item for page in pages for item in page.content]
    span = Span(when(pages[0]).at, when(pages[-1]).end)
    return answers.about_roles(user_id, items, span)


async def changes(logto: Logto, host: Host, user_id: str, when: When) -> list[Change]:
    """Ask all about one user. Raises AnswerMalformed, LogtoUnreachable, LogtoRefused,
    StoreUnavailable."""
    answered = await logto.user(user_id)
    user = answers.about_user(user_id, answered.content, when(answered))
    if answered.content is None:
        return [user]
    return [user, *await belongings(logto, host, user_id, when)]


async def belongings(logto: Logto, host: Host, user_id: str, when: When) -> list[Change]:
    """Ask which roles and memberships a user has. Raises as `changes`."""
    key = Key("user", user_id)
    roles = await roles_of(logto, user_id, when)
    organizations = await logto.organizations_of(user_id)
    span = when(organizations)
    if organizations.content is None:  # deleted in the meantime
        return [roles, Absent(key, span.at)]
    present = answers.pairs_of_user(user_id, organizations.content)

    def known_of(store: Store) -> list[Key]:
        return store.keys("membership", _ALL, of=key)

    pairs = sorted(present.keys() | await host.read(known_of))
    all_told = answers.all_told(user_id, Span(roles.at, span.end))
    return [roles, *answers.about_pairs(pairs, present, span), all_told]


async def both_sides(logto: Logto, host: Host, user_id: str, when: When) -> Sides:
    """Compare, and change nothing. Raises as `changes`."""
    told = await changes(logto, host, user_id, when)
    keys = sorted({change.key for change in told} | {Key("user", user_id)})
    known = await perform(host, lambda store: store.lock(keys), dry=True)
    theirs = {key: Record(key) for key in keys}
    for change in told:
        theirs[change.key] = merge(theirs[change.key], change)
    ours, logtos = _shown(known.values()), _shown(theirs.values())
    names = (ours or {}).keys() | (logtos or {}).keys()
    both = (ours or {}, logtos or {})
    differ = sorted(name for name in names if both[0].get(name) != both[1].get(name))
    return Sides(ours=ours, logto=logtos, differ=[each for each in differ if each != "updated_at"])


def _shown(known: Iterable[Record]) -> dict[str, Any] | None:
    records = list(known)
    [user] = [record for record in records if record.key.kind == "user"]
    row = row_of(user)
    if row is None or user.deleted_at is not None:
        return None
    memberships: dict[str, list[str]] = {}
    for record in records:
        if record.key.kind == "membership" and row_of(record):
            organization = record.key.organization_and_user[0].id
            memberships[organization] = _names(record, "member_roles")
    return row | {"roles": _names(user, "roles"), "organizations": memberships}


def _names(record: Record, part: Part) -> list[str]:
    return sorted(each["name"] for each in parts_of(record).get(part, []))
