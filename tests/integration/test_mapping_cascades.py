"""Foreign keys of the database that do more than the application's tables say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.errors import MapFileInvalid
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.cascades import read_cascades
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import declare_members, declare_user_roles
from logto_webhooks.mapping.file import map_tables, parse_map_file
from logto_webhooks.mapping.own_schema import inspect_own_schema
from logto_webhooks.mapping.report import report_missing
from tests.support.mapped_application import KINDS, Application
from tests.support.stores import StoreKind

Action = str | None


def make_tables(metadata: sa.MetaData, on_delete: Action, on_update: Action) -> sa.MetaData:
    """Tables whose foreign keys have these actions."""
    schema = f"{metadata.schema}." if metadata.schema else ""

    def refer(name: str, referred: str) -> sa.Column[Any]:
        key = sa.ForeignKey(f"{schema}{referred}", ondelete=on_delete, onupdate=on_update)
        return sa.Column(name, key)

    def make(name: str, *columns: sa.Column[Any]) -> None:
        sa.Table(name, metadata, sa.Column("id", sa.Integer, primary_key=True), *columns)

    make("Companies", sa.Column("logto_id", sa.Text, unique=True))
    make("rooms", refer("company", "Companies.id"))
    make("people", sa.Column("logto_id", sa.Text, unique=True), refer("room", "rooms.id"))
    key = sa.ForeignKey(f"{schema}people.logto_id", ondelete=on_delete, onupdate=on_update)
    make("profiles", sa.Column("logto_id", sa.Text, key, unique=True))
    make("seats", refer("company", "Companies.id"), refer("person", "people.id"))
    role = sa.Column("role", sa.Text)
    make("people_roles", refer("person", "people.id"), role, refer("seat", "seats.id"))
    return metadata


def map_all(metadata: sa.MetaData, when_deleted: Any) -> Mappings:
    tables = {table.name: table for table in metadata.tables.values()}
    options: dict[str, Any] = {"key": "logto_id", "columns": {}, "when_deleted": when_deleted}
    mappings = Mappings()
    mappings.add(declare_entities("organization", tables["Companies"], **options))
    mappings.add(declare_entities("user", tables["people"], **options))
    mappings.add(declare_entities("user", tables["profiles"], **options))
    mappings.add(declare_members(tables["seats"], organization="company", user="person"))
    mappings.add(declare_user_roles(tables["people_roles"], user="person", role="role"))
    return mappings


CASES: dict[tuple[Action, Action, str], list[str]] = {
    ("CASCADE", None, "delete"): [
        "ON DELETE CASCADE on {}people (room) deletes rows with those of {}Companies, although "
        "their own records still exist",
        "ON DELETE CASCADE on {}profiles (logto_id) deletes rows with those of {}people, although "
        "their own records still exist",
        "ON DELETE CASCADE on {}people_roles (seat) deletes rows with those of {}seats, although "
        "their own records still exist",
    ],
    ("SET NULL", None, "delete"): [
        "ON DELETE SET NULL on {}profiles (logto_id) changes keys with rows of {}people, so a "
        "deleted user's row stays",
        "ON DELETE SET NULL on {}seats (company) leaves rows without their row of {}Companies, so "
        "they are never deleted",
        "ON DELETE SET NULL on {}seats (person) leaves rows without their row of {}people, so they "
        "are never deleted",
        "ON DELETE SET NULL on {}people_roles (person) leaves rows without their row of {}people, "
        "so they are never deleted",
    ],
    (None, "CASCADE", "unlink"): [
        "ON UPDATE CASCADE on {}profiles (logto_id) changes keys with rows of {}people, so a "
        "deleted user's row stays",
    ],
    (None, "CASCADE", "delete"): [],
    (None, None, "delete"): [],
}


@pytest.mark.parametrize(("on_delete", "on_update", "when_deleted"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_harmful_foreign_keys_of_the_database_are_found(
    kind: StoreKind,
    on_delete: Action,
    on_update: Action,
    when_deleted: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The application's tables don't say what these do. When it starts, it warns."""

    async def live(application: Application) -> None:
        if kind == "sqlite":
            application.enforce_foreign_keys()
        schema = application.metadata.schema
        made = make_tables(sa.MetaData(schema=schema), on_delete, on_update)
        made.create_all(application.engine)
        mappings = map_all(make_tables(sa.MetaData(schema=schema), None, None), when_deleted)
        host = application.host
        own_schema = await host.read(lambda store: inspect_own_schema(store, mappings))
        own = f"{schema}." if schema else ""
        expected = [text.format(own, own) for text in CASES[on_delete, on_update, when_deleted]]
        assert own_schema.cascades == expected
        with caplog.at_level(logging.WARNING, "logto_webhooks"):
            await report_missing(host, mappings, lambda event: None)
        warnings = [f"{harm}: drop this action in the database." for harm in expected]
        assert [record.getMessage() for record in caplog.records] == warnings

    Application.run(kind, tmp_path, live)


