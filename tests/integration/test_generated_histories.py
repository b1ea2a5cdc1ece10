"""Generated lives, in any order with duplicates: what isn't in doubt is true."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logto_webhooks.samples.history import FieldDifference, differences
from logto_webhooks.testing import App, make
from tests.support.generated_history import Life
from tests.support.stores import Copy, Known, keys_of, memory_host


def lived(rng: random.Random, steps: int, pause_ms: tuple[int, int]) -> Life:
    life = Life(rng, pause_ms)
    for _ in range(steps):
        life.step()
    return life


def copied(life: Life, rng: random.Random) -> Known:
    bodies = life.bodies
    sent = bodies + [body for body in bodies if rng.random() < 0.1]
    rng.shuffle(sent)
    copy = Copy(memory_host())
    cut = rng.randint(0, len(sent))
    asyncio.run(copy.take(sent[:cut]))
    asyncio.run(copy.take(sent[cut:]))
    return asyncio.run(copy.known(keys_of(bodies)))


def found(life: Life, known: Known) -> list[FieldDifference]:
    return differences(life.final(), known.users, known.organizations, known.waiting)


@pytest.mark.slow
@given(rng=st.randoms(use_true_random=False), steps=st.integers(1, 60))
def test_what_differs_is_in_doubt(rng: random.Random, steps: int) -> None:
    """Changes overlap; every difference from the truth is in a record marked as doubtful."""
    life = lived(rng, steps, pause_ms=(0, 60))
    assert [each for each in found(life, copied(life, rng)) if not each.doubtful] == []


@pytest.mark.slow
@given(rng=st.randoms(use_true_random=False), steps=st.integers(1, 60))
def test_two_orders_end_in_one_state(rng: random.Random, steps: int) -> None:
    """All that is known follows from the set of deliveries."""
    life = lived(rng, steps, pause_ms=(0, 60))
    one, other = copied(life, rng), copied(life, rng)
    assert one.records == other.records
    assert one.waiting == other.waiting


@pytest.mark.slow
@given(rng=st.randoms(use_true_random=False), steps=st.integers(1, 60))
def test_a_slow_life_leaves_no_doubt(rng: random.Random, steps: int) -> None:
    """Changes that keep their distance are copied exactly, and nothing is in doubt."""
    life = lived(rng, steps, pause_ms=(300, 400))
    known = copied(life, rng)
    assert found(life, known) == []
    assert [each for each in known.waiting if each.doubtful] == []


@pytest.mark.slow
@given(order=st.permutations(range(3)), gap=st.integers(0, 50))
def test_a_plain_sign_up_leaves_no_doubt(order: list[int], gap: int) -> None:
    """User.Created, PostRegister and PostSignIn, in any order, all within some milliseconds."""
    at = 1_795_485_562_263
    created = _user(at, at, None)
    signed_in = _user(at, at + gap, at + gap)
    sent = [
        make.user_created(id="ana", at=at + 7, data=created),
        make.post_register(id="ana", at=at + gap + 8, user=signed_in),
        make.post_sign_in(id="ana", at=at + gap + 9, user=signed_in),
    ]
    app = App()
    app.deliver(*[sent[index] for index in order])
    assert app.waiting() == []
    assert app.users("ana")[0].row["last_sign_in_at"] == at + gap


def _user(created_at: int, updated_at: int, signed_in_at: int | None) -> dict[str, object]:
    return {
        "id": "ana",
        "username": None,
        "primaryEmail": "ana@example.com",
        "primaryPhone": None,
        "name": None,
        "avatar": None,
        "identities": {},
        "customData": {},
        "profile": {},
        "isSuspended": False,
        "createdAt": created_at,
        "updatedAt": updated_at,
        "lastSignInAt": signed_in_at,
    }
