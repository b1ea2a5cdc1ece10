"""Work that takes longer than a transaction may, because of what the application's rows cost: it is
done in smaller steps, instead of being tried for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from logto_webhooks.apply import batch, membership_steps
from logto_webhooks.apply.membership_steps import MembershipAnnouncer, MembershipEnder
from logto_webhooks.database.mapped_rows import RegisteredMapping
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery
from logto_webhooks.errors import NoAnswer
from logto_webhooks.ingest.group_commit import GroupCommit
from logto_webhooks.ingest.spool import SpoolDirectory, Unspooler
from logto_webhooks.reconcile.reconcile import Reconciliation
from logto_webhooks.records.record import Key, Kind, Tombstone
from logto_webhooks.testing import FrozenClock, make
from logto_webhooks.testing.fake import FakeLogto
from tests.integration.test_many_memberships import (
    MANY,
    events,
    joined,
    many,
    organization,
    until_nothing_is_done,
)
from tests.integration.test_refetch import settled
from tests.support.fake import asking
from tests.support.stores import Copy, WrappedRunner, delivery, open_host

T = TypeVar("T")
__all__ = ["many"]  # a fixture
KINDS: tuple[Kind, ...] = ("user", "organization", "membership")


def take_long_for(most: int, host: Any) -> None:
    """Let transactions have no answer in time that change more records than `most`."""

    def project(
        connection: sa.Connection,
        changed: Collection[Key],
        registered: Mapping[str, RegisteredMapping],
    ) -> set[str]:
        if len(changed) > most:
            raise NoAnswer(problem="no answer within 10 s")
        return set(registered)

    host.project = project


def register(store: Store) -> None:
    mappings = [RegisteredMapping(name=kind, kind=kind, definition="1") for kind in KINDS]
    store.mappings.register(mappings)


@pytest.mark.parametrize("few", [0, 600])
def test_memberships_end_in_smaller_steps(
    many: None, host: Any, run: Any, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """Together with those of others, or alone."""
    monkeypatch.setattr(batch, "FEW", 0)
    monkeypatch.setattr(membership_steps, "FEW", few)
    monkeypatch.setattr(membership_steps, "LOCKED_S", 0.0)
    run(register)
    users = [Key("user", each) for each in MANY[:3]]
    deleted = [Tombstone(key, 300_000) for key in (Key("organization", "o"), *users)]
    run(partial(batch.apply_reads, changes=deleted, source="webhook"))
    take_long_for(50 if few else 3, host)
    asyncio.run(until_nothing_is_done(MembershipEnder(host, lambda report: None, 60.0)))
    expected = [f"user:{each}" for each in (*MANY, *MANY[:3])]
    assert events(run, "LocalMemberRemoved") == sorted(expected)


@pytest.mark.parametrize("few", [0, 600])
def test_memberships_are_announced_in_smaller_steps(
    many: None, host: Any, run: Any, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """Together with those of others, or alone."""
    monkeypatch.setattr(batch, "FEW", 0)
    monkeypatch.setattr(membership_steps, "FEW", few)
    monkeypatch.setattr(membership_steps, "LOCKED_S", 0.0)
    late = [joined(name, each) for name in ("q", "r") for each in MANY]
    run(partial(batch.apply_reads, changes=late, source=None))
    come = [organization("q"), organization("r")]
    run(partial(batch.apply_reads, changes=come, source="webhook"))
    before = len(events(run, "LocalMemberAdded"))
    run(register)
    take_long_for(50 if few else 3, host)
    asyncio.run(until_nothing_is_done(MembershipAnnouncer(host, lambda report: None, 60.0)))
    assert len(events(run, "LocalMemberAdded")) == before + 2 * len(MANY)


def test_a_reconciliation_gets_past_a_page_that_takes_long(tmp_path: Path) -> None:
    """All records are compared."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        await host.run(register)
        take_long_for(7, host)
        async with FakeLogto() as logto, asking(logto) as api:
            acme = logto.create_organization(name="Acme")["id"]
            users = [logto.create_user()["id"] for _ in range(120)]
            logto.add_members(acme, users)
            result = await Reconciliation(api, host, FrozenClock()).run()
        assert not result.doubts
        [row] = await host.read(lambda store: store.find("organization", acme, 1))
        assert row.memberships == sorted(users)
        await host.close()

    asyncio.run(live())


def test_an_organization_whose_list_of_members_takes_long_is_settled(tmp_path: Path) -> None:
    """Its members are stored in several transactions."""

    async def live() -> None:
        copy = Copy(open_host("sqlite", tmp_path))
        await copy.host.run(register)
        async with FakeLogto() as logto:
            acme = logto.create_organization(name="Acme")["id"]
            users = [logto.create_user()["id"] for _ in range(40)]
            logto.add_members(acme, users)
            untold = make.organization_membership_updated(id=acme, addedUserIds=[])
            await copy.take([untold.body])
            take_long_for(7, copy.host)
            await settled(logto, copy.host)
        assert await copy.host.read(lambda store: store.waiting(10)) == []
        await copy.host.close()

    asyncio.run(live())


class Slow(WrappedRunner):
    """Has no answer in time if many deliveries are stored at once."""

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Store few."""

        def check(store: Store) -> T:
            results = work(store)
            assert isinstance(results, Sequence)
            if len(results) > 3:
                raise NoAnswer(problem="no answer within 2 s")
            return results

        return await self._host.run(check)


async def count_stored(host: HandlerRunner) -> int:
    status = await host.read(lambda store: store.status())
    return status.deliveries["pending"]


def make_deliveries() -> list[NewDelivery]:
    return [delivery(make.user_created().body, received_at=10**12 + n) for n in range(50)]


def test_deliveries_are_stored_in_smaller_batches(tmp_path: Path) -> None:
    """Within the time that each of them has."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        group = GroupCommit(Slow(host), lambda report: None, lambda: None)
        deadline = asyncio.get_running_loop().time() + 8
        adding = [group.add(each, deadline) for each in make_deliveries()]
        answers = await asyncio.gather(*adding)
        assert all(answers)
        assert await count_stored(host) == 50
        await host.close()

    asyncio.run(live())


def test_spooled_deliveries_are_stored_in_smaller_batches(tmp_path: Path) -> None:
    """In the next turns."""

    async def live() -> None:
        host = open_host("sqlite", tmp_path)
        spool = SpoolDirectory(tmp_path / "spool")
        spool.make()
        spool.write(make_deliveries())
        unspooler = Unspooler(spool, Slow(host), lambda report: None, lambda: None)
        for _ in range(40):
            try:
                await unspooler.turn()
            except NoAnswer:
                continue
        assert spool.count() == 0
        assert await count_stored(host) == 50
        await host.close()

    asyncio.run(live())
