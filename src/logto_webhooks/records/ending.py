"""What is left to do where a user or an organization with very many memberships was deleted."""

from __future__ import annotations

from msgspec import Struct

from logto_webhooks.records.record import Key


class Ending(Struct, frozen=True, kw_only=True):
    """A deleted user or organization whose memberships are ended step by step.

    Those that are no newer than `ended_at` (Logto's clock, ms) are over. `source` and
    `delivery_id` are what handlers get as the origin; without a `source` no handler runs.
    """

    key: Key
    ended_at: int
    source: str | None = None
    delivery_id: int | None = None
