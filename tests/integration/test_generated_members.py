"""`LocalMemberAdded` and `LocalMemberRemoved` of generated lives: they alternate."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logto_webhooks.apply import batch
from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import NewDelivery
from logto_webhooks.records.record import Absent, Change
from logto_webhooks.testing import make
from tests.integration.test_member_events import (
    LOCAL,
    ORGANIZATION,
    USER,
    member,
    names,
    organization,
    user,
)
from tests.support.stores import Copy, delivery, memory_host


def add(store: Store, new: list[NewDelivery]) -> None:
    store.add(new)


def created(kind: str, at: int) -> bytes:
    if kind == "user":
        return make.user_created(id="ana", at=at).body
    return make.event("Organization.Created", id="acme", name="Acme", at=at).body


def deleted(kind: str, at: int) -> bytes:
    if kind == "user":
        return make.user_deleted(id="ana", at=at).body
    return make.event("Organization.Deleted", id="acme", at=at).body


def joined(at: int) -> bytes:
    return make.organization_membership_updated(id="acme", at=at, addedUserIds=["ana"]).body


def left(at: int) -> bytes:
    return make.organization_membership_updated(id="acme", at=at, removedUserIds=["ana"]).body


T0 = 1_795_000_000_000
moments = st.sampled_from([T0 + 30 * number for number in range(5)] + [T0 + 100_000, T0 + 200_000])
kinds = st.sampled_from(["user", "organization"])
bodies = st.one_of(
    st.builds(created, kinds, moments),
    st.builds(deleted, kinds, moments),
    st.builds(joined, moments),
    st.builds(left, moments),
)
reads = st.one_of(
    st.builds(lambda at: user(at, at), moments),
    st.builds(lambda at: organization(at, at), moments),
    st.builds(member, moments, st.booleans()),
    st.builds(
        lambda key, at: Absent(key, at, at + 20), st.sampled_from([USER, ORGANIZATION]), moments
    ),
)


@given(
    steps=st.lists(st.one_of(st.lists(bodies, min_size=1, max_size=3), reads), max_size=8),
    few=st.sampled_from([0, 500]),
    pauses=st.booleans(),
)
def test_what_is_told_alternates_and_ends_as_the_tables_say(
    steps: list[list[bytes] | Change], few: int, pauses: bool
) -> None:
    """Whatever comes in whatever order, also while memberships are ended step by step: each Added
    is followed by a Removed, and the last one says whether the membership is here."""

    async def live() -> None:
        host = memory_host()
        await host.run(lambda store: store.jobs.register([LOCAL]))
        await host.run(lambda store: store.set_installed_at(0))
        copy = Copy(host)
        for step in steps:
            if isinstance(step, list):
                new = [delivery(body) for body in step]
                await host.run(partial(add, new=new))
                while await copy.worker.step() and not pauses:
                    pass
            else:
                await host.run(partial(batch.apply_reads, changes=[step], source="read"))
        while await copy.worker.step():
            pass
        told = [name for name in await host.read(names) if "Member" in name]
        assert told == ["LocalMemberAdded", "LocalMemberRemoved"] * (len(told) // 2) + (
            ["LocalMemberAdded"] * (len(told) % 2)
        )
        rows = await host.read(lambda store: store.find("organization", "acme", 1))
        users = await host.read(lambda store: store.find("user", "ana", 1))
        living = [row for row in (*rows, *users) if row.row["deleted_at"] is None]
        is_here = len(living) == 2 and "ana" in rows[0].memberships
        assert bool(len(told) % 2) is is_here

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "FEW", few)
        patch.setattr("logto_webhooks.apply.membership_steps.LOOK_S", 0)
        patch.setattr("logto_webhooks.apply.membership_steps.FEW", few or 1)
        asyncio.run(live())
