"""Turn responses of the Management API into changes of records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from logto_webhooks.deliveries import ReceivedBody
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
    tells it to the second. `total` counts all items of a listing.
    """

    content: Any
    asked_at: int
    took: int
    date: int | None = None
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


def read_span(answered: ApiResponse, recent: Sequence[ReceivedBody]) -> Span:
    """Return the narrowest span that is known.

    A delivery is received after it was sent, so no clock is further ahead of Logto's than the
    least that lies between both; and the header Date is never ahead of Logto's clock.
    """
    bounds = []
    if recent:
        ahead = min(delivery.received_at - delivery.occurred_at for delivery in recent)
        bounds.append(answered.asked_at - ahead)
    if answered.date is not None:
        bounds.append(answered.date - SECOND_MS - answered.took)
    at = max(bounds, default=answered.asked_at)
    if answered.date is not None:  # whatever our clock was when the deliveries came
        at = min(at, answered.date + SECOND_MS)
    at -= 1  # clocks tell whole milliseconds: in the same one, what came first is unknown
    latest = UNKNOWN_MS if answered.date is None else 2 * SECOND_MS
    return Span(at, max(at, at if answered.date is None else answered.date) + latest)


def read_user(user_id: str, content: Any, when: Span) -> Change:
    """Read a user; None is a user that Logto doesn't have. Raises InvalidApiResponse."""
    key = Key("user", user_id)
    if content is None:
        return Absent(key, when.at)
    user = _parsed(content, User, key)
    facts = user_facts(user, when.end)
    return ApiRead(key, user_groups(user), when.at, when.end, facts, _OWN)


def read_organization(organization_id: str, content: Any, when: Span) -> Change:
    """What an organization's answer says; None is one that Logto
    doesn't have. Raises InvalidApiResponse."""
    key = Key("organization", organization_id)
    if content is None:
        return Absent(key, when.at)
    organization = _parsed(content, Organization, key)
    facts = organization_facts(organization, when.end)
    contents = {"own": organization_group(organization)}
    return ApiRead(key, contents, when.at, when.end, facts, _OWN)


def read_pairs(pairs: Iterable[Key], present: Present, when: Span) -> list[Change]:
    """What a full list says of each pair: present with its roles there, if it is in the list."""
    return [
        ApiRead(
            pair,
            {"present": pair in present, ROLES: present.get(pair, {})},
            when.at,
            when.end,
            settles=DOUBTS,
        )
        for pair in pairs
    ]


def read_all_listed(organization_id: str, when: Span) -> Change:
    """That all members of an organization were listed: who wasn't among them was none."""
    key = Key("organization", organization_id)
    return ApiRead(key, {}, when.at, when.end, {}, (MEMBERS, RESTORED))


def all_told(user_id: str, when: Span) -> Change:
    """That all roles and organizations of a user were listed, since a moment."""
    return ApiRead(Key("user", user_id), {}, when.at, when.end, {}, (RESTORED,))


def read_roles(user_id: str, roles: Iterable[Any], when: Span) -> ApiRead:
    """What the list of all of a user's roles says. Raises InvalidApiResponse."""
    key = Key("user", user_id)
    named = {ROLE + role_id: name for role_id, name in _usable(roles).items()}
    return ApiRead(key, {ROLES: None, **named}, when.at, when.end, all_of=ROLE)


def read_role_holders(role: TenantRole, users: Iterable[str], when: Span) -> list[Change]:
    """What a list of users says who have a role."""
    return [
        ApiRead(Key("user", user), {ROLE + role.id: role.name}, when.at, when.end) for user in users
    ]


def pairs_of_user(user_id: str, organizations: Iterable[Any]) -> Present:
    """The memberships that a list of a user's organizations tells of. Raises InvalidApiResponse."""
    key = Key("user", user_id)
    return {
        membership(_id(organization, key), user_id): _roles(organization, key)
        for organization in organizations
    }


def pairs_of_organization(organization_id: str, users: Iterable[Any]) -> Present:
    """The memberships that a list of members tells of. Raises InvalidApiResponse."""
    key = Key("organization", organization_id)
    return {membership(organization_id, _id(user, key)): _roles(user, key) for user in users}


def parse_role(item: Any) -> TenantRole | None:
    """A role of a listing; None for one that users can't have. Raises InvalidApiResponse."""
    role = _role(item, Key("user", "of a listing of roles"))
    return role if role.type == "User" else None


def parse_id(item: Any, kind: Kind) -> str:
    """The id of an item of a listing. Raises InvalidApiResponse."""
    return _id(item, Key(kind, "of a listing"))


def can_be_id(text: str) -> bool:
    """Whether Logto may have a record of this id."""
    try:
        msgspec.convert(text, Id)
    except msgspec.ValidationError:
        return False
    return True


def _id(item: Any, about: Key) -> str:
    try:
        return msgspec.convert(item, _Item).id
    except msgspec.ValidationError:
        problem = "an item without an id that can be used"
        raise InvalidApiResponse(kind=about.kind, id=about.id, problem=problem) from None


def _role(item: Any, about: Key) -> TenantRole:
    return _converted(item, TenantRole, about)


def _roles(item: Any, about: Key) -> dict[str, str]:
    return _usable(_converted(item, _Member, about).organization_roles or [])


def _usable(roles: Iterable[Any]) -> dict[str, str]:
    """The roles of a list, without what is odd in it: that must not keep the others away."""
    found = {}
    for item in roles:
        try:
            role = msgspec.convert(item, TenantRole)
        except msgspec.ValidationError:
            continue
        found[role.id] = role.name
    return found


def _converted(content: Any, cls: type[T], key: Key) -> T:
    try:
        return msgspec.convert(content, cls)
    except msgspec.ValidationError as error:
        raise InvalidApiResponse(kind=key.kind, id=key.id, problem=str(error)) from None


def _parsed(content: Any, cls: type[T], key: Key) -> T:
    parsed = _converted(content, cls, key)
    if _id(content, key) != key.id:
        raise InvalidApiResponse(kind=key.kind, id=key.id, problem="it names another id")
    return parsed
