"""Turn responses of the Management API into changes of records, dated by Logto's clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import FUTURE_MS, RECENT, typical_delay
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
PAGE: Final = 100  # items per page, Logto's maximum
DAY_MS: Final = 86_400_000
SECOND_MS: Final = 1000  # the precision of the header Date, which may be as old
UNKNOWN_MS: Final = 5000  # how long after its request an answer without a date may be made
_OWN: Final = (*DOUBTS, UNKNOWN_CHANGE)


class ApiResponse(Struct, frozen=True, kw_only=True):
    """A response of Logto's API. `content` is the decoded JSON; None if the record doesn't exist.

    Times are in milliseconds. `asked_at` and `took` are by our clock, `date` is the Date header, in
    whole seconds of Logto's clock. `asked_after` isn't later than the request, by Logto's clock.
    `total` counts all items of a listing.
    """

    content: Any
    asked_at: int
    took: int
    date: int | None = None
    asked_after: int | None = None
    total: int | None = None


class TenantRole(Struct, frozen=True):
    """A role. Users can have only roles of type "User"."""

    id: Id
    name: str
    type: str = "User"


class _Item(Struct):
    id: Id


class _Member(Struct, rename="camel"):
    organization_roles: list[Any] | None = None


Present = dict[Key, dict[str, str]]  # membership -> its roles there, id -> name


class Span(NamedTuple):
    """When an answer was true: requested no earlier than `at`, answered by `end` (Logto's clock,
    ms)."""

    at: int
    end: int


def read_span(answered: ApiResponse, delay: int | None) -> Span:
    """Return a span in which the answer was true; `delay` is the `typical_delay` of deliveries.

    If a span begins too late, changes after the answer count as older. If it ends too early, the
    answer counts as older than it is. Too long a span only costs more requests. So there are two
    independent bounds, the dates of Logto's answers and our clock less the delay, and the wider one
    counts. Without deliveries, each gets a margin of a second. A date far in the future is wrong:
    each later change of the record would be in doubt until then.
    """
    ours = answered.asked_at - (delay or 0)
    if answered.date is None:
        at = ours - SECOND_MS - 1
        return Span(at, at + UNKNOWN_MS)
    dated = answered.asked_after or answered.date - answered.took
    # Clocks count whole milliseconds. Within one, the order is unknown.
    at = min(ours, dated) - (SECOND_MS if delay is None else 0) - 1
    latest = ours + answered.took + (DAY_MS if delay is None else FUTURE_MS)
    return Span(at, min(max(ours + answered.took, answered.date), latest) + 2 * SECOND_MS)


SpanClock = Callable[[ApiResponse], Span]


async def make_span_clock(host: TransactionRunner) -> SpanClock:
    """Return a function that returns an answer's span. Raises StoreUnavailable.

    Each answer is dated separately: a listing requests its next page early, so answers aren't
    handled in the order of their requests.
    """
    return await host.read(read_span_clock)


def read_span_clock(store: Store) -> SpanClock:
    """The same in a transaction."""
    return partial(read_span, delay=typical_delay(store.clocks(RECENT)))


def read_user(user_id: str, content: Any, when: Span) -> Change:
    """Read a user. None means that Logto doesn't have the user. Raises InvalidApiResponse."""
    key = Key("user", user_id)
    if content is None:
        return Absent(key, *when)
    user = _parse(content, User, key)
    return ApiRead(key, user_groups(user), when.at, when.end, user_facts(user, when.end), _OWN)


def read_organization(organization_id: str, content: Any, when: Span) -> Change:
    """Read an organization. None means that Logto doesn't have it. Raises InvalidApiResponse."""
    key = Key("organization", organization_id)
    if content is None:
        return Absent(key, *when)
    organization = _parse(content, Organization, key)
    facts = organization_facts(organization, when.end)
    contents = {"own": organization_group(organization)}
    return ApiRead(key, contents, when.at, when.end, facts, _OWN)


def read_pairs(pairs: Iterable[Key], present: Present, when: Span) -> list[Change]:
    """Read each pair from a full list: it is present, with its roles, if it is in the list."""
    contents = {pair: {"present": pair in present, ROLES: present.get(pair, {})} for pair in pairs}
    return [
        ApiRead(pair, content, when.at, when.end, settles=DOUBTS)
        for pair, content in contents.items()
    ]


def settle_members(organization_id: str, when: Span) -> Change:
    """Note that all members of an organization were listed, so users who weren't are none."""
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
    """Read a role. Return None for one that users can't have. Raises InvalidApiResponse."""
    role = _convert(item, TenantRole, Key("user", "of a listing of roles"))
    return role if role.type == "User" else None


def parse_id(item: Any, kind: Kind) -> str:
    """Read the id of an item of a listing. Raises InvalidApiResponse."""
    return _read_id(item, Key(kind, "of a listing"))


def can_be_id(text: str) -> bool:
    """Whether a record of Logto can have this id."""
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
    """Return names of roles by id, without invalid items, because the others are still usable."""
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
