"""Fetch a user, or an organization and its members, from Logto, and compare."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from msgspec import Struct

from logto_webhooks.apply import batch
from logto_webhooks.canonical_json import is_equal
from logto_webhooks.database.runner import TransactionRunner, run_or_rehearse
from logto_webhooks.database.store import Store
from logto_webhooks.errors import InvalidApiResponse
from logto_webhooks.event_loop import run_in_thread
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

PIECE: Final = 500  # memberships per transaction
SORTED: Final = 5_000  # keys that are sorted at once: nothing else runs meanwhile
MOST_SINGLE: Final = 50  # members who are fetched one by one
_ALL_OF_A_USER: Final = (UNKNOWN_CHANGE, RESTORED)  # the user itself, and the roles and memberships
T = TypeVar("T")


def find_subject(key: Key) -> Key:
    """Return the record to fetch: for a membership, its user."""
    return key.organization_and_user[1] if key.kind == "membership" else key


class MemberList(NamedTuple):
    """A complete list of an organization's members. One page is of one moment."""

    organization_id: str
    present: Present
    span: Span
    pages: int

    def read(self, pairs: Iterable[Key]) -> Iterator[Sequence[Change]]:
        """Return what the list says about memberships, in pieces, each made when it is needed."""
        return (
            api_responses.read_pairs(piece, self.present, self.span) for piece in _cut(pairs, PIECE)
        )


