"""Fetch what Logto says of one user, or of an organization's members, and compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import Struct

from logto_webhooks.apply import batch
from logto_webhooks.database.runner import TransactionRunner, run_or_rehearse
from logto_webhooks.database.store import Store
from logto_webhooks.errors import InvalidApiResponse
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import Present, Span, SpanClock
from logto_webhooks.logto.pagination import OffsetPager
from logto_webhooks.logto.tenant_check import TenantCheck
from logto_webhooks.records.merge import merge
from logto_webhooks.records.projection import Part, child_rows, project
from logto_webhooks.records.record import (
    RESTORED,
    UNKNOWN_CHANGE,
    Absent,
    ApiRead,
    Change,
    Key,
    Record,
    RefetchRequest,
)

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

PIECE: Final = 500  # memberships that are written in one transaction
_ALL: Final = 2**31
_ALL_OF_A_USER: Final = (UNKNOWN_CHANGE, RESTORED)  # the user, and the roles and memberships
T = TypeVar("T")


def find_subject(key: Key) -> Key:
    """Return whom to ask about: of a membership, the user."""
    return key.organization_and_user[1] if key.kind == "membership" else key


async def fetch_user(
    logto: ManagementClient, host: TransactionRunner, user_id: str, when: SpanClock
) -> list[Change]:
    """Fetch a user, with roles and memberships. Raises InvalidApiResponse, LogtoUnreachable,
    LogtoApiError, StoreUnavailable."""
    answered = await logto.user(user_id)
    user = api_responses.read_user(user_id, answered.content, when(answered))
    if answered.content is None:
        return [user]
    return [user, *await fetch_belongings(logto, host, user_id, when)]


async def fetch_belongings(
    logto: ManagementClient, host: TransactionRunner, user_id: str, when: SpanClock
) -> list[Change]:
    """Fetch the roles and memberships of a user. Raises as `fetch_user`."""
    key = Key("user", user_id)
    roles = await fetch_roles(logto, user_id, when)
    organizations = await logto.organizations_of(user_id)
    span = when(organizations)
    if organizations.content is None:  # deleted in the meantime
        return [roles, Absent(key, span.at)]
    present = api_responses.pairs_of_user(user_id, organizations.content)
    pairs = sorted(present.keys() | await _list_known_pairs(host, key))
    settled = api_responses.settle_belongings(user_id, Span(roles.at, span.end))
    return [roles, *api_responses.read_pairs(pairs, present, span), settled]


async def fetch_roles(logto: ManagementClient, user_id: str, when: SpanClock) -> ApiRead:
    """Fetch the roles of a user. Raises InvalidApiResponse, LogtoUnreachable, LogtoApiError."""
    pages = [page async for page in logto.roles_of(user_id)]
    items = [item for page in pages for item in page.content]
    span = Span(when(pages[0]).at, when(pages[-1]).end)
    return api_responses.read_roles(user_id, items, span)


async def fetch_memberships(
    logto: ManagementClient, user_id: str, pairs: Sequence[Key], when: SpanClock
) -> list[Change]:
    """Fetch some memberships of a user. Raises as `fetch_roles`."""
    answered = await logto.organizations_of(user_id)
    if answered.content is None:
        return [Absent(Key("user", user_id), when(answered).at)]
    present = api_responses.pairs_of_user(user_id, answered.content)
    return api_responses.read_pairs(pairs, present, when(answered))


async def fetch_members(
    logto: ManagementClient, host: TransactionRunner, organization_id: str, when: SpanClock
) -> Iterator[Sequence[Change]]:
    """Fetch an organization's members, in pieces for a transaction each; the last makes the list
    count.

    Whoever is a member here and isn't listed is asked about alone: a list that changes while it
    is read can lack somebody. Raises as `fetch_user`.
    """
    present, span = await _list_members(logto, organization_id, when)
    known = await _list_known_pairs(host, Key("organization", organization_id))
    unlisted = [
        change
        for piece in _cut(sorted(known - present.keys()))
        for pair in await _list_present(host, piece)
        for change in await fetch_memberships(logto, find_subject(pair).id, [pair], when)
    ]
    listed = api_responses.read_pairs(sorted(present), present, span)
    settled = api_responses.settle_members(organization_id, span)
    return iter([*_cut(listed), *_cut(unlisted), [settled]])


async def _list_members(
    logto: ManagementClient, organization_id: str, when: SpanClock
) -> tuple[Present, Span]:
    present: Present = {}
    spans: list[Span] = []
    listing = OffsetPager(partial(logto.members, organization_id))
    async for page in listing.pages():
        present |= api_responses.pairs_of_organization(organization_id, page.content)
        spans.append(when(page))
    if listing.missed:
        problem = "its members changed faster than Logto can list them"
        raise InvalidApiResponse(kind="organization", id=organization_id, problem=problem)
    return present, Span(spans[0].at, spans[-1].end)


async def _list_known_pairs(host: TransactionRunner, end: Key) -> set[Key]:
    def find(store: Store) -> list[Key]:
        return store.keys("membership", _ALL, of=end)

    return set(await host.read(find))


async def _list_present(host: TransactionRunner, pairs: Sequence[Key]) -> list[Key]:
    """List those that are members here, or may be."""
    records = await run_or_rehearse(host, lambda store: store.lock(pairs), dry=True)
    return [key for key, record in records.items() if project(record) or record.doubts]


def _cut(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + PIECE] for start in range(0, len(items), PIECE)]


class UserComparison(Struct, frozen=True, kw_only=True):
    """A user in the database and in Logto, by column. A side is None if the user doesn't exist
    there."""

    ours: dict[str, Any] | None
    logto: dict[str, Any] | None
    differ: list[str]


async def compare_and_request_refetch(
    logto: ManagementClient, host: TransactionRunner, user_id: str, when: SpanClock
) -> UserComparison:
    """Compare a user with Logto. Where something differs, note that Logto must be asked again,
    which mends it. Raises as `fetch_user`, and WrongTenant."""
    changes = await fetch_user(logto, host, user_id, when)
    if any(isinstance(change, Absent) for change in changes):
        await TenantCheck(logto, host).ensure_same_tenant(by_records=False)
    keys = sorted({change.key for change in changes} | {Key("user", user_id)})
    records = await run_or_rehearse(host, lambda store: store.lock(keys), dry=True)
    comparison = _compare(records.values(), keys, changes)
    if comparison.differ:
        at = max(change.at for change in changes if isinstance(change, ApiRead | Absent))
        requests = [RefetchRequest(Key("user", user_id), why, at) for why in _ALL_OF_A_USER]
        await host.run(lambda store: batch.apply_reads(store, requests, None))
    return comparison


def _compare(
    records: Iterable[Record], keys: Sequence[Key], changes: Sequence[Change]
) -> UserComparison:
    theirs = {key: Record(key) for key in keys}
    for change in changes:
        theirs[change.key] = merge(theirs[change.key], change)
    ours, logtos = _to_columns(records), _to_columns(theirs.values())
    mine, yours = ours or {}, logtos or {}
    names = (mine.keys() | yours.keys()) - {"updated_at"}
    differ = sorted(name for name in names if mine.get(name) != yours.get(name))
    return UserComparison(ours=ours, logto=logtos, differ=differ)


def _to_columns(records: Iterable[Record]) -> dict[str, Any] | None:
    by_key = {record.key: record for record in records}
    [user] = [record for key, record in by_key.items() if key.kind == "user"]
    row = project(user)
    if row is None or user.deleted_at is not None:
        return None
    memberships = {
        key.organization_and_user[0].id: _name_roles(record, "member_roles")
        for key, record in by_key.items()
        if key.kind == "membership" and project(record)
    }
    return row | {"roles": _name_roles(user, "roles"), "organizations": memberships}


def _name_roles(record: Record, part: Part) -> list[str]:
    return sorted(row["name"] for row in child_rows(record).get(part, []))
