"""Foreign keys of the application's tables: what they refer to, and what they stop."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.mapping.apply import retry_unsettled
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import declare_members
from logto_webhooks.testing import make
from tests.integration.test_mapping_deletions import created, deleted, founded, joined, states_of
from tests.support.mapped_application import KINDS, Application
from tests.support.stores import Copy, StoreKind

LEFT = make.organization_membership_updated(
    id="acme", at=2_000, addedUserIds=[], removedUserIds=["u1"]
).body


async def read_reason(host: HandlerRunner) -> str | None:
    """Why a row conflicts."""
    conflict = await host.read(lambda store: store.mappings.find_oldest("conflict"))
    return None if conflict is None else conflict.reason


async def map_people(application: Application, referred: str) -> tuple[sa.Table, sa.Table]:
    """Map users, and members that refer to a column of theirs."""
    metadata = application.metadata
    people = sa.Table(
        "people",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text, unique=True),
        sa.Column("number", sa.Text, unique=True, default=lambda: uuid.uuid4().hex),
    )
    seats = sa.Table(
        "seats",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("team", sa.Text),
        sa.Column("person", people.c[referred].type, sa.ForeignKey(people.c[referred])),
    )
    metadata.create_all(application.engine, [people, seats])
    options: dict[str, Any] = {"columns": {}, "when_deleted": "delete"}
    await application.map_tables(
        declare_entities("user", people, key="logto_id", **options),
        declare_members(seats, organization="team", user="person"),
    )
    await application.apply_all()
    return people, seats


@pytest.mark.parametrize("referred", ["id", "logto_id", "number"])
@pytest.mark.parametrize("kind", KINDS)
def test_members_can_refer_to_any_unique_column(
    kind: StoreKind, referred: str, tmp_path: Path
) -> None:
    """They wait for the row to which they refer, and leave before it does."""

    async def live(application: Application) -> None:
        people, seats = await map_people(application, referred)
        copy = Copy(application.host)
        await copy.take([founded("acme"), joined("acme", ["u1"])])
        assert application.rows(seats, "team") == []
        assert await states_of(application.host, seats) == {"waiting": 1}
        await copy.take([created("u1")])
        [(value,)] = application.rows(people, referred)
        assert application.rows(seats, "team", "person") == [("acme", value)]
        await copy.take([LEFT])
        assert application.rows(seats, "team") == []
        again = make.organization_membership_updated(id="acme", at=3_000, addedUserIds=["u1"])
        await copy.take([again.body])
        assert application.rows(seats, "team", "person") == [("acme", value)]
        await copy.take([deleted("u1", 400_000)])
        assert application.rows(seats, "team") == application.rows(people, "id") == []

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize(
    ("columns", "row", "stops"),
    [
        ("owner INTEGER REFERENCES users (id)", "owner = 1", True),
        ("owner INTEGER REFERENCES USERS (ID)", "owner = 1", True),
        ("owner INTEGER REFERENCES users", "owner = 1", True),
        ("owner INTEGER REFERENCES users", "owner = 2", False),
        ("owner TEXT REFERENCES users (logto_user_id)", "owner = 'u1'", True),
        ("owner TEXT REFERENCES users (logto_user_id)", "owner = 'u2'", False),
        (
            "a INTEGER, b TEXT, FOREIGN KEY (a, b) REFERENCES users (id, logto_user_id)",
            "a = 1, b = 'u1'",
            True,
        ),
        (
            "a INTEGER, b TEXT, FOREIGN KEY (a, b) REFERENCES users (id, logto_user_id)",
            "a = 1, b = 'u2'",
            False,
        ),
        ("owner INTEGER REFERENCES users ON DELETE CASCADE", "owner = 1", True),
    ],
)
def test_sqlite_keeps_rows_to_which_others_refer(
    columns: str, row: str, stops: bool, tmp_path: Path
) -> None:
    """It checks no foreign keys unless it is told to, so this is looked for."""

    async def live(application: Application) -> None:
        copy = Copy(await application.map())
        await copy.take([created("u1")])
        with application.engine.begin() as connection:
            connection.execute(sa.text(f"CREATE TABLE orders (n INTEGER, {columns})"))
            connection.execute(sa.text("INSERT INTO orders (n) VALUES (1)"))
            connection.execute(sa.text(f"UPDATE orders SET {row}"))
        await copy.take([deleted("u1", 400_000)])
        assert len(application.rows(application.users, "id")) == stops
        reason = await read_reason(application.host)
        if stops:
            assert (reason or "").startswith("rows of orders refer to it")
            assert ("PRAGMA foreign_keys" in (reason or "")) == ("CASCADE" in columns)
        else:
            assert reason is None

    Application.run("sqlite", tmp_path, live)


def test_a_value_that_another_user_wants_deletes_no_row_to_which_others_refer(
    tmp_path: Path,
) -> None:
    """The row of a deleted user has to stay, so its email isn't free yet."""

    async def live(application: Application) -> None:
        users = application.users
        copy = Copy(await application.map())
        orders = sa.Table(
            "orders", application.metadata, sa.Column("owner", sa.ForeignKey(users.c.id))
        )
        orders.create(application.engine)
        await copy.take([created("u1")])
        with application.engine.begin() as connection:
            connection.execute(sa.insert(orders).values(owner=1))
        wants = make.user_created(id="u2", email="u1@x", at=400_100).body
        await copy.take([deleted("u1", 400_000), wants])
        assert application.rows(users, "logto_user_id", "email") == [("u1", "u1@x")]
        assert await states_of(application.host, users) == {"conflict": 2}
        application.delete_all(orders)
        await retry_unsettled(application.host, application.mappings)
        assert application.rows(users, "logto_user_id", "email") == [("u2", "u1@x")]

    Application.run("sqlite", tmp_path, live)


