"""Logto's log of what its webhooks tried to deliver."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import msgspec

from logto_webhooks.samples.shapes import Json


class Log:
    """The attempts of one hook."""

    def __init__(self) -> None:
        self._own: list[Json] = []
        self._many: Sequence[Json] = ()

    def hold(self, many: Sequence[Json]) -> None:
        """Take any number of entries, the newest first, all older than those that are added."""
        self._many = many

    def add(self, entry: Json) -> None:
        """Add an entry."""
        bisect.insort(self._own, entry, key=itemgetter("createdAt"))

    def window(self, start: int, end: int) -> Window:
        """The entries from `start` on and before `end`: Logto counts microseconds, so that what
        it shows as having ended at `end` has ended after."""
        own = self._own
        first, last = (bisect.bisect_left(own, each, key=_ended) for each in (start, end))
        newest, oldest = (
            bisect.bisect_right(self._many, -each, key=lambda entry: -_ended(entry))
            for each in (end, start)
        )
        return Window(own, range(last - 1, first - 1, -1), self._many, range(newest, oldest))


class Window:
    """Some of the entries, the newest first."""

    def __init__(
        self, own: Sequence[Json], own_places: range, many: Sequence[Json], places: range
    ) -> None:
        self._parts = ((own, own_places), (many, places))

    def __len__(self) -> int:
        return sum(len(places) for _, places in self._parts)

    def page(self, offset: int, size: int) -> list[Json]:
        """List some of them."""
        return list(self._page(offset, size))

    def _page(self, offset: int, size: int) -> Iterable[Json]:
        for entries, places in self._parts:
            here = places[offset : offset + size]
            yield from (entries[place] for place in here)
            offset, size = max(0, offset - len(places)), size - len(here)


def entry(
    entry_id: str, payload: Json, ended_at: int, response: Json | None, error: str | None
) -> Json:
    """Make a log entry. Without an error, it is a success. The payload includes `hookId`."""
    key = f"TriggerHook.{payload['event']}"
    told: Json = {"key": key, "result": "Error" if error else "Success"}
    told |= {"error": error} if error else {}
    told |= {"hookId": payload["hookId"]} | ({"response": response} if response else {})
    told |= {"hookRequest": {"body": _as_jsonb(payload)}}
    return {"id": entry_id, "key": key, "payload": told, "createdAt": ended_at}


def response(status: int, body: bytes) -> Json:
    """An answer as it is logged."""
    try:
        content = msgspec.json.decode(body)
    except msgspec.DecodeError:
        content = body.decode(errors="replace")
    return {"body": content, "statusCode": status}


def _ended(entry: Json) -> int:
    ended_at: int = entry["createdAt"]
    return ended_at


def _as_jsonb(value: Any) -> Any:
    """The database's order of keys: the short ones first."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: (len(name.encode()), name))
        return {name: _as_jsonb(value[name]) for name in names}
    if isinstance(value, list):
        return [_as_jsonb(each) for each in value]
    return value
