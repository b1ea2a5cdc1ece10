"""All members of an organization with their roles there, as Logto lists them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, TypeVar

from logto_webhooks.core import answers
from logto_webhooks.core.answers import Span
from logto_webhooks.core.mirror import row_of
from logto_webhooks.core.ports import Host, Logto, Store
from logto_webhooks.core.record import Absent, Change, Key
from logto_webhooks.errors import AnswerMalformed
from logto_webhooks.service.clocks import When
from logto_webhooks.service.listing import Listing
from logto_webhooks.service.rehearse import perform

PIECE: Final = 500  # memberships that are written in one transaction
_ALL: Final = 2**31
T = TypeVar("T")


async def changes(
    logto: Logto, host: Host, organization_id: str, when: When
) -> Iterator[Sequence[Change]]:
    """What the list says, in pieces for a transaction each; the last makes the list count.

    Whoever is a member here and isn't listed is asked about alone: a list that changes while it
    is read can lack somebody.

    Raises AnswerMalformed, LogtoUnreachable, LogtoRefused, StoreUnavailable.
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
    told = answers.about_pairs(sorted(present), present, span)
    return iter([*_cut(told), *_cut(alone), [answers.all_listed(organization_id, span)]])


async def _members_here(host: Host, pairs: Sequence[Key]) -> list[Key]:
    """Those that are members here, or may be."""
    known = await perform(host, lambda store: store.lock(pairs), dry=True)
    return [key for key, record in known.items() if row_of(record) or record.doubts]


async def _alone(logto: Logto, pair: Key, when: When) -> list[Change]:
    user = pair.organization_and_user[1]
    answered = await logto.organizations_of(user.id)
    if answered.content is None:
        return [Absent(user, when(answered).at)]
    present = answers.pairs_of_user(user.id, answered.content)
    return answers.about_pairs([pair], present, when(answered))


def _cut(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + PIECE] for start in range(0, len(items), PIECE)]


async def _listed(logto: Logto, organization_id: str, when: When) -> tuple[answers.Present, Span]:
    present: answers.Present = {}
    spans: list[Span] = []
    listing = Listing(partial(logto.members, organization_id))
    async for page in listing.pages():
        present |= answers.pairs_of_organization(organization_id, page.content)
        spans.append(when(page))
    if listing.missed:
        problem = "its members changed faster than they can be listed"
        raise AnswerMalformed(kind="organization", id=organization_id, problem=problem)
    return present, Span(spans[0].at, spans[-1].end)
