"""Roles of members, where everybody is in every organization: only those at hand are read."""

from __future__ import annotations

import asyncio
from functools import partial

import sqlalchemy as sa

from logto_webhooks.database.runner import TransactionRunner
from logto_webhooks.database.schema import member_roles, members
from logto_webhooks.database.store import Store
from logto_webhooks.mapping.mirror import read_members, read_pairs
from logto_webhooks.records.record import Key, membership
from tests.support.plans import noting

COUNT = 20
PAIRS = [(f"o{n}", f"u{n}") for n in range(COUNT)]
KEYS = [membership(*pair) for pair in PAIRS]


def test_roles_of_members_are_read_by_pairs(host: TransactionRunner) -> None:
    """With conditions for both ends apart, 500 memberships could read 250,000 rows."""

    async def live() -> None:
        await host.run(_fill)
        for work in (_read_members, _read_roles, _save_roles):
            assert await host.run(partial(_count_rows, work=work)) <= 2 * COUNT, work

    asyncio.run(live())


def _fill(store: Store) -> None:
    dense = [(f"o{n}", f"u{m}") for n in range(COUNT) for m in range(COUNT)]
    ends = [{"logto_organization_id": o, "logto_user_id": u} for o, u in dense]
    store.connection.execute(sa.insert(members), ends)
    roles = [end | {"role_id": "r", "name": "admin"} for end in ends]
    store.connection.execute(sa.insert(member_roles), roles)


def _count_rows(store: Store, work: object) -> int:
    """How many rows the statements of some work return."""
    assert callable(work)
    with noting(store.connection) as ran:
        work(store)
    results = [store.connection.exec_driver_sql(query, values) for query, values in ran]
    return sum(len(result.all()) for result in results)


def _read_members(store: Store) -> None:
    found = read_members(store.connection, KEYS)
    assert [(key, row.roles) for key, row in found.items()] == [(key, ("admin",)) for key in KEYS]


def _read_roles(store: Store) -> None:
    found = read_pairs(store.connection, "member_role", [key.id for key in KEYS])
    assert [pair.record_id for pair in found] == [key.id for key in KEYS]


def _save_roles(store: Store) -> None:
    """Nothing changes."""
    store._save_part("member_roles", {key: [_make_role(key)] for key in KEYS})


def _make_role(key: Key) -> dict[str, str]:
    organization, user = key.organization_and_user
    return {
        "logto_organization_id": organization.id,
        "logto_user_id": user.id,
        "role_id": "r",
        "name": "admin",
    }
