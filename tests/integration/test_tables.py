"""The application's own models and Alembic beside our tables: joins, foreign keys, autogenerate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata, produce_migrations
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import logto_webhooks
from logto_webhooks import LogtoWebhooks, tables
from logto_webhooks.database import migrate
from logto_webhooks.testing import SIGNING_KEY
from tests.support import postgres


@pytest.fixture(params=["sqlite", "postgresql", "postgresql, in a schema"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[sa.Engine, str | None]]:
    """A database that is migrated, and the schema with our tables."""
    schema = "ours" if "schema" in request.param else None
    if request.param == "sqlite":
        engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
        logto = LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine)
        logto.call(logto.migrate())
        yield engine, schema
        engine.dispose()
        return
    with postgres.own_database() as url:
        engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
        with engine.begin() as connection:
            migrate.upgrade(connection, schema)
        yield engine, schema
        engine.dispose()


def models(schema: str | None, named: bool) -> Any:
    """An application's models, whose foreign keys are columns, or names."""

    class Base(DeclarativeBase): ...

    metadata = Base.metadata if named else None
    public = tables.public_tables(schema=schema, metadata=metadata)
    dot = f"{schema}." if schema else ""

    def refers(column: sa.Column[Any]) -> sa.ForeignKey:
        return sa.ForeignKey(f"{dot}{column.table.name}.{column.name}" if named else column)

    class LogtoUser(Base):
        __table__ = public.users

    class Invoice(Base):
        __tablename__ = "invoices"
        id: Mapped[int] = mapped_column(primary_key=True)
        owner: Mapped[str] = mapped_column(refers(public.users.c.logto_user_id))
        payer: Mapped[str | None] = mapped_column(
            refers(public.organizations.c.logto_organization_id)
        )

    return Base, LogtoUser, Invoice


def compared(connection: sa.Connection, **options: Any) -> MigrationContext:
    return MigrationContext.configure(connection, opts={"include_schemas": True} | options)


@pytest.mark.parametrize("named", [False, True], ids=["columns", "names"])
def test_autogenerate_makes_what_is_the_applications_and_nothing_else(
    place: tuple[sa.Engine, str | None], named: bool
) -> None:
    """A table with foreign keys to ours is created; after that nothing differs."""
    engine, schema = place
    base, _, _ = models(schema, named)
    with engine.begin() as connection:
        context = compared(connection, include_object=tables.include_object)
        script = produce_migrations(context, base.metadata)
        assert script.upgrade_ops is not None
        [made] = script.upgrade_ops.as_diffs()
        assert (made[0], made[1].name) == ("add_table", "invoices")
        for operation in script.upgrade_ops.ops:
            Operations(context).invoke(operation)
    with engine.connect() as connection:
        keys = sa.inspect(connection).get_foreign_keys("invoices")
        assert {each["referred_table"] for each in keys} == {"logto_users", "logto_organizations"}
        context = compared(connection, include_object=tables.include_object)
        assert compare_metadata(context, base.metadata) == []
        plain = compare_metadata(compared(connection), base.metadata)
        assert any(each[0] == "remove_table" for each in plain if isinstance(each, tuple))


def test_a_table_of_a_newer_release_stays(place: tuple[sa.Engine, str | None]) -> None:
    """It is known by its prefix; but a model of the application's with that prefix is its own."""
    engine, schema = place

    class Base(DeclarativeBase): ...

    class Link(Base):
        __tablename__ = "logto_links"
        id: Mapped[int] = mapped_column(primary_key=True)

    dot = f"{schema}." if schema else ""
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE TABLE {dot}logto_newer (id INTEGER)"))
        context = compared(connection, include_object=tables.include_object)
        differences = compare_metadata(context, Base.metadata)
    assert [(each[0], each[1].name) for each in differences] == [("add_table", "logto_links")]


def test_rows_are_read_with_usual_types(place: tuple[sa.Engine, str | None]) -> None:
    """Times are datetimes, and JSON is read; a class of the application's maps the table."""
    engine, schema = place
    _, user, _ = models(schema, named=False)
    dot = f"{schema}." if schema else ""
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                f"INSERT INTO {dot}logto_users (id, logto_user_id, profile, identities,"
                " custom_data, is_suspended, created_at)"
                " VALUES ('0190c0de-0000-7000-8000-000000000001', 'ana',"
                " '{}', '{}', '{\"a\": 1}', false, '2026-11-24 01:55:35.917000')"
            )
        )
    with Session(engine) as session:
        ana = session.scalars(sa.select(user)).one()
        assert (ana.id, ana.custom_data) == ("0190c0de-0000-7000-8000-000000000001", {"a": 1})
        assert ana.created_at.year == 2026


def test_tables_are_named_by_the_package() -> None:
    """`dir` shows what is imported only when it is asked for."""
    assert "tables" in dir(logto_webhooks)