@pytest.mark.parametrize("on_update", ["NO ACTION", "CASCADE"])
@pytest.mark.parametrize("enforces", [True, False])
def test_sqlite_keeps_what_others_refer_to(enforces: bool, on_update: str, tmp_path: Path) -> None:
    """If it doesn't change the other rows, too. What nobody refers to changes."""

    async def live(application: Application) -> None:
        users = application.users
        copy = Copy(await application.map())
        if enforces:
            application.enforce_foreign_keys()
        key = sa.ForeignKey(users.c.email, onupdate=on_update)
        orders = sa.Table("orders", application.metadata, sa.Column("email", sa.Text, key))
        orders.create(application.engine)
        await copy.take([created("u1"), created("u2")])
        with application.engine.begin() as connection:
            connection.execute(sa.insert(orders).values(email="u1@x"))
        for name in ("u1", "u2"):
            body = make.user_data_updated(id=name, email=f"{name}@y", at=3_000).body
            await copy.take([body])
        follows = enforces and on_update == "CASCADE"
        assert application.rows(orders, "email") == [("u1@y" if follows else "u1@x",)]
        emails = application.rows(users, "email")
        assert emails == [("u1@y" if follows else "u1@x",), ("u2@y",)]
        assert (await read_reason(application.host) is None) == follows

    Application.run("sqlite", tmp_path, live)


def test_last_values_to_which_others_refer_hold_nothing_up(tmp_path: Path) -> None:
    """The row of a deleted user is set inactive all the same."""

    async def live(application: Application) -> None:
        users = application.users
        copy = Copy(await application.map(when_deleted={"active": False}))
        key = sa.ForeignKey(users.c.email)
        orders = sa.Table("orders", application.metadata, sa.Column("email", sa.Text, key))
        orders.create(application.engine)
        await copy.take([created("u1")])
        with application.engine.begin() as connection:
            connection.execute(sa.insert(orders).values(email="u1@x"))
        changed = make.user_data_updated(id="u1", email="u1@y", at=3_000).body
        await copy.take([changed, deleted("u1", 400_000)])
        assert application.rows(users, "email", "active") == [("u1@x", False)]
        assert await read_reason(application.host) is None

    Application.run("sqlite", tmp_path, live)


