"""What was refused is tried again, however much there is, beside all else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from logto_webhooks import mapping
from logto_webhooks.database.mapped_rows import RowState, StateStore
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.schema import mapped_rows
from logto_webhooks.database.store import Store
from logto_webhooks.mapping import apply
from logto_webhooks.mapping.apply import REFUSED, Sweep, keep_applied
from logto_webhooks.records.record import Key
from logto_webhooks.testing import make
from tests.support.mapped_application import KINDS, Application
from tests.support.plans import explain
from tests.support.stores import Copy, StoreKind, WrappedRunner
from tests.support.waiting import eventually

T = TypeVar("T")


class Noting(WrappedRunner):
    """Notes which records are written again, and what is read."""

    def __init__(self, host: HandlerRunner) -> None:
        super().__init__(host)
        self.written: list[list[str]] = []
        self.reads = 0

    async def run(self, work: Callable[[Store], T]) -> T:
        if isinstance(work, partial) and "keys" in work.keywords:
            self.written.append(sorted(key.id for key in work.keywords["keys"]))
        return await super().run(work)

    async def read(self, work: Callable[[Store], T]) -> T:
        self.reads += 1
        return await super().read(work)


async def insert(application: Application, state: str, *ids: str) -> None:
    """Make rows in a state, whose records aren't there, so that they stay so."""
    rows = [
        {
            "mapping": application.users.fullname,
            "kind": "user",
            "logto_id": id_,
            "state": state,
            "changed_at": 0,
        }
        for id_ in ids
    ]
    await application.host.run(lambda store: _insert(store, rows))


def _insert(store: Store, rows: list[dict[str, Any]]) -> None:
    store.connection.execute(sa.insert(mapped_rows), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_is_listed_in_the_order_of_an_index(
    kind: StoreKind, tmp_path: Path
) -> None:
    """So a page reads no more than its rows, however many there are."""

    async def live(application: Application) -> None:
        await application.map()
        own = application.users.fullname
        await insert(application, "conflict", *(f"c{n}" for n in range(3_000)))
        await insert(application, "owed", *(f"o{n}" for n in range(3_000)))
        for only_owed, index in ((True, "owed"), (False, "unsettled")):
            work = partial(_list, name=own, only_owed=only_owed)
            *_, plan = await application.host.read(partial(explain, work=work))
            assert f"logto_mapped_rows_{index}" in plan, plan
            assert "TEMP B-TREE" not in plan, plan
            assert "Sort" not in plan, plan
            assert "(mapping,logto_id)>(?,?)" in plan or "Index Cond: ((ROW(" in plan, plan

    Application.run(kind, tmp_path, live)


def _list(store: Store, name: str, only_owed: bool) -> None:
    store.mappings.list_unsettled(name, 5, "a", only_owed=only_owed)


def test_pages_are_listed_beside_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep goes on where it was, page by page, and behind a page that failed."""
    monkeypatch.setattr(mapping, "PAGE", 2)

    async def live(application: Application) -> None:
        await application.map()
        await insert(application, "conflict", *"abcde")
        await insert(application, "waiting", "f")
        await insert(application, "held", "bb")
        host = Noting(application.host)
        sweep = Sweep(host, application.mappings, REFUSED)
        assert await sweep.step() is None
        sweep.begin()
        assert [await sweep.step() for _ in range(4)] == [2, 1, 2, 1]
        assert host.written == [["a", "b"], ["c"], ["d", "e"], ["f"]]
        assert await sweep.step() is None
        assert host.reads == 4 + len(application.mappings.registered)

    Application.run("sqlite", tmp_path, live)


def test_a_long_sweep_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is owed is tried before all that is refused was tried."""
    monkeypatch.setattr(mapping, "PAGE", 2)
    monkeypatch.setattr(apply, "PAGES", 1)
    monkeypatch.setattr(apply, "LOOK_S", 0.01)

    async def live(application: Application) -> None:
        await application.map()
        await application.apply_all()
        await insert(application, "conflict", *(f"c{n}" for n in range(9)))
        await insert(application, "owed", "o")
        host = Noting(application.host)
        task = asyncio.create_task(keep_applied(host, application.mappings))

        async def is_over() -> bool:
            return ["c8"] in host.written

        await eventually(is_over)
        task.cancel()
        owed = [place for place, keys in enumerate(host.written) if keys == ["o"]]
        assert owed[0] == 0
        assert owed[1] < host.written.index(["c8"])
        assert [keys for keys in host.written if keys != ["o"]] == [
            ["c0", "c1"],
            ["c2", "c3"],
            ["c4", "c5"],
            ["c6", "c7"],
            ["c8"],
        ]

    Application.run("sqlite", tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_owed_meanwhile_stays_owed(kind: StoreKind, tmp_path: Path) -> None:
    """A transaction that read the states before doesn't know what the other one has written."""

    async def live(application: Application) -> None:
        host = await application.map()
        await Copy(host).take([make.user_created(id="ana").body])
        [users] = [own for own in application.mappings.registered if own.kind == "user"]

        def owe(store: Store) -> None:
            store.mappings.mark_owed(users, [Key("user", "ana")], "why")

        def save(store: Store, owed_before: int, owed_after: int) -> str:
            for _ in range(owed_before):
                owe(store)
            states = StateStore(store.connection, users.name, "user")
            stored = states.find(["ana"])
            for _ in range(owed_after):
                owe(store)
            states.save([RowState(logto_id="ana", state="waiting")], stored)
            return states.find(["ana"])["ana"].state

        for owed_before, owed_after, state in (
            (0, 1, "owed"),
            (1, 1, "owed"),
            (1, 0, "waiting"),
            (0, 0, "waiting"),
        ):
            work = partial(save, owed_before=owed_before, owed_after=owed_after)
            assert await host.run(work) == state
        await application.apply_again()
        await application.check()

    Application.run(kind, tmp_path, live)
