"""What `status` and `doctor` say of mapped tables."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.deliveries import MappingStatus
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.own_schema import inspect_own_schema
from logto_webhooks.testing import make
from tests.integration.test_mapping import KINDS, Application
from tests.support.stores import Copy, StoreKind


@pytest.mark.parametrize("kind", KINDS)
def test_status_counts_rows_that_are_not_as_they_should_be(kind: StoreKind, tmp_path: Path) -> None:
    """By mapping, and `doctor` knows the oldest one."""

    async def live() -> None:
        application = Application(kind, tmp_path)
        copy = Copy(application.host)
        assert (await application.host.read(lambda store: store.status())).mappings == []
        await application.map()
        with application.engine.begin() as connection:
            taken = {"email": "ana@x", "plan": "paid", "active": True}
            connection.execute(sa.insert(application.users).values(taken))
        await copy.take([make.user_created(id="ana", email="ana@x").body])
        await application.apply_all()
        users, teams, members = (
            table.fullname for table in (application.users, application.teams, application.members)
        )
        assert (await application.host.read(lambda store: store.status())).mappings == [
            MappingStatus(mapping=name, conflict=int(name == users))
            for name in sorted((users, teams, members))
        ]
        oldest = await application.host.read(lambda store: store.mappings.find_oldest("conflict"))
        assert oldest
        assert (oldest.mapping, oldest.logto_id) == (users, "ana")
        assert 0 <= oldest.since_s < 60
        assert await application.host.read(lambda store: store.mappings.find_oldest("owed")) is None
        await application.close()

    asyncio.run(live())


def _table(application: Application, name: str, key: sa.Column[Any]) -> sa.Table:
    """A table with another column, so that a key needn't be its primary key."""
    id_ = sa.Column("id", sa.Integer, primary_key=not key.primary_key)
    return sa.Table(name, application.metadata, id_, key)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_without_a_unique_index_are_found(kind: StoreKind, tmp_path: Path) -> None:
    """A primary key, a constraint and an index are unique; so is an index on a path, but SQLite's
    can't be read."""

    async def live() -> None:
        application = Application(kind, tmp_path)
        primary = _table(application, "by_primary_key", sa.Column("key", sa.Text, primary_key=True))
        constrained = _table(application, "constrained", sa.Column("key", sa.Text, unique=True))
        indexed = _table(application, "indexed", sa.Column("key", sa.Text))
        sa.Index("indexed_key", indexed.c.key, unique=True)
        slow = _table(application, "slow", sa.Column("key", sa.Text, index=True))
        path = _table(application, "path", sa.Column("key", sa.JSON))
        slow_path = _table(application, "slow_path", sa.Column("key", sa.JSON))
        with application.engine.begin() as connection:
            application.metadata.create_all(connection)
            if kind != "sqlite":
                index = f"CREATE UNIQUE INDEX ON {path.fullname} ((key ->> 'id'))"
                connection.execute(sa.text(index))
        mappings = Mappings()
        keys: list[tuple[sa.Table, Any]] = [
            *((table, table.c.key) for table in (primary, constrained, indexed, slow)),
            *((table, table.c.key["id"]) for table in (path, slow_path)),
        ]
        for table, key in keys:
            mapping = declare_entities("user", table, key=key, columns={}, when_deleted="keep")
            mappings.add(mapping)
        own_schema = await application.host.read(lambda store: inspect_own_schema(store, mappings))
        expected = [slow] if kind == "sqlite" else [slow, slow_path]
        assert own_schema.missing == {}
        assert own_schema.unindexed == [f"{table.fullname}.key" for table in expected]
        await application.close()

    asyncio.run(live())
