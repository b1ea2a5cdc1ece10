"""How much fits into one batch: by size, and by the time that earlier batches took."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol, TypeVar

T = TypeVar("T")
MAX_WEIGHT: Final = 5_000
FIRST_WEIGHT: Final = 32
MOST_FIXED: Final = 0.75  # of a batch's time


class Weighted(Protocol):
    """Work with a `weight`: how many changes it makes."""

    @property
    def weight(self) -> int:
        """The amount of work, at least 1."""


W = TypeVar("W", bound=Weighted)


def count_fitting(sizes: Iterable[int], most: int) -> int:
    """Count how many of the first items fit into a batch together. The first one always fits."""
    total = count = 0
    for size in sizes:
        total += size
        if count and total > most:
            break
        count += 1
    return count


def cut_by_size(items: Sequence[T], sizes: Sequence[int], most: int) -> Iterator[Sequence[T]]:
    """Yield the items in batches that fit."""
    place = 0
    while place < len(items):
        end = place + count_fitting(sizes[place:], most)
        yield items[place:end]
        place = end


class BatchSizer:
    """Decides how many changes fit into a transaction of a limited time.

    The time limit is for the changes. What even the smallest transaction takes is estimated from
    batches of different sizes and left out: else batches would get smallest where that is much.
    """

    def __init__(self, budget_s: float, most: int = MAX_WEIGHT) -> None:
        self.budget_s = budget_s
        self._most = most
        self.weight = min(FIRST_WEIGHT, most)
        self._fixed_s = 0.0  # what any transaction takes
        self._last = (0, 0.0)  # the weight of the last batch, and the time that it took

    def cut(self, held: Sequence[W]) -> Sequence[W]:
        """Return the first items that fit, at least one."""
        return held[: count_fitting((work.weight for work in held), self.weight)]

    def adjust(self, weight: int, seconds: float) -> None:
        """Adjust to the time that a batch took. At most double the weight."""
        last_weight, last_s = self._last
        more = weight - last_weight
        if last_weight and abs(more) * 4 >= last_weight:  # else the difference tells little
            fixed_s = seconds - weight * (seconds - last_s) / more
            self._fixed_s = (self._fixed_s + max(0.0, fixed_s)) / 2
        self._fixed_s = min(self._fixed_s, MOST_FIXED * seconds)
        self._last = (weight, seconds)
        fitting = int(weight * self.budget_s / max(seconds - self._fixed_s, 1e-6))
        self.weight = max(1, min(fitting, self.weight * 2, self._most))

    def shrink(self) -> None:
        """Make the next batch as small as possible."""
        self.weight = 1

    def halve(self) -> None:
        """Halve the next batch after a failure."""
        self.weight = max(1, self.weight // 2)
