"""Thousands of the application's rows are found by their primary keys: in pieces, because one
condition for all is refused by SQLite, and planned for seconds by PostgreSQL."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import sqlalchemy as sa

from logto_webhooks.database.mapped_rows import RowState, encode_id
from logto_webhooks.database.schema import mapped_rows
from logto_webhooks.database.store import Store
from logto_webhooks.mapping.declare import OwnValues
from logto_webhooks.mapping.entity_writer import EntityWriter
from logto_webhooks.mapping.links import LinkFinder, NoLink
from logto_webhooks.mapping.pair_writer import PairWriter
from logto_webhooks.mapping.primary_keys import AT_ONCE, make_conditions
from tests.support.mapped_application import KINDS, Application
from tests.support.plans import noting
from tests.support.stores import StoreKind

COUNT: Final = 2 * AT_ONCE + 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_found_in_pieces(kind: StoreKind, tmp_path: Path) -> None:
    """Of pairs by their key, former ones, and those to link."""

    async def live(application: Application) -> None:
        await application.map(when_deleted="unlink", link=application.users.c.email)
        await application.host.run(partial(_insert_states, name=application.users.fullname))
        for find in (_find_pairs, _find_former, _lock_links):
            await application.host.run(partial(find, application=application))

    Application.run(kind, tmp_path, live)


def _insert_states(store: Store, name: str) -> None:
    rows = [
        {
            "mapping": name,
            "kind": "user",
            "logto_id": f"u{n}",
            "row_id": encode_id([n]),
            "state": "ok",
            "changed_at": 0,
            "deleted_at": 0,
        }
        for n in range(COUNT)
    ]
    store.connection.execute(sa.insert(mapped_rows), rows)


def _count_reads(store: Store, application: Application, table: sa.Table, work: Any) -> int:
    with noting(store.connection) as ran:
        work()
    return len([query for query, _ in ran if query.startswith("SELECT") and table.name in query])


def _find_pairs(store: Store, application: Application) -> None:
    [pair] = application.mappings.pairs
    writer = application.mappings.make_writer(store.connection, pair)
    assert isinstance(writer, PairWriter)
    [key] = pair.primary_key
    find = partial(writer.find_logto_ids, list(range(COUNT)), key)
    assert _count_reads(store, application, application.members, find) == 3


def _find_former(store: Store, application: Application) -> None:
    users = application.mappings.entities[0]
    writer = application.mappings.make_writer(store.connection, users)
    assert isinstance(writer, EntityWriter)
    states = {f"u{n}": RowState(logto_id=f"u{n}", row_id=encode_id([n])) for n in range(COUNT)}
    values, rows = dict.fromkeys(states, OwnValues({}, {})), dict.fromkeys(states)
    find = partial(writer._find_former, values, rows, states)
    assert _count_reads(store, application, application.users, find) == 3


def _lock_links(store: Store, application: Application) -> None:
    users = application.mappings.entities[0]
    assert users.link is not None
    run = store.connection.execute
    writer = application.mappings.make_writer(store.connection, users)
    columns = list(application.users.c)
    finder = LinkFinder(store.connection, users, users.link, columns, run, writer._call)
    chosen: Any = {f"u{n}": {application.users.c.id: n} for n in range(COUNT)}
    lost: dict[str, Any] = {}
    assert (
        _count_reads(
            store, application, application.users, lambda: lost.update(finder._lock(chosen))
        )
        == 3
    )
    assert len(lost) == COUNT
    assert all(isinstance(link, NoLink) for link in lost.values())


def test_keys_of_several_columns_are_found_together() -> None:
    """Not all combinations of their values."""
    columns = [sa.Column(name, sa.Integer) for name in "ab"]
    table = sa.Table("own", sa.MetaData(), *columns)
    with sa.create_engine("sqlite://").begin() as connection:
        table.create(connection)
        rows = [{"a": a, "b": b} for a in range(40) for b in range(40)]
        connection.execute(sa.insert(table), rows)
        keys = [(n, 39 - n) for n in range(40)]
        [are_some] = make_conditions(columns, keys)
        found = connection.execute(sa.select(table).where(are_some)).all()
        assert sorted(map(tuple, found)) == keys
    assert list(make_conditions(columns, [])) == []
