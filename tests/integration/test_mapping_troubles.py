"""Mapped tables when the application's database, or another process, gets in the way."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.apply import batch
from logto_webhooks.database.schema import mappings as registered_mappings
from logto_webhooks.database.store import Store
from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.apply import apply_all, retry_unsettled
from logto_webhooks.records.record import Absent, ApiRead, Key
from logto_webhooks.testing import make
from tests.support.mapped_application import KINDS, PLAN, Application, counts_of
from tests.support.stores import Copy, StoreKind


def ana(**fields: Any) -> bytes:
    return make.user_data_updated(id="ana", at=fields.pop("at", 2_000), **fields).body


CREATED = make.user_created(id="ana", email="ana@x.example", at=1_000).body


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_the_code_owes_the_rows(kind: StoreKind, tmp_path: Path) -> None:
    """Whoever has it writes them."""

    async def live(application: Application) -> None:
        host = await application.map()
        host.project = None
        await Copy(host).take([CREATED, make.user_created(id="bo", at=1_000).body])
        assert application.rows(application.users, "id") == []
        assert (await counts_of(host, application.users)).owed == 2
        host.project = application.mappings.write
        assert await retry_unsettled(host, application.mappings, ["owed"]) == 2
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_mapping_never_writes_what_a_newer_one_wrote(
    kind: StoreKind, tmp_path: Path
) -> None:
    """The newer one is applied to all records; what the older process applies is owed to it."""

    async def live(application: Application) -> None:
        host = await application.map()
        await Copy(host).take([CREATED])
        older = application.mappings
        own = application.users.c
        columns = {own.email: "email", own.first_name: "name", own.active: lambda user: True}
        await application.map(columns=columns)
        await application.apply_all()
        host.project = older.write
        await host.run(lambda store: store.mappings.register(older.registered))  # once more
        await Copy(host).take([ana(name="Ana", email="ana@x.example", at=3_000)])
        assert (await counts_of(host, application.users)).owed == 1
        host.project = application.mappings.write
        await retry_unsettled(host, application.mappings)
        assert application.rows(application.users, "first_name") == [("Ana",)]
        await host.run(partial(register_later, mappings=older))
        registered = await host.read(lambda store: store.mappings.registered())
        assert older.find_current(registered) >= {application.users.fullname}, "as after a rollback"

    Application.run(kind, tmp_path, live)


def register_later(store: Store, mappings: Mappings) -> None:
    """Register them when no process has had the newer ones for a while."""
    earlier = sa.update(registered_mappings).values(seen_at=1_000)
    store.connection.execute(earlier)
    store.mappings.register(mappings.registered)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sqlite"])
def test_a_locked_row_holds_up_nobody(kind: StoreKind, tmp_path: Path) -> None:
    """It is owed, and written when it is free."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        await copy.take([CREATED])
        others = [make.user_created(id=f"u{n}", email=f"{n}@x", at=2_000).body for n in range(50)]
        with application.engine.begin() as connection:
            connection.execute(sa.select(application.users).with_for_update())
            began = time.monotonic()
            await copy.take([ana(email="new@x.example"), *others])
            assert time.monotonic() - began < 10
            assert len(application.rows(application.users, "id")) == 51
            assert (await counts_of(host, application.users)).owed == 1
            [user] = await host.read(lambda store: store.find("user", "ana", 5))
            assert user.row["email"] == "new@x.example"
        await retry_unsettled(host, application.mappings)
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_table_pauses_its_mapping_alone(kind: StoreKind, tmp_path: Path) -> None:
    """As while the application's migration runs. The rest of the deliveries is applied."""

    async def live(application: Application) -> None:
        host = await application.map()
        with application.engine.begin() as connection:
            application.members.drop(connection)
            connection.execute(sa.text(f"ALTER TABLE {application.users} RENAME TO elsewhere"))
        copy = Copy(host)
        organization = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
        await copy.take([CREATED, organization])
        assert application.rows(application.teams, "name") == [("Acme",)]
        counts = await counts_of(host, application.users)
        assert (counts.owed, counts.ok) == (1, 0)
        prefix = "" if kind == "sqlite" else "app."
        with application.engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {prefix}elsewhere RENAME TO users"))
            application.members.create(connection)
        await retry_unsettled(host, application.mappings)
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.postgres
@pytest.mark.parametrize("kind", ["postgres-thread"])  # its connections are pooled
def test_a_missing_table_costs_no_connections(kind: StoreKind, tmp_path: Path) -> None:
    """Each delivery meets it again, and a session that is as good has no other tables."""
    opened: list[object] = []

    async def live(application: Application) -> None:
        host = await application.map()
        with application.engine.begin() as connection:
            application.members.drop(connection)
            connection.execute(sa.text(f"DROP TABLE {application.users}"))
        copy = Copy(host)
        await copy.take([CREATED])
        sa.event.listen(sa.pool.Pool, "connect", note)
        try:
            for number in range(5):
                await copy.take([make.user_created(id=f"u{number}", at=1_000).body])
        finally:
            sa.event.remove(sa.pool.Pool, "connect", note)
        assert (await counts_of(host, application.users)).owed == 6
        assert not opened

    def note(connection: object, record: object) -> None:
        opened.append(connection)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_database_refuses_is_a_conflict_of_that_row_alone(
    kind: StoreKind, tmp_path: Path
) -> None:
    """It is written as soon as that is possible."""

    async def live(application: Application) -> None:
        host = await application.map()
        with application.engine.begin() as connection:
            connection.execute(sa.insert(application.users), [PLAN | {"email": "ana@x.example"}])
        bo = make.user_created(id="bo", email="bo@x.example", at=1_000).body
        await Copy(host).take([CREATED, bo])
        counts = await counts_of(host, application.users)
        assert (counts.conflict, counts.ok) == (1, 1)
        await Copy(host).take([ana(email="ana2@x.example")])
        counts = await counts_of(host, application.users)
        assert (counts.conflict, counts.ok) == (0, 2)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_the_application_changed_are_corrected(kind: StoreKind, tmp_path: Path) -> None:
    """At the record's next change, or by `apply_all`. Other columns are its own."""

    async def live(application: Application) -> None:
        host = await application.map()
        await Copy(host).take([CREATED, make.user_created(id="bo", email="b@x", at=1_000).body])
        own = application.users
        with application.engine.begin() as connection:
            connection.execute(sa.update(own).values(first_name="Mine", plan="paid"))
            connection.execute(sa.delete(own).where(own.c.logto_user_id == "bo"))
        await Copy(host).take([ana(email="ana@x.example", profile={"givenName": "Ana"})])
        rows = application.rows(own, "logto_user_id", "first_name", "plan")
        assert rows == [("ana", "Ana", "paid")]
        [applied, *_] = await application.apply_again()
        assert (applied.created, applied.changed) == (1, 0)
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_delivery_deletes_rows(kind: StoreKind, tmp_path: Path) -> None:
    """A Logto that was restored from an old dump must not empty the application."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        await copy.take([CREATED])
        unknown = Absent(Key("user", "ana"), 2_000, 2_000)
        await host.run(partial(batch.apply_reads, changes=[unknown], source="reconcile"))
        assert len(application.rows(application.users, "id")) == 1
        assert (await counts_of(host, application.users)).waiting == 1
        await copy.take([make.user_deleted(id="ana", at=3_000).body])
        assert application.rows(application.users, "id") == []
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_others_refer_to_is_a_conflict_until_they_are_gone(
    kind: StoreKind, tmp_path: Path
) -> None:
    """The user is deleted here; its own row waits."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        await copy.take([CREATED])
        orders = sa.Table(
            "orders",
            application.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("user_id", sa.ForeignKey(application.users.c.id), nullable=False),
        )
        with application.engine.begin() as connection:
            orders.create(connection)
            [user_id] = connection.scalars(sa.select(application.users.c.id))
            connection.execute(sa.insert(orders), [{"user_id": user_id}])
        await copy.take([make.user_deleted(id="ana", at=3_000).body])
        assert (await counts_of(host, application.users)).conflict == 1
        with application.engine.begin() as connection:
            connection.execute(sa.delete(orders))
        await retry_unsettled(host, application.mappings)
        await application.check()
        assert application.rows(application.users, "id") == []

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_that_raises_is_a_conflict(kind: StoreKind, tmp_path: Path) -> None:
    """Of that row alone, and so is a value of the wrong type."""

    async def live(application: Application) -> None:
        own = application.users.c

        def read_active(user: Any) -> object:
            return {"ana": object(), "cleo": True}[user.logto_user_id]

        columns = {own.email: "email", own.active: read_active}
        host = await application.map(columns=columns)
        sent = [
            make.user_created(id=name, email=f"{name}@x", at=1_000).body
            for name in ("ana", "bo", "cleo")
        ]
        await Copy(host).take(sent)
        counts = await counts_of(host, application.users)
        assert (counts.conflict, counts.ok) == (2, 1)
        deliveries = await host.read(lambda store: store.status())
        assert deliveries.deliveries["done"] == 3
        groups = await host.read(lambda store: store.mappings.list_unwritten(["conflict"]))
        assert {group.reason for group in groups} == {
            "the value of active is of type object, which doesn't fit the column",
            "the function of active raised KeyError",
        }

    Application.run(kind, tmp_path, live)


