"""What is known of a mapping's rows is forgotten in steps, because there can be millions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.database import mapped_rows as store_module
from logto_webhooks.database.mapped_rows import FORGETTING, LONG_AGO
from logto_webhooks.database.schema import former_rows, mapped_rows
from logto_webhooks.database.store import Store
from logto_webhooks.mapping.apply import apply_all, apply_step
from logto_webhooks.testing import make
from tests.integration.test_mapping_links import insert
from tests.support.mapped_application import KINDS, Application
from tests.support.plans import explain
from tests.support.stores import Copy, StoreKind


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of three rows."""
    monkeypatch.setattr(store_module, "AT_ONCE", 3)


def add(store: Store, name: str, ids: str, **values: Any) -> None:
    rows = [
        {
            "mapping": name,
            "kind": "user",
            "logto_id": id_,
            "row_id": f"[{id_}]" if id_.isupper() else None,
            "state": "ok" if id_.isupper() else "conflict",
            "changed_at": 0,
        }
        | values
        for id_ in ids
    ]
    store.connection.execute(sa.insert(mapped_rows), rows)


def list_ids(store: Store, name: str) -> str:
    query = sa.select(mapped_rows.c.logto_id).where(mapped_rows.c.mapping == name)
    return "".join(sorted(store.connection.scalars(query)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_is_forgotten_step_by_step(kind: StoreKind, tmp_path: Path) -> None:
    """Its rows' owners are remembered. A step after an interruption goes on; none is taken when the
    mapping is registered again."""

    async def live(application: Application) -> None:
        host = await application.map()
        own, other = application.users.fullname, application.teams.fullname
        await host.run(partial(add, name=own, ids="AbCdEfG"))
        await host.run(partial(add, name=other, ids="AbCdE"))
        assert await host.run(lambda store: store.mappings.forget(own, "")) == (0, None)
        assert await host.run(lambda store: store.mappings.remove(own))
        after: str | None = ""
        counts: list[int] = []
        while after is not None:
            steps: list[tuple[int, str | None]] = []
            work = partial(_forget, name=own, after=after, steps=steps)
            plans = await host.run(partial(explain, work=work))
            assert not [plan for plan in plans if "SCAN logto_mapped_rows" in plan], plans
            [(count, after)] = steps
            counts.append(count)
        assert sum(counts) == 7
        assert max(counts) <= 3
        assert await host.run(partial(list_ids, name=own)) == ""
        assert await host.run(partial(list_ids, name=other)) == "ACEbd"
        former = await host.run(lambda store: list(store.connection.execute(_FORMER)))
        assert sorted(map(tuple, former)) == [(own, id_, f"[{id_}]") for id_ in "ACEG"]
        assert not await host.run(lambda store: store.mappings.remove(own))

    Application.run(kind, tmp_path, live)


_FORMER = sa.select(former_rows.c.mapping, former_rows.c.logto_id, former_rows.c.row_id)


def _forget(store: Store, name: str, after: str, steps: list[tuple[int, str | None]]) -> None:
    steps.append(store.mappings.forget(name, after))


@pytest.mark.parametrize("by_command", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_registering_forgets_nothing(kind: StoreKind, by_command: bool, tmp_path: Path) -> None:
    """If that took too long, no process could start, and nothing would be applied. It is done
    later, in steps, before the changed mapping is applied."""

    async def live(application: Application) -> None:
        own = application.users
        host = await application.map(link=own.c.email)
        await application.apply_all()
        await host.run(partial(add, name=own.fullname, ids="AbCdefgh"))
        insert(application, "e1@x")
        await application.map(link=own.c.email, create=False)
        mapping = await host.read(lambda store: store.mappings.registered()[own.fullname])
        assert mapping.applied_to == FORGETTING
        assert await host.run(partial(list_ids, name=own.fullname)) == "ACbdefgh"
        # Somebody else may want the same row, as long as not all are compared anew.
        await Copy(host).take([make.user_created(id="z", email="e1@x", at=1_000).body])
        assert application.rows(own, "logto_user_id") == [(None,)]
        if by_command:
            await apply_all(host, application.mappings)
        else:
            left = []
            for _ in range(3):
                assert await apply_step(host, application.mappings) == 0
                left.append(len(await host.run(partial(list_ids, name=own.fullname))))
            assert left == [9 - 3, 9 - 6, 2]
            await application.apply_all()
        assert await host.run(partial(list_ids, name=own.fullname)) == "ACz"
        assert application.rows(own, "logto_user_id") == [("z",)]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_deletions_no_longer_count_step_by_step(kind: StoreKind, tmp_path: Path) -> None:
    """Those of this mapping."""

    async def live(application: Application) -> None:
        host = await application.map()
        own, other = application.users.fullname, application.teams.fullname
        await host.run(partial(add, name=own, ids="abcdefg", deleted_at=1))
        await host.run(partial(add, name=other, ids="ab", deleted_at=1))
        steps = [
            await host.run(lambda store: store.mappings.reset_deletion_count(own)) for _ in "1234"
        ]
        assert steps == [3, 3, 1, 0]
        query = sa.select(mapped_rows.c.mapping).where(mapped_rows.c.deleted_at > LONG_AGO)
        left = await host.run(lambda store: list(store.connection.scalars(query)))
        assert left == [other, other]

    Application.run(kind, tmp_path, live)