class Fetcher:
    """Fetches one subject from Logto, and reads the answers as changes of records.

    All methods raise InvalidApiResponse, LogtoUnreachable, LogtoApiError, StoreUnavailable.
    """

    def __init__(self, logto: ManagementClient, host: TransactionRunner, when: SpanClock) -> None:
        self._logto = logto
        self._host = host
        self._when = when

    async def fetch_user(self, user_id: str) -> AsyncIterator[Sequence[Change]]:
        """Fetch a user, with roles and memberships, in pieces of a transaction each."""
        changes: Iterable[Change] = [await self.fetch_user_alone(user_id)]
        if not any(isinstance(user, Absent) for user in changes):
            changes = itertools.chain(changes, await self._fetch_belongings(user_id))
        for piece in _cut(changes, PIECE):
            yield piece

    async def fetch_user_alone(self, user_id: str) -> Change:
        """Fetch a user, without roles and memberships."""
        answered = await self._logto.user(user_id)
        span = self._when(answered)
        # In a thread, because a user's data may be large.
        return await run_in_thread(api_responses.read_user, user_id, answered.content, span)

    async def fetch_organization(self, organization_id: str) -> Change:
        """Fetch an organization, without members."""
        answered = await self._logto.organization(organization_id)
        span = self._when(answered)
        return await run_in_thread(
            api_responses.read_organization, organization_id, answered.content, span
        )

    async def fetch_belongings(self, user_id: str) -> AsyncIterator[Sequence[Change]]:
        """Fetch the roles and memberships of a user, in pieces of a transaction each. The last one
        marks them as complete."""
        for piece in _cut(await self._fetch_belongings(user_id), PIECE):
            yield piece

    async def _fetch_belongings(self, user_id: str) -> Iterable[Change]:
        key = Key("user", user_id)
        roles = await self.fetch_roles(user_id)
        organizations = await self._logto.organizations_of(user_id)
        span = self._when(organizations)
        if organizations.content is None:  # deleted in the meantime
            return [roles, Absent(key, *span)]
        present = api_responses.pairs_of_user(user_id, organizations.content)
        known = {pair async for page in self._list_known_pairs(key) for pair in page}
        pairs = await run_in_thread(_sort, present.keys() | known)
        pieces = (api_responses.read_pairs(piece, present, span) for piece in _cut(pairs, PIECE))
        settled = api_responses.settle_belongings(user_id, Span(roles.at, span.end))
        return itertools.chain([roles], itertools.chain.from_iterable(pieces), [settled])

    async def fetch_roles(self, user_id: str) -> ApiRead:
        """Fetch the roles of a user."""
        pages = [page async for page in self._logto.roles_of(user_id)]
        items = [item for page in pages for item in page.content]
        span = Span(self._when(pages[0]).at, self._when(pages[-1]).end)
        return api_responses.read_roles(user_id, items, span)

    async def fetch_memberships(self, user_id: str, pairs: Sequence[Key]) -> list[Change]:
        """Fetch some memberships of a user."""
        answered = await self._logto.organizations_of(user_id)
        span = self._when(answered)
        if answered.content is None:
            return [Absent(Key("user", user_id), *span)]
        present = api_responses.pairs_of_user(user_id, answered.content)
        return api_responses.read_pairs(pairs, present, span)

    async def fetch_members(self, organization_id: str) -> AsyncIterator[Sequence[Change]]:
        """Fetch an organization's members, in pieces of a transaction each. The last piece marks
        the list as complete.

        Stored members who aren't listed are fetched, too, because a list of several pages that
        changes while it is read can lack some. A delivery that is older than the list can add them
        meanwhile.
        """
        members = await self._list_members(organization_id)
        for piece in members.read(await run_in_thread(_sort, members.present)):
            yield piece
        fetched = set(members.present)
        async for piece in self._fetch_all_unlisted(fetched, members):
            yield piece
        yield [api_responses.settle_members(organization_id, members.span)]
        # Transactions that began before that may have added some since the last look.
        async for piece in self._fetch_all_unlisted(fetched, members):
            yield piece

    async def _fetch_all_unlisted(
        self, fetched: set[Key], members: MemberList
    ) -> AsyncIterator[Sequence[Change]]:
        """Fetch stored members who weren't `fetched`, until there are none; add them to it."""
        while unlisted := await self._list_members_except(fetched, members.organization_id):
            async for piece in self._fetch_unlisted(unlisted, members):
                yield piece
            fetched.update(unlisted)

    async def _fetch_unlisted(
        self, pairs: Sequence[Key], members: MemberList
    ) -> AsyncIterator[Sequence[Change]]:
        """Fetch stored members whom a list lacks: one by one, or with another list if they are
        many. No member is on the wrong side of a page in both."""
        if members.pages > 1 and len(pairs) > MOST_SINGLE:
            members = await self._list_members(members.organization_id)
        elif members.pages > 1:
            for pair in pairs:
                yield await self.fetch_memberships(find_subject(pair).id, [pair])
            return
        for piece in members.read(pairs):
            yield piece

    async def _list_members_except(self, fetched: set[Key], organization_id: str) -> list[Key]:
        """List the stored members of an organization that weren't fetched."""
        organization = Key("organization", organization_id)
        pages = self._list_known_pairs(organization, current=True)
        return [pair async for page in pages for pair in page if pair not in fetched]

    async def _list_members(self, organization_id: str) -> MemberList:
        present: Present = {}
        spans: list[Span] = []
        listing = OffsetPager(partial(self._logto.members, organization_id))
        async for page in listing.pages():
            present |= api_responses.pairs_of_organization(organization_id, page.content)
            spans.append(self._when(page))
        if listing.missed:
            problem = "its members changed faster than Logto can list them"
            raise InvalidApiResponse(kind="organization", id=organization_id, problem=problem)
        span = Span(spans[0].at, spans[-1].end)
        return MemberList(organization_id, present, span, len(spans))

    async def _list_known_pairs(
        self, end: Key, current: bool = False
    ) -> AsyncIterator[Sequence[Key]]:
        """List the stored memberships of a user or an organization; with `current`, only those that
        are present, or may be."""
        after: str | None = ""
        while after is not None:
            find = partial(Store.memberships_of, end=end, after=after, current=current)
            pairs, after = await self._host.read(find)
            yield pairs


def _cut(items: Iterable[T], size: int) -> Iterator[Sequence[T]]:
    """Cut into pieces. The items of a piece are made when it is needed."""
    rest = iter(items)
    while piece := list(itertools.islice(rest, size)):
        yield piece


def _sort(keys: Iterable[Key]) -> Iterator[Key]:
    """Sort part by part, because other threads wait while Python sorts."""
    return heapq.merge(*[sorted(part) for part in _cut(keys, SORTED)])


class UserComparison(Struct, frozen=True, kw_only=True):
    """A user in the database and in Logto, by column. A side is None if the user doesn't exist
    there."""

    ours: dict[str, Any] | None
    logto: dict[str, Any] | None
    differ: list[str]


async def compare_and_request_refetch(
    logto: ManagementClient, host: TransactionRunner, user_id: str, when: SpanClock
) -> UserComparison:
    """Compare a user with Logto. If something differs, request a refetch, which corrects it. Raises
    what `Fetcher` raises, and WrongTenant."""
    pieces = Fetcher(logto, host, when).fetch_user(user_id)
    changes = [change async for piece in pieces for change in piece]
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
    differ = sorted(name for name in names if not is_equal(mine.get(name), yours.get(name)))
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
