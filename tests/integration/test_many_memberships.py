"""Users and organizations with very many memberships: what is read of them, and in which pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from logto_webhooks.apply import batch
from logto_webhooks.database import records
from logto_webhooks.database.store import Store
from logto_webhooks.logto.api_responses import Span
from logto_webhooks.reconcile.fetch import Fetcher
from logto_webhooks.records.record import Change, Key, Tombstone, Upsert, Value, membership
from logto_webhooks.testing.fake import FakeLogto
from tests.integration.conftest import Run
from tests.support.fake import asking
from tests.support.plans import explain
from tests.support.stores import WrappedRunner, open_host

T = TypeVar("T")
SLOW = ("logto_records_pkey", "Sort", "TEMP B-TREE")  # in a plan


def joined(organization: str, user: str, at: int = 1_000, present: bool = True) -> Upsert:
    value = Value(present, at, at - 100, at)
    return Upsert(membership(organization, user), {"present": value})


def apply(run: Run, *changes: Change) -> None:
    run(partial(batch.apply_reads, changes=changes, source=None))


def test_memberships_are_read_in_pages_by_one_index(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without statistics, too. A page is read in order, and no other memberships are."""
    monkeypatch.setattr(records, "LOOKED", 2)
    apply(run, *(joined(f"o{n}", "ana") for n in range(5)), joined("o1", "bo"))
    end, pages, after = Key("user", "ana"), list[list[str]](), ""
    while after is not None:
        find: Callable[[Store], Any] = partial(Store.memberships_of, end=end, after=after)
        found, after = run(find)
        pages.append([key.id for key in found])
        [plan] = run(partial(explain, work=find))
        assert "logto_records_user" in plan, plan
        assert [word for word in SLOW if word in plan] == [], plan
    assert pages == [["o0:ana", "o1:ana"], ["o2:ana", "o3:ana"], ["o4:ana"]]


class ReadOnly(WrappedRunner):
    """A runner that refuses to write."""

    async def run(self, work: Callable[[Store], T]) -> T:
        """Fail."""
        raise AssertionError("it writes")


@pytest.mark.parametrize("kind", ["sqlite", "asyncpg"])
def test_a_list_of_members_is_compared_without_a_write(kind: Any, tmp_path: Path) -> None:
    """Stored members whom it lacks are found, and those in doubt, but not those who left."""

    async def live() -> Sequence[Key]:
        host = open_host(kind, tmp_path)
        async with FakeLogto() as logto, asking(logto) as api:
            acme = logto.create_organization(name="Acme")["id"]
            logto.add_members(acme, [logto.create_user(id="listed")["id"]])
            told: list[Change] = [
                joined(acme, "unlisted"),
                joined(acme, "left", present=False),
                joined(acme, "doubtful"),
                joined(acme, "doubtful", 1_001, present=False),
                joined(acme, "deleted"),
                Tombstone(Key("user", "deleted"), 300_000),
                joined("other", "stranger"),
            ]
            await host.run(partial(batch.apply_reads, changes=told, source=None))
            fetcher = Fetcher(api, ReadOnly(host), lambda answer: Span(1, 2))
            pieces = [piece async for piece in fetcher.fetch_members(acme)]
        await host.close()
        ids = {change.key for piece in pieces for change in piece}
        return sorted(key for key in ids if key.kind == "membership")

    users = [key.organization_and_user[1].id for key in asyncio.run(live())]
    assert users == ["doubtful", "listed", "unlisted"]
