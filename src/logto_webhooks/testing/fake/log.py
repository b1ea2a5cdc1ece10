"""Logto's log of deliveries, of any length."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, overload

import msgspec

from logto_webhooks.samples.shapes import Json

T = TypeVar("T")


class MadeUsers(Sequence[T], Generic[T]):
    """`count` items, each made by `make(number)` on access. None is stored."""

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


class Log:
    """The delivery attempts of a webhook."""

    def __init__(self) -> None:
        self._own: list[Json] = []
        self._many: Sequence[Json] = ()

    def hold(self, entries: Sequence[Json]) -> None:
        """Set older entries, in any number, newest first. All must be older than added ones."""
        self._many = entries

    def add(self, entry: Json) -> None:
        """Add an entry."""
        bisect.insort(self._own, entry, key=_get_end)

    def window(self, start: int, end: int) -> Sequence[Json]:
        """Return the entries from `start` until before `end`, newest first. Logto's timestamps have
        microseconds, so an entry that shows `end` is after it."""
        first, last = (bisect.bisect_left(self._own, at, key=_get_end) for at in (start, end))
        newest, oldest = (
            bisect.bisect_right(self._many, -at, key=lambda entry: -_get_end(entry))
            for at in (end, start)
        )
        own, many = self._own[first:last][::-1], self._many
        return MadeUsers(
            len(own) + oldest - newest,
            lambda place: own[place] if place < len(own) else many[newest + place - len(own)],
        )


def entry(
    entry_id: str, payload: Json, ended_at: int, response: Json | None, error: str | None
) -> Json:
    """Make a log entry. Without an error, it is a success. The payload includes `hookId`."""
    key = f"TriggerHook.{payload['event']}"
    attempt: Json = {"key": key, "result": "Error" if error else "Success"}
    attempt |= {"error": error} if error else {}
    attempt |= {"hookId": payload["hookId"]} | ({"response": response} if response else {})
    attempt |= {"hookRequest": {"body": _sort_keys(payload)}}
    return {"id": entry_id, "key": key, "payload": attempt, "createdAt": ended_at}


def log_response(status: int, body: bytes) -> Json:
    """Make the logged form of an answer."""
    try:
        content = msgspec.json.decode(body)
    except msgspec.DecodeError:
        content = body.decode(errors="replace")
    return {"body": content, "statusCode": status}


def _get_end(entry: Json) -> int:
    ended_at: int = entry["createdAt"]
    return ended_at


def _sort_keys(value: Any) -> Any:
    """Sort keys as PostgreSQL's JSONB does: short ones first."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: (len(name.encode()), name))
        return {name: _sort_keys(value[name]) for name in names}
    if isinstance(value, list):
        return [_sort_keys(item) for item in value]
    return value
