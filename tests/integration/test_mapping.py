"""The application's own tables follow the mirror, in the same transaction."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from logto_webhooks.mapping.apply import retry_unsettled
from logto_webhooks.samples import history
from logto_webhooks.samples.history import Name
from logto_webhooks.testing import make
from tests.support import recorded
from tests.support.mapped_application import KINDS, Application
from tests.support.stores import Copy, StoreKind

ORDERS = int(os.environ.get("LOGTO_WEBHOOKS_TEST_MAPPED_ORDERS", "0"))


async def live_in_some_order(kind: StoreKind, folder: Path, bodies: list[bytes], seed: int) -> None:
    """Any order, in pieces, every tenth twice; with an odd seed, foreign keys are deferred."""
    rng = random.Random(seed)
    sent = bodies + rng.sample(bodies, len(bodies) // 10)
    rng.shuffle(sent)
    application = Application(kind, folder, deferred=seed % 2 == 1)
    copy = Copy(await application.map())
    while sent:
        size = rng.randrange(1, 40)
        await copy.take(sent[:size])
        sent = sent[size:]
    await application.check()
    await application.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", history.NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_own_tables_equal_the_mirror_in_every_order(
    kind: StoreKind, name: Name, tmp_path: Path
) -> None:
    """Recorded histories. `make mapped` runs 200 orders of each."""
    bodies = [each.body for each in history.load(name).deliveries]
    for seed in range(ORDERS or 2):
        asyncio.run(live_in_some_order(kind, tmp_path, bodies, seed))


@pytest.mark.parametrize("kind", KINDS)
def test_own_rows_equal_the_mirror_after_parallel_changes(kind: StoreKind, tmp_path: Path) -> None:
    """Recorded sequences: one user is changed eight times at once."""
    for file in sorted((recorded.FOLDER / "sequences").glob("*.json")):
        sequence = msgspec.json.decode(file.read_bytes(), type=recorded.Sequence)
        bodies = [each.body.encode() for each in sequence.deliveries]
        for seed in range(ORDERS or 1):
            asyncio.run(live_in_some_order(kind, tmp_path, bodies, seed))


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_emails_are_right_in_the_end(kind: StoreKind, tmp_path: Path) -> None:
    """Three users whose emails go round, one delivery at a time, in every order."""
    before = [make.user_created(id=f"u{n}", email=f"e{n}@x", at=1_000).body for n in range(3)]
    after = [
        make.user_data_updated(id=f"u{n}", email=f"e{(n + 1) % 3}@x", at=2_000).body
        for n in range(3)
    ]

    async def live(order: tuple[bytes, ...]) -> None:
        application = Application(kind, tmp_path)
        copy = Copy(await application.map())
        await copy.take(before)
        for body in order:
            await copy.take([body])
        await application.check()
        await application.close()

    for order in itertools.permutations(after):
        asyncio.run(live(order))


@pytest.mark.parametrize("kind", KINDS)
def test_existing_rows_are_linked_or_reported(kind: StoreKind, tmp_path: Path) -> None:
    """By their email, whatever its case. Never a row that has a key, nor one of several."""

    async def live() -> None:
        application = Application(kind, tmp_path)
        own = application.users
        copy = Copy(application.host)
        sent = [make.user_created(id=f"u{n}", email=f"e{n}@x.example", at=1_000) for n in range(6)]
        await copy.take([each.body for each in sent])
        with application.engine.begin() as connection:
            plan = {"plan": "paid", "active": True}
            connection.execute(
                sa.insert(own),
                [
                    {"email": " E0@X.example ", "logto_user_id": None, **plan},
                    {"email": "e1@x.example", "logto_user_id": "somebody", **plan},
                    {"email": "E2@x.example", "logto_user_id": None, **plan},
                    {"email": "e2@x.example", "logto_user_id": None, **plan},
                ],
            )
        host = await application.map(link=own.c.email)
        await application.apply_all()
        [counts] = [
            c
            for c in await host.read(lambda store: store.mappings.counts())
            if c.mapping == own.fullname
        ]
        assert (counts.ok, counts.conflict) == (4, 2)  # u1's email is somebody's; u2 is ambiguous
        rows = application.rows(own, "logto_user_id", "email", "plan")
        assert rows == sorted(
            [
                ("u0", "e0@x.example", "paid"),
                ("somebody", "e1@x.example", "paid"),
                (None, "E2@x.example", "paid"),
                (None, "e2@x.example", "paid"),
                *((f"u{n}", f"e{n}@x.example", "free") for n in (3, 4, 5)),
            ],
            key=repr,
        )
        with application.engine.begin() as connection:
            connection.execute(
                sa.delete(own).where(own.c.email.in_(["E2@x.example", "e1@x.example"]))
            )
        assert await retry_unsettled(host, application.mappings, ["conflict"]) == 2
        await application.check()
        await application.close()

    asyncio.run(live())
