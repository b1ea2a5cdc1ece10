"""All members of an organization with their roles there, as Logto lists them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from logto_webhooks.core import answers
from logto_webhooks.core.answers import Span
from logto_webhooks.core.ports import Host, Logto, Store
from logto_webhooks.core.record import Change, Key
from logto_webhooks.errors import AnswerMalformed
from logto_webhooks.service.clocks import When
from logto_webhooks.service.listing import Listing

PIECE: Final = 500  # memberships that are written in one transaction
_ALL: Final = 2**31


async def changes(
    logto: Logto, host: Host, organization_id: str, when: When
) -> Iterator[list[Change]]:
    """What the list says, in pieces for a transaction each; the last makes the list count.

    Raises AnswerMalformed, LogtoUnreachable, LogtoRefused, StoreUnavailable.
    """
    present, span = await _listed(logto, organization_id, when)
    end = Key("organization", organization_id)

    def known_of(store: Store) -> list[Key]:
        return store.keys("membership", _ALL, of=end)

    known = await host.read(known_of)
    pairs = answers.about_pairs(sorted(present.keys() | known), present, span)
    pieces = [pairs[start : start + PIECE] for start in range(0, len(pairs), PIECE)]
    return iter([*pieces, [answers.all_listed(organization_id, span)]])


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
