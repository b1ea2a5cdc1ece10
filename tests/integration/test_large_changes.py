"""What changes more than fits into one transaction is applied in steps, each of them whole."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from msgspec.structs import replace

from logto_webhooks.apply import batch
from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.schema import deliveries
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery
from logto_webhooks.errors import StoreUnavailable
from logto_webhooks.jobs import JobFilter, RegisteredHandler
from logto_webhooks.records.record import Change, Key, Tombstone, Upsert, Value, membership
from logto_webhooks.testing import make
from tests.integration.conftest import Run
from tests.support.stores import ALL, Copy, WrappedRunner, delivery

PEOPLE = [f"u{number:03}" for number in range(90)]
MEMBER_LEFT = RegisteredHandler(name="left", patterns=("LocalMemberRemoved",))
MEMBER_ADDED = RegisteredHandler(
    name="added", patterns=("LocalMemberAdded", "Organization.User.Added")
)


class Dying(WrappedRunner):
    """A runner that fails at a certain transaction."""

    def __init__(self, host: TransactionRunner, at: int) -> None:
        super().__init__(host)
        self._left = at

    async def run(self, work: Any) -> Any:
        """Run, or die before the commit."""
        self._left -= 1

        def run(store: Store) -> Any:
            result = work(store)
            if self._left == 0:
                raise StoreUnavailable(problem="killed")
            return result

        return await self._host.run(run)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if these few were very many."""
    monkeypatch.setattr(batch, "FEW", 20)
    monkeypatch.setattr("logto_webhooks.apply.FIRST_WEIGHT", 16)
    monkeypatch.setattr("logto_webhooks.apply.MAX_PIECE", 16)
    monkeypatch.setattr("logto_webhooks.apply.membership_steps.FEW", 7)
    monkeypatch.setattr("logto_webhooks.apply.membership_steps.MOST", 7)
    monkeypatch.setattr("logto_webhooks.database.memberships.NEWEST", 7)


def know(run: Run, *handlers: RegisteredHandler) -> None:
    run(lambda store: store.jobs.register(handlers))
    run(lambda store: store.set_installed_at(0))


def add(run: Run, *bodies: bytes) -> None:
    run(lambda store: store.add([delivery(body) for body in bodies]))


async def until_done(copy: Copy) -> int:
    """Make steps until there is nothing to do; return how many."""
    steps = 0
    while await copy.worker.step():
        steps += 1
    return steps


def jobs_made(run: Run, name: str) -> Counter[str]:
    found = run(lambda store: store.jobs.find(JobFilter(limit=ALL)))
    return Counter(each.subject for each in found if each.event == name)


def crowd(organization: str) -> list[bytes]:
    created = make.event("Organization.Created", id=organization, name="Crowd")
    joined = make.event(
        "Organization.Membership.Updated", organizationId=organization, addedUserIds=PEOPLE
    )
    return [created.body, joined.body]


def people(*ids: str) -> list[bytes]:
    return [make.user_created(id=each).body for each in ids]


