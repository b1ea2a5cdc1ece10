"""Decide how much work fits into one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

MAX_WEIGHT: Final = 5_000
FIRST_WEIGHT: Final = 32


class Weighted(Protocol):
    """What is a number of changes."""

    @property
    def weight(self) -> int:
        """How many changes it is."""


T = TypeVar("T", bound=Weighted)


class BatchSizer:
    """How much fits into the time of a transaction; a delivery weighs what it changes."""

    def __init__(self, budget_s: float, most: int = MAX_WEIGHT, least: int = 1) -> None:
        """`least` fits whatever the time: a transaction costs something even if it is empty."""
        self._budget_s = budget_s
        self._most = most
        self._least = least
        self.weight = min(max(FIRST_WEIGHT, least), most)

    def cut(self, held: Sequence[T]) -> Sequence[T]:
        """Return as many as fit, at least one."""
        weight = fitting = 0
        for each in held:
            weight += each.weight
            if fitting and weight > self.weight:
                break
            fitting += 1
        return held[:fitting]

    def took(self, weight: int, seconds: float) -> None:
        """Learn from a batch; at most double."""
        fitting = int(weight * self._budget_s / max(seconds, 1e-6))
        self.weight = max(self._least, min(fitting, self.weight * 2, self._most))

    def failed(self) -> None:
        """What was too much for the database is less next time."""
        self.weight = max(1, self.weight // 2)
