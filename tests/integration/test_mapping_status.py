"""What `status` and `doctor` say of mapped tables."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import pytest
import sqlalchemy as sa

from logto_webhooks.database.store import Store
from logto_webhooks.deliveries import MappingStatus
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.apply import apply_all
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import declare_members
from logto_webhooks.mapping.own_rows import find_own_row
from logto_webhooks.mapping.own_schema import inspect_own_schema
from logto_webhooks.testing import make
from tests.support.mapped_application import KINDS, Application
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


def excludes_bo(user: Any) -> bool:
    if user.logto_user_id == "eve":
        raise ValueError
    return bool(user.logto_user_id != "bo")


@pytest.mark.parametrize("kind", KINDS)
def test_records_that_where_excludes_are_counted(kind: StoreKind, tmp_path: Path) -> None:
    """Neither those for which it raises, nor deleted ones. The command counts memberships, too."""

    async def live() -> None:
        application = Application(kind, tmp_path)
        copy = Copy(await application.map(where=excludes_bo))
        names = ("ana", "bo", "eve")
        await copy.take([make.user_created(id=name, at=1_000).body for name in names])
        await copy.take([make.event("Organization.Created", id="acme", at=1_000).body])
        joined = make.organization_membership_updated(
            id="acme", at=2_000, addedUserIds=["ana", "bo"]
        )
        await copy.take([joined.body])
        expected = {application.users.fullname: 1, application.members.fullname: 1}
        for dry_run in (True, False):
            applied = await apply_all(application.host, application.mappings, dry_run)
            assert {each.mapping: each.excluded for each in applied if each.excluded} == expected
        assert await _count_excluded(application) == (1, 1, 1)
        await copy.take([make.user_deleted(id="bo", at=3_000).body])
        assert await _count_excluded(application) == (0, 2, 1)
        await application.close()

    asyncio.run(live())


async def _count_excluded(application: Application) -> tuple[int, int, int]:
    """Of the users: the excluded ones, by `status` and `mapping list`, the other ones that are as
    they should be, and the conflicts."""
    status = await application.host.read(lambda store: store.mappings.status())
    listed = await application.host.read(lambda store: store.mappings.counts())
    own = application.users.fullname
    [users] = [each for each in status if each.mapping == own]
    [all_users] = [each for each in listed if each.mapping == own]
    assert users.excluded == all_users.excluded
    return users.excluded, all_users.ok, users.conflict


@pytest.mark.parametrize("kind", KINDS)
def test_an_excluded_user_can_have_a_row_from_before(kind: StoreKind, tmp_path: Path) -> None:
    """It stays. If the application deletes it, it isn't said that it will be written again."""

    async def live(application: Application) -> None:
        copy = Copy(await application.map(where=lambda user: user.name != "Gone"))
        await copy.take([make.user_created(id="ana", name="Ana", at=1_000).body])
        await copy.take([make.user_data_updated(id="ana", name="Gone", at=2_000).body])
        assert await _count_excluded(application) == (1, 0, 0)
        assert len(application.rows(application.users, "id")) == 1
        [users, *_] = application.mappings.entities
        row = await application.host.read(
            lambda store: find_own_row(store.connection, users, "ana")
        )
        assert row.reason == "it was deleted here, and where excludes the user"

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("is_deleted_here", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_of_a_deletion_gets_only_a_row_that_was_unlinked(
    kind: StoreKind, is_deleted_here: bool, tmp_path: Path
) -> None:
    """If the application had deleted it, another row may have its primary key by now."""

    async def live(application: Application) -> None:
        own = application.users
        copy = Copy(await application.map(when_deleted="unlink"))
        await copy.take([make.user_created(id="ana", at=1_000).body])
        [(row_id,)] = application.rows(own, "id")
        if is_deleted_here:
            with application.engine.begin() as connection:
                connection.execute(sa.delete(own))
                values = {"id": row_id, "plan": "paid", "active": True}
                connection.execute(sa.insert(own).values(values))
        await copy.take([make.user_deleted(id="ana", at=400_000).body])
        [users, *_] = application.mappings.entities
        row = await application.host.read(
            lambda store: find_own_row(store.connection, users, "ana")
        )
        expected = ("absent", None) if is_deleted_here else ("here", (row_id,))
        assert (row.state, row.primary_key) == expected

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_is_shown_with_why_its_row_is_not_written(kind: StoreKind, tmp_path: Path) -> None:
    """Others aren't."""

    async def live(application: Application) -> None:
        copy = Copy(await application.map())
        with application.engine.begin() as connection:
            taken = {"email": "ana@x", "plan": "paid", "active": True}
            connection.execute(sa.insert(application.users).values(taken))
        people = {"ana": "ana@x", "bo": "bo@x"}
        bodies = [make.user_created(id=i, email=e, at=1_000).body for i, e in people.items()]
        await copy.take(bodies)
        found = await application.host.read(lambda store: store.find("user", "@x", 2))
        shown = {user.row["logto_user_id"]: user.own_rows for user in found}
        reason = "conflict, another row has the value of email"
        assert shown == {"ana": [f"{application.users.fullname}: {reason}"], "bo": []}

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_where_that_excludes_all_is_known(kind: StoreKind, tmp_path: Path) -> None:
    """Not if there are no users, if one is wanted, or if only `create=False` excludes them."""

    async def live() -> None:
        application = Application(kind, tmp_path)
        copy = Copy(await application.map(where=lambda user: False))
        own = application.users.fullname

        async def excludes_all() -> bool:
            return await application.host.read(lambda store: store.mappings.excludes_all(own))

        assert not await excludes_all()
        await copy.take([make.user_created(id=name, at=1_000).body for name in ("ana", "bo")])
        await application.apply_all()
        assert await excludes_all()
        await application.map(where=lambda user: user.logto_user_id == "ana")
        await application.apply_all()
        assert not await excludes_all()
        await application.map(create=False)
        application.delete_all(application.users)
        await application.apply_all()
        assert (await _count_excluded(application), await excludes_all()) == ((2, 0, 0), False)
        await application.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", KINDS)
def test_status_reads_only_what_it_counts(kind: StoreKind, tmp_path: Path) -> None:
    """Each of its two counts has an index of exactly these rows."""

    async def live() -> None:
        application = Application(kind, tmp_path)
        await application.map()
        unsettled, excluded = await application.host.read(_explain_counts)
        assert "logto_mapped_rows_unsettled" in unsettled
        assert "logto_mapped_rows_excluded" in excluded
        await application.close()

    asyncio.run(live())


def _explain_counts(store: Store) -> list[str]:
    connection, ran = store.connection, list[tuple[str, Any]]()

    def note(_: Any, __: Any, statement: str, parameters: Any, *more: Any) -> None:
        if "logto_mapped_rows" in statement:
            ran.append((statement, parameters))

    sa.event.listen(connection, "before_cursor_execute", note)
    store.mappings.status()
    sa.event.remove(connection, "before_cursor_execute", note)
    explain = "EXPLAIN QUERY PLAN"
    if connection.dialect.name != "sqlite":
        explain = "EXPLAIN"
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # the table is empty
    plans = [connection.exec_driver_sql(f"{explain} {query}", values) for query, values in ran]
    return ["\n".join(str(row) for row in plan) for plan in plans]


def _table(application: Application, name: str, key: sa.Column[Any]) -> sa.Table:
    """A table with another column, so that a key needn't be its primary key."""
    id_ = sa.Column("id", sa.Integer, primary_key=not key.primary_key)
    return sa.Table(name, application.metadata, id_, key)


@pytest.mark.parametrize("kind", KINDS)
def test_ends_without_a_unique_index_are_found(kind: StoreKind, tmp_path: Path) -> None:
    """A primary key and a constraint are unique; one with another column doesn't help."""

    async def live() -> None:
        application = Application(kind, tmp_path)

        def make_table(name: str, *unique: str, of: Literal["key", "constraint"]) -> sa.Table:
            columns: list[sa.Column[Any]] = [
                sa.Column(column, sa.Text, primary_key=of == "key" and column in unique)
                for column in ("team", "person", "task")
            ]
            if of == "constraint":
                columns.append(sa.Column("id", sa.Integer, primary_key=True))
            constraints = [sa.UniqueConstraint(*unique)] if of == "constraint" and unique else []
            return sa.Table(name, application.metadata, *columns, *constraints)

        tables = [
            make_table("by_key", "team", "person", of="key"),
            make_table("by_constraint", "person", "team", of="constraint"),
            make_table("by_person", "person", of="constraint"),
            make_table("by_task", "team", "person", "task", of="constraint"),
            make_table("by_nothing", of="constraint"),
        ]
        application.metadata.create_all(application.engine)
        mappings = Mappings()
        for table in tables:
            defaults = {"task": "any"}
            options: dict[str, Any] = {"organization": "team", "user": "person"}
            mappings.add(declare_members(table, **options, create_defaults=defaults))
        own_schema = await application.host.read(lambda store: inspect_own_schema(store, mappings))
        expected = [f"{table.fullname} (team, person)" for table in tables[3:]]
        assert own_schema.unindexed == expected
        await application.close()

    asyncio.run(live())


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