@pytest.mark.parametrize("manager", [None, "itself", "another"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_refers_to_itself_can_be_deleted(
    kind: StoreKind, manager: str | None, tmp_path: Path
) -> None:
    """One to which another row of its table refers stays."""

    async def live(application: Application) -> None:
        own_id = sa.Column("id", sa.Integer, primary_key=True)
        people = sa.Table(
            "people",
            application.metadata,
            own_id,
            sa.Column("logto_id", sa.Text, unique=True),
            sa.Column("manager", sa.ForeignKey(own_id)),
        )
        people.create(application.engine)
        options: dict[str, Any] = {"columns": {}, "when_deleted": "delete"}
        users = declare_entities("user", people, key="logto_id", **options)
        await application.map_tables(users)
        await application.apply_all()
        copy = Copy(application.host)
        await copy.take([created("u1")])
        [(row_id,)] = application.rows(people, "id")
        with application.engine.begin() as connection:
            if manager == "itself":
                connection.execute(sa.update(people).values(manager=row_id))
            elif manager == "another":
                connection.execute(sa.insert(people).values(id=row_id + 1, manager=row_id))
        await copy.take([deleted("u1", 400_000)])
        stays = manager == "another"
        assert len(application.rows(people, "id")) == 2 * stays
        assert (await states_of(application.host, people)).get("conflict", 0) == stays

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("enforces", [True, False])
@pytest.mark.parametrize(("on_delete", "left"), [("CASCADE", []), ("SET NULL", [(None,)])])
def test_sqlite_does_what_a_foreign_key_says(
    on_delete: str, left: list[tuple[None]], enforces: bool, tmp_path: Path
) -> None:
    """If the application has turned that on. Else the row stays, and the reason says so."""

    async def live(application: Application) -> None:
        copy = Copy(await application.map())
        if enforces:
            application.enforce_foreign_keys()
        owner: sa.Column[int] = sa.Column(
            "owner", sa.ForeignKey(application.users.c.id, ondelete=on_delete)
        )
        orders = sa.Table("orders", application.metadata, owner)
        orders.create(application.engine)
        await copy.take([created("u1")])
        [(own_id,)] = application.rows(application.users, "id")
        with application.engine.begin() as connection:
            connection.execute(sa.insert(orders).values(owner=own_id))
        await copy.take([deleted("u1", 400_000)])
        assert application.rows(orders, "owner") == (left if enforces else [(own_id,)])
        assert len(application.rows(application.users, "id")) == (not enforces)
        assert (await read_reason(application.host) is None) == enforces

    Application.run("sqlite", tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_values_to_which_others_refer(kind: StoreKind, tmp_path: Path) -> None:
    """With ON UPDATE CASCADE: who refers to them still does."""

    async def live(application: Application) -> None:
        users = application.users
        copy = Copy(await application.map())
        await copy.take([created("u1"), created("u2")])
        letters = sa.Table(
            "letters",
            application.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("to", sa.ForeignKey(users.c.email, onupdate="CASCADE")),
        )
        letters.create(application.engine)
        if kind == "sqlite":
            application.enforce_foreign_keys()
        with application.engine.begin() as connection:
            connection.execute(sa.insert(letters), [{"id": n, "to": f"u{n}@x"} for n in (1, 2)])
        swapped = [
            make.user_data_updated(id="u1", email="u2@x", at=3_000).body,
            make.user_data_updated(id="u2", email="u1@x", at=3_000).body,
        ]
        await copy.take(swapped)
        emails = application.rows(users, "logto_user_id", "email")
        assert emails == [("u1", "u2@x"), ("u2", "u1@x")]
        assert application.rows(letters, "id", "to") == [(1, "u2@x"), (2, "u1@x")]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("action", ["REPLACE", "IGNORE"])
def test_a_conflict_on_sqlite_deletes_no_row(action: str, tmp_path: Path) -> None:
    """Nor is a row left out in silence, whatever its constraint says."""

    async def live(application: Application) -> None:
        people = sa.Table(
            "people",
            application.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("logto_id", sa.Text),
            sa.Column("email", sa.Text, unique=True, sqlite_on_conflict_unique=action),
        )
        people.create(application.engine)
        with application.engine.begin() as connection:
            own = [{"id": 1, "email": "u1@x"}, {"id": 2, "email": "u2@x"}]
            connection.execute(sa.insert(people), own)
        options: dict[str, Any] = {"columns": {"email": "email"}, "when_deleted": "delete"}
        users = declare_entities("user", people, key="logto_id", **options)
        await application.map_tables(users)
        await application.apply_all()
        copy = Copy(application.host)
        await copy.take([created("u1"), make.user_created(id="u3", email="u3@x", at=1_000).body])
        await copy.take([make.user_data_updated(id="u3", email="u2@x", at=2_000).body])
        rows = application.rows(people, "logto_id", "email")
        assert rows == [("u3", "u3@x"), (None, "u1@x"), (None, "u2@x")]
        assert await states_of(application.host, people) == {"conflict": 2}

    Application.run("sqlite", tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_values_that_only_null_could_free(kind: StoreKind, tmp_path: Path) -> None:
    """Rows that refer to them would lose them, so it is a conflict."""

    async def live(application: Application) -> None:
        people = sa.Table(
            "people",
            application.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("logto_id", sa.Text),
            sa.Column("email", sa.Text, unique=True),
            sa.CheckConstraint("email LIKE '%@x'"),
        )
        key = sa.ForeignKey(people.c.email, onupdate="CASCADE")
        letters = sa.Table("letters", application.metadata, sa.Column("to", key))
        application.metadata.create_all(application.engine)
        if kind == "sqlite":
            application.enforce_foreign_keys()
        options: dict[str, Any] = {"columns": {"email": "email"}, "when_deleted": "delete"}
        users = declare_entities("user", people, key="logto_id", **options)
        copy = Copy(await application.map_tables(users))
        await application.apply_all()
        await copy.take([created("u1"), created("u2")])
        with application.engine.begin() as connection:
            connection.execute(sa.insert(letters), [{"to": "u1@x"}, {"to": "u2@x"}])
        for name, email in (("u1", "u2@x"), ("u2", "u1@x")):
            await copy.take([make.user_data_updated(id=name, email=email, at=3_000).body])
        assert application.rows(letters, "to") == [("u1@x",), ("u2@x",)]
        assert "conflict" in await states_of(application.host, people)

    Application.run(kind, tmp_path, live)


def test_a_trigger_of_sqlite_keeps_its_own_rules(tmp_path: Path) -> None:
    """What is said of a statement also holds for those of its triggers."""

    async def live(application: Application) -> None:
        with application.engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE domains (name TEXT PRIMARY KEY)"))
            connection.execute(
                sa.text(
                    "CREATE TRIGGER note_domain AFTER INSERT ON users BEGIN"
                    " INSERT OR IGNORE INTO domains VALUES ('x'); END"
                )
            )
        await Copy(await application.map()).take([created("u1"), created("u2")])
        assert len(application.rows(application.users, "id")) == 2
        assert await states_of(application.host, application.users) == {"ok": 2}

    Application.run("sqlite", tmp_path, live)