@pytest.mark.postgres
def test_a_time_for_a_column_of_text_says_what_to_do(tmp_path: Path) -> None:
    """If a function returns it. asyncpg writes none, and other drivers write it as they like."""

    async def live(application: Application) -> None:
        own = application.users.c
        columns = {own.first_name: lambda user: user.created_at, own.active: lambda user: True}
        host = await application.map(columns=columns)
        await Copy(host).take([CREATED])
        [group] = await host.read(lambda store: store.mappings.list_unwritten(["conflict"]))
        assert group.reason == (
            "the value of first_name is of type datetime, which doesn't fit the column: fill it "
            "with a function that formats the time"
        )

    Application.run("asyncpg", tmp_path, live)


def broken(user: Any) -> Any:
    raise ValueError("a mapping's own error")


@pytest.mark.parametrize("what", ["where", "link", "columns", "member"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_raises_holds_up_no_delivery(
    kind: StoreKind, what: str, tmp_path: Path
) -> None:
    """Whichever function of the mapping it is."""

    async def live(application: Application) -> None:
        own = application.users.c
        changes: dict[str, Any] = {what: broken} if what in ("where", "link") else {}
        if what == "columns":
            changes = {"columns": {own.email: broken, own.active: lambda user: True}}
        host = await application.map(**changes)
        if what == "member":
            application.mappings.pairs[0].columns["role"] = broken
        joined: dict[str, Any] = {"organizationId": "acme", "addedUserIds": ["ana"], "at": 1_500}
        sent = [
            CREATED,
            make.event("Organization.Created", id="acme", name="Acme", at=1_000).body,
            make.event("Organization.Membership.Updated", **joined).body,
        ]
        await Copy(host).take(sent)
        status = await host.read(lambda store: store.status())
        assert (status.deliveries["done"], status.deliveries["pending"]) == (3, 0)
        table = application.members if what == "member" else application.users
        assert (await counts_of(host, table)).conflict == 1
        [group] = await host.read(lambda store: store.mappings.list_unwritten(["conflict"]))
        named = {"columns": "the function of email", "member": "the mapping"}.get(what, f"`{what}`")
        assert group.reason == f"{named} raised ValueError"
        assert application.rows(application.teams, "name") == [("Acme",)]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_cannot_be_sent_is_a_conflict_of_its_row(
    kind: StoreKind, tmp_path: Path
) -> None:
    """The others of the batch are written."""

    async def live(application: Application) -> None:
        own = application.users.c

        def read_name(user: Any) -> object:
            return {"not": "text"} if user.logto_user_id == "u1" else "Ana"

        columns = {own.email: "email", own.first_name: read_name, own.active: lambda user: True}
        host = await application.map(columns=columns)
        sent = [make.user_created(id=f"u{n}", email=f"{n}@x", at=1_000).body for n in range(3)]
        await Copy(host).take(sent)
        counts = await counts_of(host, application.users)
        assert (counts.ok, counts.conflict, counts.owed) == (2, 1, 0)
        [group] = await host.read(lambda store: store.mappings.list_unwritten(["conflict"]))
        assert (
            group.reason == "the value of first_name is of type dict, which doesn't fit the column"
        )

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_linked_by_a_value_in_doubt(kind: StoreKind, tmp_path: Path) -> None:
    """Once linked, a user would keep somebody else's row."""

    async def live(application: Application) -> None:
        own = application.users
        host = await application.map(link=own.c.email)
        with application.engine.begin() as connection:
            rows = [PLAN | {"email": email} for email in ("ana@x.example", "victim@x.example")]
            connection.execute(sa.insert(own), rows)
        copy = Copy(host)
        same = {"updatedAt": 1_000, "data.createdAt": 500}
        emails = ("ana@x.example", "victim@x.example")
        await copy.take([ana(email=email, at=1_010, **same) for email in emails])
        assert (await counts_of(host, own)).waiting == 1
        assert application.rows(own, "logto_user_id") == [(None,), (None,)]
        settled = {"updatedAt": 9_000, "data.createdAt": 500}
        await copy.take([ana(email="ana@x.example", at=9_000, **settled)])
        linked = [("ana@x.example", "ana"), ("victim@x.example", None)]
        assert application.rows(own, "email", "logto_user_id") == linked

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_release_applies_nothing_while_a_newer_one_runs(
    kind: StoreKind, tmp_path: Path
) -> None:
    """`mapping apply` says so."""

    async def live(application: Application) -> None:
        host = await application.map()
        older = application.mappings
        own = application.users.c
        await application.map(columns={own.email: "email", own.active: lambda user: True})
        with pytest.raises(InvalidMapping, match="a newer release"):
            await apply_all(host, older)

    Application.run(kind, tmp_path, live)


def test_a_default_is_a_value(tmp_path: Path) -> None:
    """A function would be written as such."""
    application = Application("sqlite", tmp_path)
    own = application.users.c
    with pytest.raises(InvalidMapping, match="use the column's default"):
        asyncio.run(application.map(create_defaults={own.plan: lambda: "free"}))
    asyncio.run(application.close())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sqlite"])
def test_a_row_that_a_policy_hides_says_so(kind: StoreKind, tmp_path: Path) -> None:
    """PostgreSQL skips it like a locked one."""

    async def live(application: Application) -> None:
        host = await application.map()
        await Copy(host).take([CREATED])
        options = await host.read(lambda store: store.connection.get_execution_options())
        schema = options["schema_translate_map"][None]
        own = application.users
        with application.engine.begin() as connection:
            for statement in (
                "DROP ROLE IF EXISTS logto_limited",
                "CREATE ROLE logto_limited",
                f"GRANT USAGE ON SCHEMA {schema}, app TO logto_limited",
                f"GRANT ALL ON ALL TABLES IN SCHEMA {schema}, app TO logto_limited",
                f"ALTER TABLE {own} ENABLE ROW LEVEL SECURITY",
                f"CREATE POLICY reads ON {own} FOR SELECT USING (true)",
            ):
                connection.execute(sa.text(statement))
        renamed = ApiRead(Key("user", "ana"), {"own": {"primaryEmail": "new@x"}}, 9_000, 9_000)

        def work(store: Store) -> None:
            store.connection.execute(sa.text("SET LOCAL ROLE logto_limited"))
            batch.apply_reads(store, [renamed], None)

        await host.run(work)
        oldest = await host.read(lambda store: store.mappings.find_oldest("owed"))
        assert oldest
        assert oldest.reason == (
            "its row is locked, or row-level security doesn't let it be changed"
        )
        with application.engine.begin() as connection:
            connection.execute(sa.text("DROP OWNED BY logto_limited"))
            connection.execute(sa.text("DROP ROLE logto_limited"))

    Application.run(kind, tmp_path, live)
