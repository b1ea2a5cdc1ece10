"""Generated lives, of which an application with mapped tables is told in any order."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.mapping.apply import retry_unsettled
from logto_webhooks.records.record import Change
from tests.support.mapped_application import Application, learn
from tests.support.stores import Copy, StoreKind

A = TypeVar("A", bound=Application)
Told = bytes | list[Change]  # a delivery, or an answer of Logto's API
# Lives a number of steps, in an application whose tables are still empty.
Live = Callable[[A, random.Random, int], Awaitable[None]]


async def tell(
    application: A,
    host: HandlerRunner,
    told: Sequence[Told],
    rng: random.Random,
    change_own_rows: Callable[[A, random.Random], None],
    most: int,
) -> None:
    """Tell in any order, in pieces of at most so many, some twice, while the application changes
    its own rows."""
    left = [*told, *(each for each in told if rng.random() < 0.1)]
    rng.shuffle(left)
    copy = Copy(host)
    while left:
        size = rng.randint(1, most)
        piece, left = left[:size], left[size:]
        await copy.take([each for each in piece if isinstance(each, bytes)])
        for each in piece:
            if not isinstance(each, bytes):
                await learn(host, each)
        if rng.random() < 0.3:
            change_own_rows(application, rng)


async def settle(application: Application) -> None:
    """Write everything that still waits, or that the application changed."""
    await retry_unsettled(application.host, application.mappings)
    await application.apply_again()
    await retry_unsettled(application.host, application.mappings)


def live_on_sqlite(make: type[A], live: Live[A], rng: random.Random, steps: int) -> None:
    """Live once, in a folder of its own."""
    with TemporaryDirectory() as folder:
        _live_once(make, live, "sqlite", Path(folder), rng, steps)


def live_on_server(make: type[A], live: Live[A], kind: StoreKind, folder: Path, steps: int) -> None:
    """Live five times."""
    for seed in range(5):
        _live_once(make, live, kind, folder, random.Random(seed), steps)


def _live_once(
    make: type[A], live: Live[A], kind: StoreKind, folder: Path, rng: random.Random, steps: int
) -> None:
    make.run(kind, folder, lambda application: live(application, rng, steps))
