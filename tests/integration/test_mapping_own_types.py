"""Columns whose types, defaults and values are the application's own."""

from __future__ import annotations

import enum
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.testing import make
from tests.integration.test_mapping_forms import check_nothing_differs, create, register
from tests.integration.test_mapping_roles import RoleApplication
from tests.support.mapped_application import KINDS
from tests.support.stores import Copy, StoreKind


class Email:
    """A value object, as libraries of types have."""

    def __init__(self, text: str) -> None:
        self.text = text


class EmailType(sa.types.TypeDecorator[Any]):
    """Gives back objects, and takes texts, too."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return value.text if isinstance(value, Email) else value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return None if value is None else Email(value)


class LowerCase(sa.types.TypeDecorator[Any]):
    """Changes what it stores."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return value and value.lower()


class JsonText(sa.types.TypeDecorator[Any]):
    """Stores JSON as text."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return json.dumps(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return json.loads(value)


def normalize(context: Any) -> str:
    """What SQLAlchemy's docs show for a default that depends on another column."""
    return str(context.get_current_parameters()["email"]).strip("<>")


def run(kind: StoreKind, folder: Path, live: Callable[[RoleApplication], Awaitable[None]]) -> None:
    RoleApplication.run(kind, folder, live)


async def map_forms(application: RoleApplication, table: sa.Table, **options: Any) -> Copy:
    copy = Copy(await application.map())
    values: dict[str, Any] = {"key": "logto_user_id", "when_deleted": "delete"}
    application.mappings.add(declare_entities("user", table, **values | options))
    await register(application)
    return copy


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_type_changes_is_equal(kind: StoreKind, tmp_path: Path) -> None:
    """A row is written only if something changed."""

    async def live(application: RoleApplication) -> None:
        types = {
            "email": EmailType(),
            "name": LowerCase(),
            "pairs": JsonText(),
            "half": sa.Float(24),
        }
        table = create(application, types)
        columns = {
            "email": "email",
            "name": "name",
            "pairs": lambda user: (1, ("a",)),
            "half": lambda user: 0.1,
        }
        copy = await map_forms(application, table, columns=columns)
        await copy.take([make.user_created(id="ana", name="Ana", email="ana@x.example").body])
        assert application.rows(table, "name", "pairs") == [("ana", [1, ["a"]])]
        await check_nothing_differs(application)

    run(kind, tmp_path, live)


@pytest.mark.parametrize("column", ["email", "mail"])
@pytest.mark.parametrize("column_type", [EmailType(), sa.Text()], ids=["objects", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_existing_row_is_linked_by_its_email(
    kind: StoreKind, column_type: Any, column: str, tmp_path: Path
) -> None:
    """Whatever the column is called, and whatever its type gives back."""

    async def live(application: RoleApplication) -> None:
        table = create(application, {column: column_type})
        with application.engine.begin() as connection:
            connection.execute(sa.insert(table).values({column: " Ana@X.example"}))
        copy = await map_forms(application, table, columns={column: "email"}, link=column)
        await application.apply_all()
        await copy.take([make.user_created(id="ana", email="ana@x.example").body])
        assert application.rows(table, "id", "logto_user_id") == [(1, "ana")]

    run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_that_depends_on_another_column_sees_it(kind: StoreKind, tmp_path: Path) -> None:
    """When a row is inserted, and when it changes."""

    async def live(application: RoleApplication) -> None:
        table = create(application, {"email": sa.Text(), "name": sa.Text()})
        depending = sa.Column("normal", sa.Text, default=normalize, onupdate=normalize)
        table.append_column(depending)
        with application.engine.begin() as connection:
            table.drop(connection)
            table.create(connection)
        columns = {"email": lambda user: f"<{user.email}>"}
        copy = await map_forms(application, table, columns=columns)
        await copy.take([make.user_created(id="ana", email="ana@x.example", at=1_000).body])
        assert application.rows(table, "normal") == [("ana@x.example",)]
        await copy.take([make.user_data_updated(id="ana", email="bea@x.example", at=2_000).body])
        assert application.rows(table, "email", "normal") == [("<bea@x.example>", "bea@x.example")]

    run(kind, tmp_path, live)


@pytest.mark.postgres
def test_a_text_that_is_too_long_for_an_array_is_a_conflict(tmp_path: Path) -> None:
    """SQLAlchemy's cast would cut it off."""

    async def live(application: RoleApplication) -> None:
        table = create(application, {"tags": sa.ARRAY(sa.String(5))})
        columns = {"tags": lambda user: [user.name]}
        copy = await map_forms(application, table, columns=columns)
        for name in ("admin", "administrator"):
            await copy.take([make.user_created(id=name, name=name).body])
        assert application.rows(table, "logto_user_id", "tags") == [("admin", ["admin"])]
        conflict = await application.host.read(lambda store: store.mappings.find_oldest("conflict"))
        assert conflict is not None
        assert "longer than the 5 letters of an item of tags" in str(conflict.reason)

    run("postgres-thread", tmp_path, live)


class Plan(enum.Enum):
    """Its names aren't its values."""

    basic = "free"
    free = "trial"


@pytest.mark.parametrize("in_list", [False, True])
@pytest.mark.postgres
def test_a_text_is_the_name_of_an_enum(in_list: bool, tmp_path: Path) -> None:
    """As SQLAlchemy takes it: another member may have it as its value."""

    async def live(application: RoleApplication) -> None:
        column_type = sa.Enum(Plan, native_enum=False)
        table = create(application, {"plan": sa.ARRAY(column_type) if in_list else column_type})
        columns = {"plan": lambda user: [user.name] if in_list else user.name}
        copy = await map_forms(application, table, columns=columns)
        await copy.take([make.user_created(id="ana", name="basic", at=1_000).body])
        await check_nothing_differs(application)
        await copy.take([make.user_data_updated(id="ana", name="free", at=2_000).body])
        assert application.rows(table, "plan") == [([Plan.free] if in_list else Plan.free,)]

    run("postgres-thread", tmp_path, live)


class Number(sa.types.TypeDecorator[Any]):
    """A typed id, whose objects it doesn't take as text."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return value and value[0]

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return value and (value,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_primary_key_that_cannot_be_stored_is_a_conflict(kind: StoreKind, tmp_path: Path) -> None:
    """Otherwise, its row could never be found again, to be deleted, for example."""

    async def live(application: RoleApplication) -> None:
        table = sa.Table(
            "forms",
            application.metadata,
            sa.Column("id", Number, primary_key=True),
            sa.Column("logto_user_id", sa.Text),
        )
        with application.engine.begin() as connection:
            table.create(connection)
        copy = await map_forms(application, table, columns={})
        await copy.take([make.user_created(id="ana").body])
        conflict = await application.host.read(lambda store: store.mappings.find_oldest("conflict"))
        assert conflict is not None
        assert "the type of id doesn't take as text" in str(conflict.reason)

    run(kind, tmp_path, live)
