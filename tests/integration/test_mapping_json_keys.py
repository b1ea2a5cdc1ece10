"""A key inside a JSON document: nothing else of the document changes, nor loses a digit."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.testing import make
from tests.support.mapped_application import KINDS, Application
from tests.support.stores import Copy, StoreKind

NUMBERS = '"discord": 1234567890123456789, "price": 0.1234567890123456789, "far": 1e400'
OWN = '{%s, "none": null, "logto": {"plan": "paid", "ids": [1, {"a": null}]}, "it\'s": "ü\\"%%"}'
DOCUMENT = OWN % NUMBERS
CREATED = make.user_created(id="ana", email="ana@x", at=1_000).body
DELETED = make.user_deleted(id="ana", at=100_000).body


def read(text: str) -> Any:
    """Read JSON, and every digit of its numbers."""
    return json.loads(text, parse_int=Decimal, parse_float=Decimal)


def make_people(application: Application, document: sa.types.TypeEngine[Any]) -> sa.Table:
    people = sa.Table(
        "people",
        application.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("email", sa.Text),
        sa.Column("settings", document),
    )
    people.create(application.engine)
    return people


async def map_people(application: Application, people: sa.Table, *path: str, **how: Any) -> Copy:
    key: Any = people.c.settings
    for name in path:
        key = key[name]
    columns = {"email": "email"}
    users = declare_entities("user", people, key=key, link="email", columns=columns, **how)
    return Copy(await application.map_tables(users))


@pytest.mark.parametrize("path", [("logtoUserId",), ("logto", "id"), ("new", "it's", "a 50%")])
@pytest.mark.parametrize("document", [sa.JSON(), sa.JSON().with_variant(JSONB(), "postgresql")])
@pytest.mark.parametrize("kind", [*KINDS, "psycopg"])
def test_only_the_key_changes(
    kind: StoreKind, document: sa.types.TypeEngine[Any], path: tuple[str, ...], tmp_path: Path
) -> None:
    """When a row is linked, and unlinked."""

    async def live(application: Application) -> None:
        people = make_people(application, document)

        def read_settings() -> Any:
            text = sa.select(sa.cast(sa.type_coerce(people.c.settings, sa.Text), sa.Text))
            with application.engine.connect() as connection:
                return read(connection.scalars(text).one())

        def find_key() -> Any:
            found = read_settings()
            for name in path:
                found = found.get(name, {})
            return found or None

        def remove(settings: Any) -> Any:
            """The document without the key, and what was made for it."""
            inner = settings
            for name in path[:-1]:
                inner = inner[name]
            inner.pop(path[-1], None)
            if path[0] == "new":
                settings.pop("new")
            return settings

        type_name = document.dialect_impl(application.engine.dialect).__visit_name__
        value = ":own" if kind == "sqlite" else f"CAST(:own AS {type_name})"
        insert = sa.text(
            f"INSERT INTO {people.fullname} (email, settings) VALUES (:email, {value})"
        )
        with application.engine.begin() as connection:
            connection.execute(insert, {"email": "ana@x", "own": DOCUMENT})
        own = read(DOCUMENT)
        copy = await map_people(application, people, *path, when_deleted="unlink")
        for body, key in ((CREATED, "ana"), (DELETED, None)):
            await copy.take([body])
            assert find_key() == key
            assert remove(read_settings()) == own
        assert [one.changed for one in await application.apply_again()] == [0]

    Application.run(kind, tmp_path, live)
