"""List the members of an organization, with their roles, at Logto."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from logto_webhooks.database.dry_run import run_or_rehearse
from logto_webhooks.database.store import Store, TransactionRunner
from logto_webhooks.errors import InvalidApiResponse
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import Span
from logto_webhooks.logto.clock_skew import SpanClock
from logto_webhooks.logto.pagination import OffsetPager
from logto_webhooks.records.projection import project
from logto_webhooks.records.record import Absent, Change, Key

if TYPE_CHECKING:
    from logto_webhooks.logto.client import ManagementClient

PIECE: Final = 500  # memberships that are written in one transaction
_ALL: Final = 2**31
T = TypeVar("T")


async def member_changes(
    logto: ManagementClient, host: TransactionRunner, organization_id: str, when: SpanClock
) -> Iterator[Sequence[Change]]:
    """What the list says, in pieces for a transaction each; the last makes the list count.

    Whoever is a member here and isn't listed is asked about alone: a list that changes while it
    is read can lack somebody.

    Raises InvalidApiResponse, LogtoUnreachable, LogtoApiError, StoreUnavailable.
    """
    present, span = await _listed(logto, organization_id, when)
    end = Key("organization", organization_id)

    def known_of(store: Store) -> list[Key]:
        return store.keys("membership", _ALL, of=end)

    unlisted = sorted(set(await host.read(known_of)) - present.keys())
    alone = [
        change
        for piece in _cut(unlisted)
        for pair in await _members_here(host, piece)
        for change in await _alone(logto, pair, when)
    ]
    told = api_responses.read_pairs(sorted(present), present, span)
    return iter([*_cut(told), *_cut(alone), [api_responses.read_all_listed(organization_id, span)]])


async def _members_here(host: TransactionRunner, pairs: Sequence[Key]) -> list[Key]:
    """Those that are members here, or may be."""
    known = await run_or_rehearse(host, lambda store: store.lock(pairs), dry=True)
    return [key for key, record in known.items() if project(record) or record.doubts]


async def _alone(logto: ManagementClient, pair: Key, when: SpanClock) -> list[Change]:
    user = pair.organization_and_user[1]
    answered = await logto.organizations_of(user.id)
    if answered.content is None:
        return [Absent(user, when(answered).at)]
    present = api_responses.pairs_of_user(user.id, answered.content)
    return api_responses.read_pairs([pair], present, when(answered))


def _cut(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + PIECE] for start in range(0, len(items), PIECE)]


async def _listed(
    logto: ManagementClient, organization_id: str, when: SpanClock
) -> tuple[api_responses.Present, Span]:
    present: api_responses.Present = {}
    spans: list[Span] = []
    listing = OffsetPager(partial(logto.members, organization_id))
    async for page in listing.pages():
        present |= api_responses.pairs_of_organization(organization_id, page.content)
        spans.append(when(page))
    if listing.missed:
        problem = "its members changed faster than they can be listed"
        raise InvalidApiResponse(kind="organization", id=organization_id, problem=problem)
    return present, Span(spans[0].at, spans[-1].end)
