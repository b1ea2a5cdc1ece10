"""All members of an organization, as Logto lists them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from logto_webhooks.core import answers
from logto_webhooks.core.answers import Span
from logto_webhooks.core.ports import Host, Logto, Store
from logto_webhooks.core.record import Change, Key
from logto_webhooks.errors import AnswerMalformed
from logto_webhooks.service.clocks import When

PIECE: Final = 500  # memberships that are written in one transaction
LISTINGS: Final = 3  # tries at a list that changes while it is read
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
    pairs = answers.about_pairs(sorted(present.union(known)), present, span)
    pieces = [pairs[start : start + PIECE] for start in range(0, len(pairs), PIECE)]
    return iter([*pieces, [answers.all_listed(organization_id, span)]])


async def _listed(logto: Logto, organization_id: str, when: When) -> tuple[set[Key], Span]:
    for _ in range(LISTINGS):
        pages = [page async for page in logto.members(organization_id)]
        items: list[Any] = [item for page in pages for item in page.content]
        present = answers.pairs_of_organization(organization_id, items)
        if {page.total for page in pages} == {len(present)}:
            return present, Span(when(pages[0]).at, when(pages[-1]).end)
    problem = "its members change faster than they can be listed"
    raise AnswerMalformed(kind="organization", id=organization_id, problem=problem)
