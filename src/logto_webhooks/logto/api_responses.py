"""Turn responses of the Management API into changes of records, placed on Logto's clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.deliveries import RECENT, typical_delay
from logto_webhooks.errors import InvalidApiResponse
from logto_webhooks.events.base import Id
from logto_webhooks.events.organizations import Organization
from logto_webhooks.events.users import User
from logto_webhooks.records.changes import (
    organization_facts,
    organization_group,
    user_facts,
    user_groups,
)
from logto_webhooks.records.record import (
    DOUBTS,
    MEMBERS,
    RESTORED,
    ROLE,
    ROLES,
    UNKNOWN_CHANGE,
    Absent,
    ApiRead,
    Change,
    Key,
    Kind,
    membership,
)

T = TypeVar("T")
PAGE: Final = 100  # items of a listing that come at once, Logto's most
SECOND_MS: Final = 1000  # the header Date tells no less, and may be as old
UNKNOWN_MS: Final = 5000  # how far beyond its question an answer without a date may reach
_OWN: Final = (*DOUBTS, UNKNOWN_CHANGE)


class ApiResponse(Struct, frozen=True, kw_only=True):
    """What Logto's API answered: `content` is decoded JSON, None where there is no such thing.

    Times in milliseconds: `asked_at` and `took` by our clock, `date` by Logto's, as its header
    tells it to the second; `asked_after` is no later than when it was asked, by Logto's clock.
    `total` counts all items of a listing.
    """

    content: Any
    asked_at: int
    took: int
    date: int | None = None
    asked_after: int | None = None
    total: int | None = None


class TenantRole(Struct, frozen=True):
    """A role; only of type "User" can users have it."""

    id: Id
    name: str
    type: str = "User"


class _Item(Struct):
    id: Id


class _Member(Struct, rename="camel"):
    organization_roles: list[Any] | None = None


Present = dict[Key, dict[str, str]]  # membership -> its roles there, id -> name


class Span(NamedTuple):
    """When an answer was true: asked no earlier than `at`, answered by `end`; Logto's clock, ms."""

    at: int
    end: int


def read_span(answered: ApiResponse, delay: int | None) -> Span:
    """Return a span in which the answer was true; `delay` is the `typical_delay` of deliveries.

    What begins too late makes changes that came after the answer count as older; what ends too
    early makes the answer count as older than it is. Too long a span only costs more questions.
    So there are two independent bounds, the dates of Logto's answers and our clock less the
    delay, and the wider one counts. Without deliveries, a second is left at each.
    """
    ours = answered.asked_at - (delay or 0)
    if answered.date is None:
        at = ours - SECOND_MS - 1
        return Span(at, at + UNKNOWN_MS)
    dated = answered.asked_after or answered.date - answered.took
    # Clocks tell whole milliseconds: in the same one, what came first is unknown.
    at = min(ours, dated) - (SECOND_MS if delay is None else 0) - 1
    return Span(at, max(ours + answered.took, answered.date) + 2 * SECOND_MS)


SpanClock = Callable[[ApiResponse], Span]


async def make_span_clock(host: TransactionRunner) -> SpanClock:
    """Return a function that tells an answer's span. Raises StoreUnavailable.

    Each answer is dated by itself: a listing asks for its next page early, so answers are not
    looked at in the order in which they were asked for.
    """
    clocks = await host.read(lambda store: store.clocks(RECENT))
    return partial(read_span, delay=typical_delay(clocks))


def read_user(user_id: str, content: Any, when: Span) -> Change:
    """Read a user; None is a user that Logto doesn't have. Raises InvalidApiResponse."""
    key = Key("user", user_id)
    if content is None:
        return Absent(key, *when)
    user = _parse(content, User, key)
    return ApiRead(key, user_groups(user), when.at, when.end, user_facts(user, when.end), _OWN)


def read_organization(organization_id: str, content: Any, when: Span) -> Change:
    """Read an organization; None is one that Logto doesn't have. Raises InvalidApiResponse."""
    key = Key("organization", organization_id)
    if content is None:
        return Absent(key, *when)
    organization = _parse(content, Organization, key)
    facts = organization_facts(organization, when.end)
    contents = {"own": organization_group(organization)}
    return ApiRead(key, contents, when.at, when.end, facts, _OWN)


