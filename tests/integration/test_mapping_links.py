"""Existing rows are linked to the user they belong to, or to nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping.apply import retry_unsettled
from logto_webhooks.mapping.declare_pairs import declare_members
from logto_webhooks.testing import make
from tests.support.mapped_application import KINDS, PLAN, Application, counts_of
from tests.support.stores import Copy, StoreKind

SERVERS = [kind for kind in KINDS if kind != "sqlite"]


def created(name: str, email: str, **fields: Any) -> bytes:
    return make.user_created(id=name, email=email, at=fields.pop("at", 1_000), **fields).body


def insert(application: Application, *emails: str, **values: Any) -> None:
    with application.engine.begin() as connection:
        rows = [PLAN | {"email": email} | values for email in emails]
        connection.execute(sa.insert(application.users), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_letters_that_look_the_same_are_others(kind: StoreKind, tmp_path: Path) -> None:
    """The lower case of the Kelvin sign is a k, and Python takes more than spaces for space."""

    async def live(application: Application) -> None:
        own = application.users
        host = await application.map(link=own.c.email)
        insert(application, "kim@x.example", "bo@x.example\x85", " CLEO@x.example ")
        sent = [
            created("mallory", "\u212aim@x.example"),
            created("bo", "bo@x.example"),
            created("cleo", "cleo@x.example"),
        ]
        await Copy(host).take(sent)
        rows = dict(application.rows(own, "email", "logto_user_id"))
        assert (rows["kim@x.example"], rows["bo@x.example\x85"]) == (None, None)
        assert rows["cleo@x.example"] == "cleo"

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_finds_one_row_for_two_links_none(kind: StoreKind, tmp_path: Path) -> None:
    """Nor does it insert one that could never be linked."""

    async def live(application: Application) -> None:
        own = application.users
        host = await application.map(link=lambda user: own.c.plan == "paid")
        insert(application, "old@x.example")
        await Copy(host).take([created("ana", "ana@x"), created("bo", "bo@x")])
        assert application.rows(own, "logto_user_id") == [(None,)]
        assert (await counts_of(host, own)).conflict == 2

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_was_somebodys_is_nobody_elses(
    kind: StoreKind, forgets: bool, tmp_path: Path
) -> None:
    """The application moved the key to another row; and the mapping was forgotten meanwhile."""

    async def live(application: Application) -> None:
        own = application.users
        host = await application.map(link=own.c.email)
        insert(application, "e1@x", "e2@x")
        copy = Copy(host)
        await copy.take([created("ana", "e1@x")])
        with application.engine.begin() as connection:
            for email, key in (("e1@x", None), ("e2@x", "ana")):
                update = sa.update(own).where(own.c.email == email).values(logto_user_id=key)
                connection.execute(update)
        changed = make.user_data_updated(id="ana", email="e3@x", at=2_000).body
        await copy.take([changed])
        if forgets:
            await host.run(lambda store: store.mappings.remove(own.fullname))
            assert await host.run(lambda store: store.mappings.forget(own.fullname, "")) == (
                1,
                None,
            )
            await application.map(link=own.c.email)
            await application.apply_all()
        await copy.take([created("bo", "e1@x", at=3_000)])
        rows = dict(application.rows(own, "email", "logto_user_id"))
        assert rows == {"e1@x": None, "e3@x": "ana"}

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_key_that_the_application_sets_meanwhile_stays(kind: StoreKind, tmp_path: Path) -> None:
    """The delivery doesn't wait for it either."""

    async def live(application: Application) -> None:
        own = application.users
        host = await application.map(link=own.c.email)
        insert(application, "e@x")
        with application.engine.begin() as connection:
            connection.execute(sa.update(own).values(logto_user_id="owner"))
            await Copy(host).take([created("other", "e@x"), created("bo", "bo@x")])
            assert (await counts_of(host, own)).owed == 1
        await retry_unsettled(host, application.mappings)
        rows = dict(application.rows(own, "email", "logto_user_id"))
        assert rows == {"e@x": "owner", "bo@x": "bo"}
        assert (await counts_of(host, own)).conflict == 1

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_locked_team_holds_up_none_but_its_members(kind: StoreKind, tmp_path: Path) -> None:
    """Their rows need the team's for the foreign key."""

    async def live(application: Application) -> None:
        host = await application.map()
        copy = Copy(host)
        team = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
        users = [created(f"u{n}", f"{n}@x") for n in range(60)]
        await copy.take([team, *users])
        joined = [
            make.event(
                "Organization.Membership.Updated",
                organizationId="acme",
                addedUserIds=[f"u{n}"],
                removedUserIds=[],
                at=2_000 + n,
            ).body
            for n in range(60)
        ]
        with application.engine.begin() as connection:
            connection.execute(sa.select(application.teams).with_for_update())
            async with asyncio.timeout(30):
                await copy.take([*joined, created("later", "later@x", at=3_000)])
            assert ("later",) in application.rows(application.users, "logto_user_id")
        await retry_unsettled(host, application.mappings)
        await application.check()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_row_that_a_trigger_skips_is_a_conflict(kind: StoreKind, tmp_path: Path) -> None:
    """It isn't there, so it isn't well."""

    async def live(application: Application) -> None:
        host = await application.map()
        with application.engine.begin() as connection:
            connection.execute(
                sa.text(
                    "CREATE FUNCTION app.skip() RETURNS trigger LANGUAGE plpgsql AS"
                    " 'BEGIN RETURN NULL; END'"
                )
            )
            for table in (application.users, application.members):
                connection.execute(
                    sa.text(
                        f"CREATE TRIGGER skip BEFORE INSERT ON {table} FOR EACH ROW EXECUTE"
                        " FUNCTION app.skip()"
                    )
                )
        await Copy(host).take([created("ana", "ana@x")])
        assert (await counts_of(host, application.users)).conflict == 1

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_nothing_can_hash_is_a_conflict_of_its_row(
    kind: StoreKind, tmp_path: Path
) -> None:
    """As any error that isn't the database's."""

    async def live(application: Application) -> None:
        own = application.users.c

        def read_email(user: Any) -> object:
            return {"no": "email"} if user.logto_user_id == "bad" else user.email

        columns = {own.email: read_email, own.active: lambda user: True}
        host = await application.map(columns=columns)
        await Copy(host).take([created(name, f"{name}@x") for name in ("ana", "bad", "bo")])
        counts = await counts_of(host, application.users)
        assert (counts.ok, counts.conflict) == (2, 1)

    Application.run(kind, tmp_path, live)


def test_members_of_a_composite_key_are_refused(tmp_path: Path) -> None:
    """One column can't say whose they are."""
    metadata = sa.MetaData()
    sa.Table(
        "accounts",
        metadata,
        sa.Column("tenant", sa.Integer, primary_key=True),
        sa.Column("id", sa.Integer, primary_key=True),
    )
    members = sa.Table(
        "members",
        metadata,
        sa.Column("team", sa.Text, primary_key=True),
        sa.Column("user", sa.ForeignKey("accounts.id"), primary_key=True),
    )
    with pytest.raises(InvalidMapping, match="several columns"):
        declare_members(members, organization="team", user="user")
