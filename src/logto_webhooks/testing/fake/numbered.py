"""Any number of users and of log entries, each made from its number when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

from logto_webhooks.samples import shapes
from logto_webhooks.samples.shapes import Json

T = TypeVar("T")


class MadeUsers(Sequence[T], Generic[T]):
    """`count` items of which `make(number)` makes each, and none is kept."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._numbers = range(count)
        self._make = make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._make(number) for number in self._numbers[index]]
        return self._make(self._numbers[index])


class LazyUsers(MadeUsers[Json]):
    """Users `user00000000`, `user00000001`, …, the oldest first, born a millisecond apart."""

    def __init__(self, count: int, born_until: int) -> None:
        super().__init__(count, lambda number: _user(number, born_until - count + number))

    def find(self, user_id: str) -> int | None:
        """The number in an id."""
        digits = user_id.removeprefix("user")
        if digits == user_id or len(digits) != 8 or not digits.isdecimal():
            return None
        number = int(digits)
        return number if number < len(self) else None


def _user(number: int, at: int) -> Json:
    name = f"user{number:08}"
    return shapes.user(name, at, {"primaryEmail": f"{name}@example.com", "name": name})
