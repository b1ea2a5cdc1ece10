"""On SQLite, a primary key can be NULL: such a row can't be found again, so it isn't written."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks import LogtoWebhooks, testing
from logto_webhooks.errors import InvalidMapping
from logto_webhooks.testing import make

PEOPLE = "CREATE TABLE people (id {} PRIMARY KEY, logto TEXT UNIQUE, email TEXT)"
IN_GROUPS = (
    "CREATE TABLE in_groups (id {} PRIMARY KEY, person TEXT, team TEXT, UNIQUE (person, team))"
)


def create_tables(connection: sa.Connection, key_type: str) -> None:
    for statement in (PEOPLE, IN_GROUPS):
        connection.execute(sa.text(statement.format(key_type)))


def open_application(folder: Path, key_type: str) -> tuple[LogtoWebhooks, sa.MetaData]:
    """An application whose tables are reflected, as those of a file with mappings are."""
    engine = sa.create_engine(f"sqlite:///{folder / 'a.db'}")
    metadata = sa.MetaData()
    with engine.begin() as connection:
        create_tables(connection, key_type)
        metadata.reflect(connection)
    return LogtoWebhooks(signing_key=testing.SIGNING_KEY, engine=engine), metadata


def test_a_key_that_nothing_fills_is_refused(tmp_path: Path) -> None:
    logto, metadata = open_application(tmp_path, "TEXT")
    with pytest.raises(InvalidMapping, match="nothing fills id, which is NOT NULL"):
        logto.map_users(
            metadata.tables["people"], key="logto", columns={"email": "email"}, when_deleted="keep"
        )
    with pytest.raises(InvalidMapping, match="nothing fills id, which is NOT NULL"):
        logto.map_members(metadata.tables["in_groups"], organization="team", user="person")


@pytest.mark.parametrize("key_type", ["BIGINT", "INT"])
def test_a_number_that_sqlite_does_not_generate(key_type: str, tmp_path: Path) -> None:
    """SQLAlchemy takes it for one that it does. The row isn't kept, and its state says why."""
    logto, metadata = open_application(tmp_path, key_type)
    people, in_groups = metadata.tables["people"], metadata.tables["in_groups"]
    logto.map_users(people, key="logto", columns={"email": "email"}, when_deleted="delete")
    logto.map_members(in_groups, organization="team", user="person")
    app = testing.app(logto)
    create_tables(app.connection, key_type)
    app.deliver(
        make.user_created(id="ana", email="ana@x"),
        make.organization_membership_updated(id="acme", addedUserIds=["ana"]),
    )
    for table in (people, in_groups):
        assert app.connection.execute(sa.select(table)).all() == []
    reasons = app.connection.scalars(sa.text("SELECT reason FROM logto_mapped_rows")).all()
    assert len(reasons) == 2
    assert all("the primary key of its row is NULL" in reason for reason in reasons)


def test_a_row_of_the_application_without_a_key(tmp_path: Path) -> None:
    """It is neither changed nor deleted, and its state says so."""
    logto, metadata = open_application(tmp_path, "INT")
    people = metadata.tables["people"]
    logto.map_users(
        people, key="logto", link="email", columns={"email": "email"}, when_deleted="delete"
    )
    app = testing.app(logto)
    create_tables(app.connection, "INT")
    insert = "INSERT INTO people (email, logto) VALUES ('ana@x', NULL), ('bo@x', 'bo')"
    app.connection.execute(sa.text(insert))
    app.deliver(
        make.user_created(id="ana", email="ana@x"), make.user_created(id="bo", email="bo@x")
    )
    app.deliver(make.user_deleted(id="bo"))
    rows = app.connection.execute(sa.select(people).order_by(people.c.email)).all()
    assert rows == [(None, None, "ana@x"), (None, "bo", "bo@x")]
    states = sa.text("SELECT logto_id, state, reason FROM logto_mapped_rows ORDER BY logto_id")
    for (logto_id, state, reason), wanted in zip(
        app.connection.execute(states), ("ana", "bo"), strict=True
    ):
        assert (logto_id, state) == (wanted, "conflict")
        assert "the primary key of its row is NULL" in reason


def test_a_membership_of_the_application_without_a_key(tmp_path: Path) -> None:
    """It stays after the membership ended, and its state says so until then."""
    logto, metadata = open_application(tmp_path, "INT")
    in_groups = metadata.tables["in_groups"]
    logto.map_members(in_groups, organization="team", user="person")
    app = testing.app(logto)
    create_tables(app.connection, "INT")
    app.connection.execute(sa.insert(in_groups).values(person="ana", team="acme"))
    app.deliver(make.organization_membership_updated(id="acme", addedUserIds=["ana"]))
    [reason] = app.connection.scalars(sa.text("SELECT reason FROM logto_mapped_rows"))
    assert "the primary key of its row is NULL" in reason


def test_a_primary_key_that_is_not_unique(tmp_path: Path) -> None:
    """The application declares one that the database doesn't have: no row is changed."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'a.db'}")
    people = sa.Table(
        "people",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False, server_default="0"),
        sa.Column("logto", sa.Text, unique=True),
        sa.Column("email", sa.Text),
    )
    logto = LogtoWebhooks(signing_key=testing.SIGNING_KEY, engine=engine)
    logto.map_users(people, key="logto", columns={"email": "email"}, when_deleted="delete")
    app = testing.app(logto)
    app.connection.execute(sa.text("CREATE TABLE people (id INTEGER, logto TEXT, email TEXT)"))
    insert = "INSERT INTO people VALUES (1, 'ana', 'old@x'), (1, 'bo', 'bo@x')"
    app.connection.execute(sa.text(insert))
    app.deliver(make.user_created(id="ana", email="ana@x"))
    app.deliver(make.user_deleted(id="ana"))
    rows = app.connection.execute(sa.select(people.c.logto, people.c.email)).all()
    assert rows == [("ana", "old@x"), ("bo", "bo@x")]
    [reason] = app.connection.scalars(sa.text("SELECT reason FROM logto_mapped_rows"))
    assert "several rows have its primary key" in reason
