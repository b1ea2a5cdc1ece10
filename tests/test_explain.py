"""A record's life, told: who set what it has, by which call, and what came too late."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from logto_webhooks.core.credit import Field
from logto_webhooks.core.events.base import to_millis
from logto_webhooks.core.explain import Explained
from logto_webhooks.core.inbox import MEMBERSHIP_EVENTS, Kept
from logto_webhooks.core.life import Line
from logto_webhooks.core.mirror import row_of
from logto_webhooks.core.ports import Store
from logto_webhooks.core.record import Key, Record
from logto_webhooks.samples import history
from logto_webhooks.samples.history import Name
from logto_webhooks.service.explain import explain
from logto_webhooks.testing import FrozenClock, make
from logto_webhooks.testing.fake import FakeLogto
from tests.support.copy import STORES, Copy, StoreKind, keys_of, memory_host, open_host

T0 = 1_795_485_335_917
HOLDS_NOTHING = (None, {}, [], False)


class Life:
    """An inbox, what is known from it, and what explaining says."""

    def __init__(self, kind: StoreKind, folder: Path, bodies: Iterable[bytes]) -> None:
        asyncio.run(self._live(kind, folder, list(bodies)))

    async def _live(self, kind: StoreKind, folder: Path, bodies: list[bytes]) -> None:
        copy = Copy(open_host(kind, folder))
        await copy.take(bodies)
        subjects = [key for key in keys_of(bodies) if key.kind != "membership"]
        self.known, self.kept, self.told = await copy.host.read(
            lambda store: look(store, subjects)
        )
        await copy.host.close()


def look(
    store: Store, subjects: list[Key]
) -> tuple[dict[Key, Record], dict[int, Kept], dict[Key, Explained]]:
    known, kept, told = {}, {}, {}
    for subject in subjects:
        known |= store.inbox.known(subject)
        found = explain(store, subject)
        assert found
        told[subject] = found
        for line in found.lines:
            one = store.inbox.get(line.id or 0)
            assert one
            kept[one.id] = one
    return known, kept, told


def shuffled(name: Name, seed: int) -> list[bytes]:
    bodies = [each.body for each in history.load(name).deliveries]
    if seed:
        random.Random(seed).shuffle(bodies)
    return bodies


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", history.NAMES)
def test_the_credited_deliveries_hold_the_value(name: Name, seed: int, tmp_path: Path) -> None:
    """Of every field of every user and organization of a history, in any order of arrival."""
    life = Life("memory", tmp_path, shuffled(name, seed))
    for subject, found in life.told.items():
        for field in found.fields:
            if field.set_by is None and not field.ended_at:
                assert field.value in HOLDS_NOTHING, (subject, field)
                assert is_untold(subject, field, life), (subject, field)
                continue
            for by in filter(None, (field.set_by, field.told_by)):
                body = msgspec.json.decode(life.kept[by.id].body)
                assert holds(body, subject, field), (subject, field, by)


@pytest.mark.parametrize("name", history.NAMES)
def test_every_field_of_a_row_is_explained(name: Name, tmp_path: Path) -> None:
    """With the mirror's own value; and every membership."""
    life = Life("memory", tmp_path, shuffled(name, 0))
    for subject, found in life.told.items():
        row = row_of(life.known[subject]) or {}
        fields = {field.name: field.value for field in found.fields}
        for column in row.keys() - {f"logto_{subject.kind}_id"}:
            assert fields[column] == row[column]
        pairs = {key: each for key, each in life.known.items() if key.kind == "membership"}
        mine = [key for key in pairs if subject in key.organization_and_user]
        assert sum("." in field for field in fields) == len(mine)


@pytest.mark.parametrize("name", history.NAMES)
def test_the_lines_end_in_what_is_known(name: Name, tmp_path: Path) -> None:
    """In doubt is what is in doubt; and each outcome is the one that the sync wrote down."""
    life = Life("memory", tmp_path, shuffled(name, 0))
    for subject, found in life.told.items():
        record, last = life.known[subject], found.lines[-1]
        assert [each for each in last.doubtful if "." not in each] == record.doubts
        for line in found.lines:
            if line.event not in MEMBERSHIP_EVENTS and line.id:  # these tell of others, too
                assert line.outcome == life.kept[line.id].result


@pytest.mark.parametrize("kind", STORES)
def test_every_store_tells_the_same(kind: StoreKind, tmp_path: Path) -> None:
    """Line by line."""
    bodies = shuffled("people", 0)
    assert Life(kind, tmp_path, bodies).told == Life("memory", tmp_path, bodies).told


def holds(body: Any, subject: Key, field: Field) -> bool:
    """Whether a body says somewhere what a field has."""
    if "." in field.name:
        return holds_member(body, subject, field)
    value = field.value
    if field.name == "custom_data" and subject.kind == "user":
        value = {name: each for name, each in value.items() if name != "logtoUserId"}
        return any(same_data(each, value) for each in parts(body))
    if field.name.endswith("_at"):
        moment = datetime.fromtimestamp(value / 1000, UTC) if value is not None else None
        return any(each == value or is_moment(each, moment) for each in parts(body))
    return any(type(each) is type(value) and each == value for each in parts(body))


def holds_member(body: Any, subject: Key, field: Field) -> bool:
    kind, _, other = field.name.partition(".")
    if field.ended_at is not None:
        return body["event"].endswith(".Deleted")
    user = subject.id if kind == "organizations" else other
    organization = other if kind == "organizations" else subject.id
    ids = body["addedUserIds" if field.value else "removedUserIds"]
    return body["organizationId"] == organization and user in ids


def same_data(each: Any, value: Any) -> bool:
    return isinstance(each, dict) and {k: v for k, v in each.items() if k != "logtoUserId"} == value


def is_moment(each: Any, moment: datetime | None) -> bool:
    try:
        return isinstance(each, str) and moment == datetime.fromisoformat(each)
    except (TypeError, ValueError):
        return False


def parts(value: Any) -> Iterable[Any]:
    """All values within a value."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from parts(each)


def is_untold(subject: Key, field: Field, life: Life) -> bool:
    """Whether nothing known has such a field: of an incomplete record, or one that lives."""
    record = life.known[subject]
    return (
        field.name == "deleted_at"
        or not record.complete
        or (field.name == "last_sign_in_at" and "lastSignInAt" not in record.facts)
    )
