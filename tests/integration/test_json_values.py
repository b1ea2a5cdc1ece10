"""JSON of Logto's is compared as JSON: `true` isn't 1, and `false` isn't 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from logto_webhooks import LogtoWebhooks, events, testing
from logto_webhooks.reconcile.fetch import _compare
from logto_webhooks.records.drift import agrees, differing
from logto_webhooks.records.merge import merge
from logto_webhooks.records.record import ApiRead, Key, Record
from logto_webhooks.testing import make

PAIRS: list[tuple[Any, Any]] = [
    (0, False),
    (True, 1),
    ([1], [True]),
    ({"on": 0}, {"on": False}),
]


class Packed(sa.types.TypeDecorator[Any]):
    """A type of the application's own."""

    impl = sa.JSON
    cache_ok = True


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "own_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_id: Mapped[str | None] = mapped_column(unique=True)
    custom_data: Mapped[Any] = mapped_column(sa.JSON)
    beta: Mapped[Any] = mapped_column(Packed)
    flags: Mapped[int]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_changed_value_reaches_rows_and_handlers(tmp_path: Path, before: Any, after: Any) -> None:
    logto = LogtoWebhooks(
        signing_key=testing.SIGNING_KEY, engine=sa.create_engine(f"sqlite:///{tmp_path / 'a.db'}")
    )
    logto.map_users(
        User,
        key=User.logto_id,
        columns={
            User.custom_data: "custom_data",
            User.beta: "custom_data.beta",
            User.flags: lambda user: user.custom_data["beta"] is False,  # an integer column
        },
        when_deleted="keep",
    )
    changes = []

    @logto.on(events.LocalUserUpdated)
    def note(event: events.LocalUserUpdated) -> None:
        changes.append(event.changes)

    app = testing.app(logto)
    Base.metadata.create_all(app.connection)
    for value in (before, after):
        identities = {"google": {"userId": "g1", "details": {"verified": value}}}
        app.deliver(
            make.user_data_updated(id="ana", customData={"beta": value}, identities=identities)
        )
    [user] = Session(app.connection).scalars(sa.select(User))
    details = app.connection.scalar(sa.text("SELECT details FROM logto_user_identities"))
    seen = [user.custom_data["beta"], user.beta, json.loads(details)["verified"]]
    assert json.dumps(seen) == json.dumps([after] * 3)
    assert [sorted(change) for change in changes] == [["custom_data", "identities"]]


def test_a_document_with_the_key_keeps_its_default(tmp_path: Path) -> None:
    """Only the key is written in it, at the insertion and at each change."""
    logto = LogtoWebhooks(
        signing_key=testing.SIGNING_KEY, engine=sa.create_engine(f"sqlite:///{tmp_path / 'a.db'}")
    )
    logto.map_users(
        User,
        key=User.custom_data["logto"]["id"],
        columns={User.beta: "name"},
        create_defaults={User.custom_data: {"theme": "dark"}, User.flags: 0},
        when_deleted="unlink",
    )
    app = testing.app(logto)
    Base.metadata.create_all(app.connection)
    for name in ("Ana", "Ana Silva"):
        app.deliver(make.user_data_updated(id="ana", name=name))
        [user] = Session(app.connection).scalars(sa.select(User))
        assert (user.beta, user.custom_data) == (name, {"theme": "dark", "logto": {"id": "ana"}})
    app.deliver(make.user_deleted(id="ana"))
    [user] = Session(app.connection).scalars(sa.select(User))
    assert user.custom_data == {"theme": "dark", "logto": {}}


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_comparison_with_logto_sees_it(before: Any, after: Any) -> None:
    key = Key("user", "ana")
    whole = {"own": {}, "suspension": False, "profile": {}}

    def read(value: Any, at: int) -> ApiRead:
        return ApiRead(key, whole | {"custom_data": {"beta": value}}, at, at)

    ours = merge(Record(key), read(before, 1_000))
    assert agrees(ours, read(before, 2_000))
    assert not agrees(ours, read(after, 2_000))
    assert differing(ours, merge(ours, read(after, 2_000))) == ("custom_data",)
    assert _compare([ours], [key], [read(before, 2_000)]).differ == []
    assert _compare([ours], [key], [read(after, 2_000)]).differ == ["custom_data"]
