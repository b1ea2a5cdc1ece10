"""Primary keys of types whose values a database gives back as other objects."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from logto_webhooks.database.mapped_rows import decode_id, decode_ids, encode_id
from logto_webhooks.database.schema import mapped_rows
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import declare_members
from logto_webhooks.testing import make
from tests.integration.test_mapping_deletions import created, deleted, founded, joined, states_of
from tests.support.mapped_application import KINDS, Application
from tests.support.stores import Copy, StoreKind


class GUID(sa.types.TypeDecorator[uuid.UUID]):
    """A UUID as text, as many applications have it."""

    impl = sa.CHAR(36)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else str(uuid.UUID(str(value)))

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> uuid.UUID | None:
        return None if value is None else uuid.UUID(value)


class StrictGUID(GUID):
    """Takes only UUIDs."""

    impl = sa.CHAR(32)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else value.hex


# A time and a counter, as some applications number their rows: more digits than a float has.
SNOWFLAKES = itertools.count(1_234_567_890_123_456_789)
TYPES: dict[str, tuple[type[sa.types.TypeEngine[Any]], Callable[[], Any]]] = {
    "guid": (GUID, uuid.uuid4),
    "strict": (StrictGUID, uuid.uuid4),
    "uuid": (sa.Uuid, uuid.uuid4),
    "snowflake": (sa.BigInteger, lambda: next(SNOWFLAKES)),
}


@pytest.mark.parametrize(("type_", "make_value"), TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_found_by_it(
    kind: StoreKind,
    type_: type[sa.types.TypeEngine[Any]],
    make_value: Callable[[], Any],
    tmp_path: Path,
) -> None:
    """The row of a membership that is over is deleted; that of a user to whom others refer isn't,
    and one that was unlinked is found again."""

    async def live(application: Application) -> None:
        host, metadata = application.host, sa.MetaData(schema=application.metadata.schema)

        def make_key() -> sa.Column[Any]:
            return sa.Column("id", type_(), primary_key=True, default=make_value)

        people = sa.Table(
            "people",
            metadata,
            make_key(),
            sa.Column("logto_id", sa.Text, unique=True),
            sa.Column("email", sa.Text),
        )
        groups = sa.Table(
            "groups",
            metadata,
            make_key(),
            sa.Column("logto_id", sa.Text, unique=True),
            sa.Column("name", sa.Text),
        )
        in_groups = sa.Table(
            "in_groups",
            metadata,
            make_key(),
            sa.Column("person_id", type_(), sa.ForeignKey(people.c.id)),
            sa.Column("group_id", type_(), sa.ForeignKey(groups.c.id)),
        )
        orders = sa.Table(
            "orders",
            metadata,
            make_key(),
            sa.Column("person_id", type_(), sa.ForeignKey(people.c.id)),
        )
        metadata.drop_all(application.engine)
        metadata.create_all(application.engine)
        users: dict[str, Any] = {"columns": {"email": "email"}, "when_deleted": "delete"}
        teams: dict[str, Any] = {"columns": {"name": "name"}, "when_deleted": "unlink"}
        await application.map_tables(
            declare_entities("user", people, key="logto_id", **users),
            declare_entities("organization", groups, key="logto_id", **teams),
            declare_members(in_groups, organization="group_id", user="person_id"),
        )
        await application.apply_all()
        copy = Copy(host)
        await copy.take([created("ana"), created("bo"), founded("acme"), joined("acme", ["ana"])])
        assert len(application.rows(in_groups, "id")) == 1
        fields: dict[str, Any] = {"organizationId": "acme", "removedUserIds": ["ana"], "at": 3_000}
        await copy.take([make.event("Organization.Membership.Updated", **fields).body])
        assert application.rows(in_groups, "id") == []
        with application.engine.begin() as connection:
            bo = sa.select(people.c.id).where(people.c.logto_id == "bo")
            connection.execute(sa.insert(orders).values(person_id=connection.scalar(bo)))
        await copy.take([deleted("bo", 4_000)])
        assert ("bo",) in application.rows(people, "logto_id")
        assert (await states_of(host, people))["conflict"] == 1
        [(acme,)] = application.rows(groups, "id")
        await copy.take([make.event("Organization.Deleted", id="acme", at=5_000).body])
        assert application.rows(groups, "id", "logto_id") == [(acme, None)]
        back = make.event("Organization.Created", id="acme", name="acme", at=100_000).body
        await copy.take([back])
        assert application.rows(groups, "id", "logto_id") == [(acme, "acme")]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize(
    ("type_", "key"),
    [
        *((type_, uuid.uuid4()) for type_ in (GUID(), StrictGUID(), sa.Uuid())),
        *((sa.BigInteger(), key) for key in (5, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63))),
        (sa.Numeric(), Decimal("12345678901234567890123456789.5")),
        (sa.LargeBinary(), b"\x00\xff"),
        (sa.Text(), '9007199254740993, "a\\ü'),
    ],
)
def test_a_key_that_is_read_is_the_one_that_was_written(
    type_: sa.types.TypeEngine[Any], key: Any
) -> None:
    column: sa.Column[Any] = sa.Column("id", type_)
    decoded = decode_id(encode_id([key]), [column], sqlite.dialect())
    assert [str(value) for value in decoded] == [str(key)]
    assert encode_id(decoded) == encode_id([key])


@pytest.mark.parametrize("stored", ['["acme", 1]', '["old"]', '["5D9A6B1E", null]'])
@pytest.mark.parametrize("kind", KINDS)
def test_a_migration_that_changes_the_primary_key(
    kind: StoreKind, stored: str, tmp_path: Path
) -> None:
    """What was stored about the rows doesn't fit any more. They are found by what they say."""

    async def live(application: Application) -> None:
        host = await application.map(when_deleted="unlink")
        await application.apply_all()
        copy = Copy(host)
        await copy.take([created("ana"), created("bo"), founded("acme"), joined("acme", ["ana"])])
        await copy.take([joined("acme", ["bo"])])
        assert len(application.rows(application.members, "id")) == 2
        change = sa.update(mapped_rows).values(row_id=stored)
        await host.run(lambda store: store.connection.execute(change))
        changed = {"addedUserIds": ["bo"], "removedUserIds": ["ana"]}
        fields: dict[str, Any] = {"organizationId": "acme", "at": 3_000} | changed
        await copy.take([make.event("Organization.Membership.Updated", **fields).body])
        [(user_id,)] = application.rows(application.members, "user_id")
        assert (user_id, "bo") in application.rows(application.users, "id", "logto_user_id")
        assert await states_of(host, application.members) == {"ok": 1}
        await copy.take([deleted("ana", 4_000)])
        assert len(application.rows(application.users, "id")) == 2
        assert (None,) in application.rows(application.users, "logto_user_id")

    Application.run(kind, tmp_path, live)


def test_a_moment_in_a_primary_key_is_the_same_in_each_time_zone() -> None:
    """A database gives it back in that of the session."""
    moment = datetime(2026, 5, 1, 12, tzinfo=UTC)
    elsewhere = moment.astimezone(timezone(timedelta(hours=5)))
    assert encode_id([1, moment]) == encode_id([1, elsewhere])
    column = sa.Column("at", sa.DateTime(timezone=True))
    text = encode_id([elsewhere])
    assert decode_ids([text], [column], sqlite.dialect())[text] == (moment,)
