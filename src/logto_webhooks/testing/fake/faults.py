"""What goes wrong, and how often."""

from __future__ import annotations

from random import Random
from typing import Final

from msgspec import Struct

REORDERED_BY: Final = 10


class Faults(Struct, frozen=True, kw_only=True):
    """Probabilities from 0 to 1, drawn for each delivery as it is queued, and for each API answer.

    Deliveries: `lost` ones fail and are logged as failed; `silent` ones are neither sent nor
    logged; `doubled` ones are sent twice; `reordered` ones are sent after up to ten others that
    wait with them; `delay_ms` is the shortest and the longest delay. The API: `status_429`, with
    `retry_after_s` for `Retry-After`, `status_500`, and `slow_ms` before each answer.
    """

    lost: float = 0.0
    silent: float = 0.0
    doubled: float = 0.0
    reordered: float = 0.0
    delay_ms: tuple[int, int] = (0, 0)
    status_429: float = 0.0
    status_500: float = 0.0
    retry_after_s: int | None = None
    slow_ms: int = 0


class Fate(Struct, frozen=True):
    """What was drawn for one webhook."""

    lost: bool
    silent: bool
    doubled: bool
    behind: float
    delay_ms: int


def draw(faults: Faults, rng: Random) -> Fate:
    """Decide a webhook's fate; each takes equally many numbers, whatever the faults."""
    lost, silent, doubled, reordered, behind, delay = (rng.random() for _ in range(6))
    shortest, longest = faults.delay_ms
    return Fate(
        lost=lost < faults.lost,
        silent=silent < faults.silent,
        doubled=doubled < faults.doubled,
        behind=behind * REORDERED_BY if reordered < faults.reordered else 0.0,
        delay_ms=round(shortest + delay * (longest - shortest)),
    )
