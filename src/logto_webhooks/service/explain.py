"""Explaining from a store: all that came about a user or an organization, page by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from logto_webhooks.core import explain as core
from logto_webhooks.core.explain import Explained
from logto_webhooks.core.inbox import Kept
from logto_webhooks.core.ports import Store
from logto_webhooks.core.projection import LAG_MS
from logto_webhooks.core.record import NEVER, Key

_PAGE: Final = 200


def explain(store: Store, subject: Key, lag_ms: int = LAG_MS) -> Explained | None:
    """Explain a user or an organization; None if nothing came about it and nothing is known.

    What comes meanwhile may be told, but credited with nothing yet.
    """
    known = store.inbox.known(subject)
    others = [
        end
        for key, record in known.items()
        if key.kind == "membership" and record.gone_at != NEVER
        for end in key.organization_and_user
        if end != subject
    ]
    found = core.explain(subject, known, _about(store, subject, others), lag_ms)
    return found if found.lines or known else None


def _about(store: Store, subject: Key, others: Sequence[Key]) -> Iterator[Kept]:
    after = 0
    while page := store.inbox.about(subject, others, after, _PAGE):
        yield from page
        after = page[-1].id