@pytest.mark.parametrize("killed_at", [2, 3, 5, 9])
def test_a_deletion_with_many_memberships_survives_a_kill(
    host: TransactionRunner, run: Run, killed_at: int
) -> None:
    """The deletion is there at once, each membership ends once, whoever goes on."""
    know(run, MEMBER_LEFT)
    asyncio.run(Copy(host).take(people(*PEOPLE) + crowd("o")))
    add(run, make.event("Organization.Deleted", id="o").body)
    with pytest.raises(StoreUnavailable):
        asyncio.run(until_done(Copy(Dying(host, killed_at))))
    left = run(lambda store: store.status()).memberships_to_end
    assert left == (len(PEOPLE) - 7 * ((killed_at - 3) // 2) if killed_at > 2 else 0)
    if killed_at > 2:
        deleted = run(lambda store: store.lock([Key("organization", "o")]))
        assert deleted[Key("organization", "o")].deleted_at is not None
        assert asyncio.run(until_done(Copy(host))) > 3
        assert run(lambda store: store.status()).memberships_to_end == 0
        assert run(lambda store: store.endings(1)) == []
        [found] = run(lambda store: store.find("organization", "o", 9))
        assert found.memberships == []
        assert jobs_made(run, "LocalMemberRemoved") == {f"user:{each}": 1 for each in PEOPLE}


def test_a_user_with_many_memberships_is_deleted_in_steps(
    host: TransactionRunner, run: Run
) -> None:
    """And what comes meanwhile about one of them is right, and tells handlers once."""
    know(run, MEMBER_LEFT)
    joined = [
        make.event(
            "Organization.Membership.Updated", organizationId=name, addedUserIds=["ana", "bo"]
        ).body
        for name in PEOPLE
    ]
    created = [make.event("Organization.Created", id=name, name=name).body for name in PEOPLE]
    asyncio.run(Copy(host).take(people("ana", "bo") + created + joined))
    again = make.event(
        "Organization.Membership.Updated", organizationId="u050", removedUserIds=["ana", "bo"]
    )
    add(run, make.event("User.Deleted", id="ana").body, again.body)
    copy = Copy(host)
    asyncio.run(until_done(copy))
    made = jobs_made(run, "LocalMemberRemoved")
    assert made == {"user:ana": len(PEOPLE), "user:bo": 1}
    assert run(lambda store: store.endings(1)) == []


def test_a_member_told_of_after_the_deletion_puts_it_in_doubt(
    host: TransactionRunner, run: Run
) -> None:
    """Also one whose membership had ended with the user already, so that no step ends it."""
    organization, user = Key("organization", "o"), Key("user", "u001")

    def joined(user_id: str, at: int) -> Upsert:
        return Upsert(membership("o", user_id), {"present": Value(True, at, at - 100, at)})

    told: list[list[Change]] = [
        [joined(each, 1_000) for each in PEOPLE],
        [Tombstone(user, 300_000), joined(user.id, 400_000)],
        [Tombstone(organization, 200_000)],
    ]
    for changes in told:
        run(partial(batch.apply_reads, changes=changes, source=None))
    asyncio.run(until_done(Copy(host)))
    record = run(lambda store: store.lock([organization]))[organization]
    assert record.deleted_at == 200_000
    assert record.doubts == ["existence"]


@pytest.mark.parametrize("killed_at", [3, 5, 7])
def test_a_large_membership_event_is_applied_in_pieces(
    host: TransactionRunner, run: Run, killed_at: int
) -> None:
    """Killed in between, it is applied again, and makes no job twice."""
    know(run, MEMBER_ADDED)
    asyncio.run(Copy(host).take(people(*PEOPLE)))
    add(run, *crowd("o"))
    with pytest.raises(StoreUnavailable):
        asyncio.run(until_done(Copy(Dying(host, killed_at))))
    known = run(lambda store: store.status())
    assert known.deliveries["pending"] >= 1
    run(_due_now)
    asyncio.run(until_done(Copy(host)))
    assert run(lambda store: store.status()).deliveries["pending"] == 0
    [found] = run(lambda store: store.find("organization", "o", 9))
    assert found.memberships == PEOPLE
    once = {f"user:{each}": 1 for each in PEOPLE}
    assert jobs_made(run, "Organization.User.Added") == once
    assert jobs_made(run, "LocalMemberAdded") == once


def _due_now(store: Store) -> None:
    """As if the lease of who was killed had run out."""
    inner: Any = store
    if not hasattr(inner, "tables"):
        inner._connection.execute(sa.update(deliveries).values(due_at=0))
        return
    for number, row in inner.tables.inbox.items():
        inner.tables.inbox[number] = replace(row, due_at=0)


@pytest.mark.parametrize("killed_at", [3, 4, 9])
def test_an_organization_that_comes_last_announces_its_members_in_steps(
    host: TransactionRunner, run: Run, killed_at: int
) -> None:
    """Each once, whoever goes on after a kill; then none is left to look at."""
    know(run, MEMBER_ADDED)
    created, joined = crowd("o")
    asyncio.run(Copy(host).take([*people(*PEOPLE), joined]))
    assert jobs_made(run, "LocalMemberAdded") == {}
    add(run, created)
    with pytest.raises(StoreUnavailable):
        asyncio.run(until_done(Copy(Dying(host, killed_at))))
    asyncio.run(until_done(Copy(host)))
    assert jobs_made(run, "LocalMemberAdded") == {f"user:{each}": 1 for each in PEOPLE}
    assert run(lambda store: store.arrivals(1)) == []


def test_members_that_are_deleted_while_their_organization_is_ended_leave_once(
    host: TransactionRunner, run: Run
) -> None:
    """Between the steps; so do those of whom older deliveries arrive meanwhile."""
    know(run, MEMBER_LEFT)
    asyncio.run(Copy(host).take(people(*PEOPLE) + crowd("o")))

    async def end() -> None:
        copy = Copy(host)
        await host.run(
            lambda store: store.add([delivery(make.event("Organization.Deleted", id="o").body)])
        )
        for user in PEOPLE[::9]:
            await copy.worker.step()
            gone = delivery(make.user_deleted(id=user).body)
            await host.run(partial(_add_one, new=gone))
        while await copy.worker.step():
            pass

    asyncio.run(end())
    assert jobs_made(run, "LocalMemberRemoved") == {f"user:{each}": 1 for each in PEOPLE}


def _add_one(store: Store, new: NewDelivery) -> None:
    store.add([new])
