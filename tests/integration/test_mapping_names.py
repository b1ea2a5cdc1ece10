"""Names of the application's columns that a mapping could take for its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks import LogtoWebhooks, testing
from logto_webhooks.testing import make

NAMES = ["logto_key", "logto_link", "pk_0", "end_0", "new_0", "ids", "id", "mapping", "kind", "by"]


@pytest.mark.parametrize("place", ["key", "primary key", "column"])
@pytest.mark.parametrize("name", NAMES)
def test_a_column_may_have_any_name(place: str, name: str, tmp_path: Path) -> None:
    """Rows are linked, inserted, changed and deleted, as with other names."""
    primary_key = name if place == "primary key" else "user_number"
    key = name if place == "key" else "logto_user"
    column = name if place == "column" else "display_name"
    metadata = sa.MetaData()
    users = sa.Table(
        "users",
        metadata,
        sa.Column(primary_key, sa.Integer, primary_key=True),
        sa.Column(key, sa.Text, unique=True),
        sa.Column(column, sa.Text),
        sa.Column("email", sa.Text, unique=True),
    )
    members = sa.Table(
        "members",
        metadata,
        sa.Column(primary_key, sa.Integer, primary_key=True),
        sa.Column(key, sa.Text),
        sa.Column(column, sa.ForeignKey(users.c[primary_key])),
    )
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'a.db'}")
    logto = LogtoWebhooks(signing_key=testing.SIGNING_KEY, engine=engine)
    columns = {column: "name", "email": "email"}
    logto.map_users(users, key=key, link="email", columns=columns, when_deleted="delete")
    logto.map_members(members, organization=key, user=column)
    app = testing.app(logto)
    metadata.create_all(app.connection)
    app.connection.execute(sa.insert(users).values(email="ana@x"))
    app.deliver(
        make.user_created(id="ana", email="ana@x", name="Ana"),
        make.user_created(id="bo", email="bo@x", name="Bo"),
        make.organization_membership_updated(id="acme", addedUserIds=["ana", "bo"]),
    )
    app.deliver(make.user_data_updated(id="ana", email="ana@y", name="Ana Silva"))
    app.deliver(make.user_deleted(id="bo"))
    rows = app.connection.execute(sa.select(users)).all()
    assert rows == [(1, "ana", "Ana Silva", "ana@y")]
    assert app.connection.execute(sa.select(members)).all() == [(1, "acme", 1)]