def test_sqlite_does_nothing_unless_it_enforces_foreign_keys(tmp_path: Path) -> None:
    """Then there is nothing to warn about."""

    async def live(application: Application) -> None:
        make_tables(sa.MetaData(), "CASCADE", None).create_all(application.engine)
        mappings = map_all(make_tables(sa.MetaData(), None, None), "delete")
        own_schema = await application.host.read(lambda store: inspect_own_schema(store, mappings))
        assert own_schema.cascades == []

    Application.run("sqlite", tmp_path, live)


def test_sqlite_foreign_keys_without_columns_refer_to_the_primary_key(tmp_path: Path) -> None:
    """And the names of tables and columns can be written in other letters."""

    async def live(application: Application) -> None:
        application.enforce_foreign_keys()
        with application.engine.begin() as connection:
            for statement in (
                "CREATE TABLE people (logto_id TEXT PRIMARY KEY)",
                "CREATE TABLE accounts (id TEXT PRIMARY KEY REFERENCES People ON DELETE CASCADE)",
                "CREATE TABLE seats (team TEXT, Person TEXT REFERENCES ACCOUNTS ON DELETE CASCADE,"
                " host TEXT REFERENCES accounts ON DELETE CASCADE)",
            ):
                connection.execute(sa.text(statement))
        metadata = sa.MetaData()
        people = sa.Table("people", metadata, sa.Column("logto_id", sa.Text, primary_key=True))
        columns = [sa.Column(name, sa.Text) for name in ("team", "person", "host")]
        seats = sa.Table("seats", metadata, *columns, sa.PrimaryKeyConstraint("team", "person"))
        mappings = Mappings()
        options: dict[str, Any] = {"key": "logto_id", "columns": {}, "when_deleted": "delete"}
        mappings.add(declare_entities("user", people, **options))
        mappings.add(declare_members(seats, organization="team", user="person"))
        own_schema = await application.host.read(lambda store: inspect_own_schema(store, mappings))
        assert own_schema.cascades == [
            "ON DELETE CASCADE on seats (host) deletes rows with those of people, although their "
            "own records still exist"
        ]

    Application.run("sqlite", tmp_path, live)


def test_an_emptied_column_is_known_if_the_table_says_so(tmp_path: Path) -> None:
    """Then the rows are found."""

    async def live(application: Application) -> None:
        application.enforce_foreign_keys()
        users = application.users
        key = sa.ForeignKey(users.c.id, ondelete="SET NULL")
        seats = sa.Table(
            "seats",
            application.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("team", sa.Text),
            sa.Column("person", key),
        )
        seats.create(application.engine)
        mappings = Mappings()
        options: dict[str, Any] = {"create": False, "columns": {}, "when_deleted": "delete"}
        mappings.add(declare_entities("user", users, key="logto_user_id", **options))
        mappings.add(declare_members(seats, organization="team", user="person"))
        own_schema = await application.host.read(lambda store: inspect_own_schema(store, mappings))
        assert own_schema.cascades == []

    Application.run("sqlite", tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_whose_rows_would_go_by_way_of_another_table_is_refused(
    kind: StoreKind, tmp_path: Path
) -> None:
    """The file doesn't name the table in between."""

    async def live(application: Application) -> None:
        if kind == "sqlite":
            application.enforce_foreign_keys()
        metadata = sa.MetaData(schema=application.metadata.schema)
        make_tables(metadata, "CASCADE", None).create_all(application.engine)
        own = f"{metadata.schema}." if metadata.schema else ""
        options = 'key = "logto_id"\nwhen_deleted = "delete"\n'
        sections = [
            f'[map.{kind}]\ntable = "{own}{table}"\n{options}'
            for kind, table in (("users", "people"), ("organizations", "Companies"))
        ]
        both = parse_map_file("map.toml", "".join(sections))
        with pytest.raises(MapFileInvalid) as error:
            await map_tables(application.host, both, Mappings())
        assert f"{own}people: because of ON DELETE CASCADE on room, a row" in str(error.value)
        for section in sections:
            await map_tables(application.host, parse_map_file("map.toml", section), Mappings())

    Application.run(kind, tmp_path, live)


@pytest.mark.postgres
def test_a_schema_that_may_not_be_used_stops_nothing(tmp_path: Path) -> None:
    """Its rows can't be written, which is reported elsewhere."""

    async def live(application: Application) -> None:
        with application.engine.connect() as connection:  # never committed
            connection.execute(sa.text("CREATE ROLE nobody_at_all"))
            connection.execute(sa.text("SET LOCAL ROLE nobody_at_all"))
            cascades = read_cascades(connection, application.declare().all)
            assert list(cascades.list_harms()) == []

    Application.run("postgres-thread", tmp_path, live)
