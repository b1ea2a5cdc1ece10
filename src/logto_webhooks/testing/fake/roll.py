"""Users in the order of Logto's listing: a few that change, before many that are made on demand."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from logto_webhooks.samples.shapes import Json
from logto_webhooks.testing.fake.numbered import LazyUsers


class UserTable:
    """All users. `page` lists them as Logto does, the newest first."""

    def __init__(self) -> None:
        self._own: dict[str, Json] = {}
        self._order: list[tuple[int, int, str]] = []
        self._added = 0
        self._many: Sequence[Json] = ()
        self._numbers: dict[str, int] | None = None
        self._changed: dict[int, Json] = {}
        self._gone: list[int] = []

    def __len__(self) -> int:
        return len(self._own) + len(self._many) - len(self._gone)

    def hold(self, many: Sequence[Json]) -> None:
        """Take any number of users, the oldest first, all older than those that are added."""
        self._many, self._numbers = many, None
        self._changed, self._gone = {}, []

    def add(self, user: Json) -> None:
        """Add a user."""
        self._added += 1
        self._own[user["id"]] = user
        bisect.insort(self._order, (user["createdAt"], self._added, user["id"]))

    def get(self, user_id: str) -> Json | None:
        """Find a user."""
        if user_id in self._own:
            return self._own[user_id]
        number = self._number(user_id)
        return None if number is None else self._at(number)

    def put(self, user: Json) -> None:
        """Replace a user by a newer version. Raises KeyError."""
        number = self._number(user["id"])
        if user["id"] in self._own:
            self._own[user["id"]] = user
        elif number is not None:
            self._changed[number] = user
        else:
            raise KeyError(user["id"])

    def drop(self, user_id: str) -> None:
        """Take a user out. Raises KeyError."""
        number = self._number(user_id)
        if user_id in self._own:
            del self._own[user_id]
            self._order = [each for each in self._order if each[2] != user_id]
        elif number is not None:
            bisect.insort(self._gone, number)
        else:
            raise KeyError(user_id)

    def page(self, offset: int, size: int) -> list[Json]:
        """List some users, the newest first."""
        return list(self._newest(range(offset, min(offset + size, len(self)))))

    def _newest(self, places: range) -> Iterable[Json]:
        own = len(self._order)
        for place in places:
            if place < own:
                yield self._own[self._order[own - 1 - place][2]]
            else:
                yield self._at(self._live(len(self) - 1 - place))

    def _live(self, place: int) -> int:
        """The number of the one at a place among those of the many that are left."""
        number = place
        while number != (shifted := place + bisect.bisect_right(self._gone, number)):
            number = shifted
        return number

    def _at(self, number: int) -> Json:
        return self._changed.get(number) or self._many[number]

    def _number(self, user_id: str) -> int | None:
        number = self._find(user_id)
        return None if number is None or number in self._gone else number

    def _find(self, user_id: str) -> int | None:
        if isinstance(self._many, LazyUsers):
            return self._many.find(user_id)
        if self._numbers is None:
            self._numbers = {user["id"]: number for number, user in enumerate(self._many)}
        return self._numbers.get(user_id)
