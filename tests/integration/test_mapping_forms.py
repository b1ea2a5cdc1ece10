"""What a database gives back in another form than it got is equal to it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import declare_members
from logto_webhooks.testing import make
from tests.integration.test_mapping_roles import (
    ACME,
    ANA,
    JOINED,
    RoleApplication,
    read_member_roles,
)
from tests.support import postgres
from tests.support.mapped_application import KINDS, learn
from tests.support.stores import Copy, StoreKind

MOMENT = datetime(2026, 2, 3, 15, 5, 6, 987_654, tzinfo=UTC)
AUCKLAND = ZoneInfo("Pacific/Auckland")  # where it is the 4th
UUID = "5D9A6B1E-0C6F-4B62-9C06-6D1B3E6A7F10"


def create(application: RoleApplication, types: Mapping[str, Any]) -> sa.Table:
    """A table with columns of these types, and of Logto's ids."""
    columns = [sa.Column(name, column_type) for name, column_type in types.items()]
    ids = [sa.Column(name, sa.Text) for name in ("logto_user_id", "logto_organization_id")]
    primary_key = sa.Column("id", sa.Integer, primary_key=True)
    table = sa.Table("forms", application.metadata, primary_key, *ids, *columns)
    with application.engine.begin() as connection:
        table.create(connection)
    return table


async def register(application: RoleApplication) -> None:
    registered = application.mappings.registered
    await application.host.run(lambda store: store.mappings.register(registered))


async def check_nothing_differs(application: RoleApplication) -> None:
    assert await application.problems() == []
    assert [each.changed for each in await application.apply_again() if each.changed] == []


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_roles(kind: StoreKind, tmp_path: Path) -> None:
    """In a JSON column, and in an array."""

    async def live(application: RoleApplication) -> None:
        array = sa.JSON() if kind == "sqlite" else sa.ARRAY(sa.Text)
        table = create(application, {"roles": sa.JSON(), "role_ids": array})
        host: HandlerRunner = await application.map()
        ends: dict[str, Any] = {
            "organization": table.c.logto_organization_id,
            "user": table.c.logto_user_id,
        }
        lists = {"roles": "roles", "role_ids": "role_ids"}
        application.mappings.add(declare_members(table, **ends, columns=lists))
        await register(application)
        await Copy(host).take([ANA, ACME, JOINED])
        await check_nothing_differs(application)
        await learn(host, read_member_roles({"o1": "admin", "o2": "billing"}, 3_000))
        assert application.rows(table, *lists) == [(["admin", "billing"], ["o1", "o2"])]
        await check_nothing_differs(application)
        await learn(host, read_member_roles({"o2": "billing"}, 4_000))
        assert application.rows(table, *lists) == [(["billing"], ["o2"])]

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_what_functions_and_paths_return(kind: StoreKind, tmp_path: Path) -> None:
    """Tuples, sets, and numbers as keys; UUIDs as text; numbers in columns of text, and text in
    those of numbers, where the driver sends them; what a column rounds."""
    forms: dict[str, tuple[Any, Any]] = {
        "document": (sa.JSON(), lambda user: {"pairs": [(True, ("a",))]}),
        "shown": (sa.Uuid(as_uuid=False), "custom_data.uuid"),
    }
    if kind != "sqlite":
        forms |= {
            "tags": (ARRAY(sa.Text), lambda user: ("b", "a")),
            "frozen": (ARRAY(sa.Text, as_tuple=True), lambda user: ["b", "a"]),
        }
    if kind != "asyncpg":
        forms |= {
            "text": (sa.Text(), "custom_data.number"),
            "number": (sa.Integer(), "custom_data.text"),
            "numbered": (sa.JSON(), lambda user: {2: True}),
        }
    if kind != "sqlite":
        forms |= {
            "second": (TIMESTAMP(timezone=True, precision=0), lambda user: MOMENT),
            "naive": (TIMESTAMP(precision=3), lambda user: MOMENT.replace(tzinfo=None)),
            "price": (sa.Numeric(6, 2), lambda user: Decimal("9.995")),
        }
    if kind == "postgres-thread":
        forms |= {
            "cents": (sa.Numeric(6, 2), lambda user: 9.999),
            "any_order": (ARRAY(sa.Text), lambda user: {f"tag {n}" for n in range(9)}),
            "matrix": (ARRAY(sa.Integer), lambda user: ((1, 2), (3, 4))),
            "parsed": (sa.Uuid(), "custom_data.uuid"),
        }

    async def live(application: RoleApplication) -> None:
        table = create(application, {name: column_type for name, (column_type, _) in forms.items()})
        host: HandlerRunner = await application.map()
        columns = {name: source for name, (_, source) in forms.items()}
        application.mappings.add(
            declare_entities(
                "user",
                table,
                key=table.c.logto_user_id,
                columns=columns,
                when_deleted="delete",
            )
        )
        await register(application)
        custom_data = {"uuid": UUID, "number": 5, "text": "7"}
        await Copy(host).take([make.user_created(id="ana", customData=custom_data).body])
        [document] = application.rows(table, "document")
        assert document == ({"pairs": [[True, ["a"]]]},)
        await check_nothing_differs(application)

    RoleApplication.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_days_are_those_of_utc(kind: StoreKind, tmp_path: Path) -> None:
    """Whatever the session's time zone is."""

    async def live(application: RoleApplication) -> None:
        columns: dict[str, Any] = {"day": "created_at"}
        columns["own_day"] = lambda user: MOMENT.astimezone(AUCKLAND)
        table = create(application, dict.fromkeys(columns, sa.Date()))
        host: HandlerRunner = await application.map()
        if kind != "sqlite":
            database = application.engine.url.database
            set_zone = f"ALTER DATABASE \"{database}\" SET timezone = 'Pacific/Auckland'"
            with application.engine.begin() as connection:
                connection.execute(sa.text(set_zone))
        key = table.c.logto_user_id
        mapping = declare_entities("user", table, key=key, columns=columns, when_deleted="keep")
        application.mappings.add(mapping)
        await register(application)
        at = round(MOMENT.timestamp() * 1000)
        await Copy(host).take([make.user_created(id="ana", at=at).body])
        assert application.rows(table, *columns) == [(MOMENT.date(), MOMENT.date())]
        await check_nothing_differs(application)

    try:
        RoleApplication.run(kind, tmp_path, live)
    finally:
        if kind != "sqlite":
            with postgres.sync_engine().begin() as connection:
                database = connection.engine.url.database
                connection.execute(sa.text(f'ALTER DATABASE "{database}" RESET timezone'))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_column_rounds_or_fills_up_is_equal(kind: StoreKind, tmp_path: Path) -> None:
    """And what it has as a moment or a float."""

    async def live(application: RoleApplication) -> None:
        types = {"code": sa.CHAR(9), "score": sa.REAL, "day": sa.DateTime, "rate": sa.Float}
        table = create(application, types)
        values: dict[str, Any] = {
            "code": "username",
            "score": lambda user: 0.1,
            "day": lambda user: date(2026, 1, 2),
            "rate": lambda user: Decimal("0.1"),
        }
        options: dict[str, Any] = {"key": "logto_user_id", "when_deleted": "delete"}
        await application.map_tables(declare_entities("user", table, columns=values, **options))
        await application.apply_all()
        await Copy(application.host).take([make.user_created(id="ana", username="ana").body])
        assert len(application.rows(table, "code")) == 1
        await check_nothing_differs(application)

    RoleApplication.run(kind, tmp_path, live)