def read_pairs(pairs: Iterable[Key], present: Present, when: Span) -> list[Change]:
    """Read a full list as to each pair: present with its roles there, if it is in the list."""
    contents = {pair: {"present": pair in present, ROLES: present.get(pair, {})} for pair in pairs}
    return [
        ApiRead(pair, content, when.at, when.end, settles=DOUBTS)
        for pair, content in contents.items()
    ]


def settle_members(organization_id: str, when: Span) -> Change:
    """Note that all members of an organization were listed: who wasn't among them was none."""
    key = Key("organization", organization_id)
    return ApiRead(key, {}, when.at, when.end, {}, (MEMBERS, RESTORED))


def settle_belongings(user_id: str, when: Span) -> Change:
    """Note that all roles and organizations of a user were listed."""
    return ApiRead(Key("user", user_id), {}, when.at, when.end, {}, (RESTORED,))


def read_roles(user_id: str, roles: Iterable[Any], when: Span) -> ApiRead:
    """Read the list of all of a user's roles. Raises InvalidApiResponse."""
    key = Key("user", user_id)
    named = {ROLE + role_id: name for role_id, name in _name_roles(roles).items()}
    return ApiRead(key, {ROLES: None, **named}, when.at, when.end, all_of=ROLE)


def read_role_holders(role: TenantRole, users: Iterable[str], when: Span) -> list[Change]:
    """Read a list of users who have a role."""
    return [
        ApiRead(Key("user", user), {ROLE + role.id: role.name}, when.at, when.end) for user in users
    ]


def pairs_of_user(user_id: str, organizations: Iterable[Any]) -> Present:
    """Read the memberships in a list of a user's organizations. Raises InvalidApiResponse."""
    key = Key("user", user_id)
    return {
        membership(_read_id(organization, key), user_id): _read_member_roles(organization, key)
        for organization in organizations
    }


def pairs_of_organization(organization_id: str, users: Iterable[Any]) -> Present:
    """Read the memberships in a list of members. Raises InvalidApiResponse."""
    key = Key("organization", organization_id)
    return {
        membership(organization_id, _read_id(user, key)): _read_member_roles(user, key)
        for user in users
    }


def parse_role(item: Any) -> TenantRole | None:
    """Read a role; None for one that users can't have. Raises InvalidApiResponse."""
    role = _convert(item, TenantRole, Key("user", "of a listing of roles"))
    return role if role.type == "User" else None


def parse_id(item: Any, kind: Kind) -> str:
    """Read the id of an item of a listing. Raises InvalidApiResponse."""
    return _read_id(item, Key(kind, "of a listing"))


def can_be_id(text: str) -> bool:
    """Whether Logto may have a record of this id."""
    try:
        msgspec.convert(text, Id)
    except msgspec.ValidationError:
        return False
    return True


def _read_id(item: Any, about: Key) -> str:
    try:
        return msgspec.convert(item, _Item).id
    except msgspec.ValidationError:
        problem = "an item has no valid id"
        raise InvalidApiResponse(kind=about.kind, id=about.id, problem=problem) from None


def _read_member_roles(item: Any, about: Key) -> dict[str, str]:
    return _name_roles(_convert(item, _Member, about).organization_roles or [])


def _name_roles(items: Iterable[Any]) -> dict[str, str]:
    """Return names of roles by id, without odd items: they must not keep the others away."""
    names = {}
    for item in items:
        with suppress(msgspec.ValidationError):
            role = msgspec.convert(item, TenantRole)
            names[role.id] = role.name
    return names


def _convert(content: Any, cls: type[T], key: Key) -> T:
    try:
        return msgspec.convert(content, cls)
    except msgspec.ValidationError as error:
        raise InvalidApiResponse(kind=key.kind, id=key.id, problem=str(error)) from None


def _parse(content: Any, cls: type[T], key: Key) -> T:
    parsed = _convert(content, cls, key)
    if _read_id(content, key) != key.id:
        raise InvalidApiResponse(kind=key.kind, id=key.id, problem="it has another id")
    return parsed
