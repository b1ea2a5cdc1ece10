"""Recorded histories and sequences, in random orders with duplicates: one state, Logto's own.

The number of orders is small here, on a server above all; `make orders` runs 1,000 of each.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from logto_webhooks.records.record import Key
from logto_webhooks.samples import history
from logto_webhooks.samples.history import FinalState, Name, differences
from tests.support import recorded
from tests.support.stores import STORES, Copy, Known, StoreKind, fold, keys_of, open_host

ORDERS = os.environ.get("LOGTO_WEBHOOKS_TEST_ORDERS")
DOUBTFUL_USERS: dict[Name, int] = {"people": 0, "calm": 7, "race": 2, "lossy": 5}


def orders(kind: StoreKind) -> range:
    return range(int(ORDERS or (5 if kind == "sqlite" else 2)))


def shuffled(bodies: list[bytes], seed: int) -> list[bytes]:
    """Any order, and every tenth twice."""
    rng = random.Random(seed)
    sent = bodies + rng.sample(bodies, len(bodies) // 10)
    rng.shuffle(sent)
    return sent


async def copied(kind: StoreKind, folder: Path, bodies: list[bytes], keys: set[Key]) -> Known:
    host = open_host(kind, folder)
    try:
        copy = Copy(host)
        cut = random.Random(len(bodies)).randrange(len(bodies))
        await copy.take(bodies[:cut])
        await copy.take(bodies[cut:])
        return await copy.known(keys)
    finally:
        await host.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", history.NAMES)
@pytest.mark.parametrize("kind", STORES)
def test_every_order_of_a_history_ends_in_one_state(
    name: Name, kind: StoreKind, tmp_path: Path
) -> None:
    """Each order gives the records and rows that the rule alone gives, without a database."""
    bodies = [each.body for each in history.load(name).deliveries]
    keys = keys_of(bodies)
    expected = fold(bodies)
    for seed in orders(kind):
        known = asyncio.run(copied(kind, tmp_path, shuffled(bodies, seed), keys))
        assert by_id(known) == by_id(expected), f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("name", history.NAMES)
@pytest.mark.parametrize("kind", STORES)
def test_a_history_equals_logto_but_for_what_is_in_doubt(
    name: Name, kind: StoreKind, tmp_path: Path
) -> None:
    """Every difference from Logto's final state is in a record that is marked as doubtful."""
    recorded_history = history.load(name)
    bodies = [each.body for each in recorded_history.deliveries]
    known = asyncio.run(copied(kind, tmp_path, bodies, keys_of(bodies)))
    found = differences(recorded_history.final, known.users, known.organizations, known.waiting)
    assert [each for each in found if not each.doubtful] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", history.NAMES)
def test_as_many_users_are_in_doubt_as_were_measured(name: Name, tmp_path: Path) -> None:
    """Doubt is exact: 0, 7, 2 and 5 users, of 14, 38, 24 and 35."""
    bodies = [each.body for each in history.load(name).deliveries]
    known = asyncio.run(copied("sqlite", tmp_path, bodies, keys_of(bodies)))
    doubtful = [each.key for each in known.waiting if each.doubtful and each.key.kind == "user"]
    assert len(doubtful) == DOUBTFUL_USERS[name]


FORGING: tuple[Name, ...] = ("calm", "race", "lossy")


@pytest.mark.parametrize("name", FORGING)
def test_forged_custom_data_overwrites_nobody(name: Name, tmp_path: Path) -> None:
    """Somebody writes customData that looks like another user; it stays in its own customData."""
    bodies = [each.body for each in history.load(name).deliveries]
    assert any(b"attacker@example.com" in body for body in bodies)
    known = asyncio.run(copied("sqlite", tmp_path, bodies, keys_of(bodies)))
    rows = [found.row for found in known.users]
    assert any(row["custom_data"].get("primaryEmail") == "attacker@example.com" for row in rows)
    for row in rows:
        assert row["email"] != "attacker@example.com"
        assert row["username"] != "owned"


SEQUENCES = sorted((recorded.FOLDER / "sequences").glob("*.json"))


@pytest.mark.parametrize("file", SEQUENCES, ids=lambda file: file.stem)
@pytest.mark.parametrize("kind", STORES)
def test_every_order_of_a_sequence_ends_in_one_state(
    file: Path, kind: StoreKind, tmp_path: Path
) -> None:
    """One user, changed eight times in parallel: one state, and Logto's own unless in doubt."""
    sequence = msgspec.json.decode(file.read_bytes(), type=recorded.Sequence)
    bodies = [each.body.encode() for each in sequence.deliveries]
    keys = keys_of(bodies)
    expected = fold(bodies)
    for seed in orders(kind):
        known = asyncio.run(copied(kind, tmp_path, shuffled(bodies, seed), keys))
        assert by_id(known) == by_id(expected), f"seed {seed}"
        final = FinalState([dict(sequence.final_api_user)], [], [], [], {})
        found = differences(final, known.users, known.organizations, known.waiting)
        assert [each for each in found if not each.doubtful] == []


def by_id(known: Known) -> dict[str, Any]:
    """The same, whatever the order of rows."""
    return {
        "records": known.records,
        "users": {each.row["logto_user_id"]: each for each in known.users},
        "organizations": {each.row["logto_organization_id"]: each for each in known.organizations},
        "waiting": known.waiting,
    }
