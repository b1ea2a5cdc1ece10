"""Existing rows are linked to the user they belong to, or to nobody."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.database import runner
from logto_webhooks.database.schema import records
from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping import functions
from logto_webhooks.mapping.apply import UNSETTLED, SlowRows, apply_all, retry_unsettled
from logto_webhooks.mapping.check import Difference, find_differences
from logto_webhooks.mapping.declare_pairs import declare_members
from logto_webhooks.mapping.links import OF_ANOTHER
from logto_webhooks.testing import make
from tests.support import postgres
from tests.support.mapped_application import KINDS, PLAN, Application, counts_of
from tests.support.stores import Copy, StoreKind
from tests.support.waiting import eventually

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


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_for_whom_a_function_finds_no_row_gets_one(kind: StoreKind, tmp_path: Path) -> None:
    async def live(application: Application) -> None:
        own = application.users
        await application.map(link=lambda user: own.c.email == user.email)
        insert(application, "ana@x")
        await Copy(application.host).take([created("ana", "ana@x"), created("bo", "bo@x")])
        rows = dict(application.rows(own, "email", "logto_user_id"))
        assert rows == {"ana@x": "ana", "bo@x": "bo"}

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


async def find(application: Application, logto_id: str) -> list[Difference]:
    """Find what differs of a record."""
    pages = find_differences(application.host, application.mappings)
    return [each async for page in pages for each in page if each.logto_id == logto_id]


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_a_user_lacks_finds_nobody(kind: StoreKind, tmp_path: Path) -> None:
    """`column == None` is IS NULL in SQL: the rows of all others who lack it. What looks the same
    is a conflict, which says how to write it."""

    async def live(application: Application) -> None:
        own = application.users.c
        links = [
            lambda user: own.first_name == user.phone,
            lambda user: sa.or_(own.first_name == user.phone, own.email == user.profile.get("x")),
            lambda user: sa.exists().where(own.first_name == user.custom_data["a"]["b"]),
        ]
        for number, link in enumerate(links):
            application.delete_all(application.users)
            insert(application, "ceo@x", first_name=None)
            copy = Copy(await application.map(link=link))
            await application.apply_all()
            body = make.user_created(id=f"mallory{number}", email="mallory@x").body
            data = json.loads(body) | {"data": json.loads(body)["data"] | {"primaryPhone": None}}
            await copy.take([json.dumps(data).encode()])
            rows = application.rows(application.users, "email", "logto_user_id")
            assert ("ceo@x", None) in rows
        application.delete_all(application.users)
        insert(application, "ana@x", first_name=None)

        def find_nameless(user: Any) -> sa.ColumnElement[bool]:
            return sa.and_(own.email == user.email, own.first_name.is_(None))

        copy = Copy(await application.map(link=find_nameless))
        await application.apply_all()
        await copy.take([created("ana", "ana@x")])
        rows = application.rows(application.users, "email", "logto_user_id")
        assert [row for row in rows if row[0] == "ana@x"] == [("ana@x", None)]
        [difference] = await find(application, "ana")
        assert "with users.first_name IS NULL, and it can't be told" in str(difference.reason)

        def find_without_name(user: Any) -> sa.ColumnElement[bool]:
            return sa.and_(own.email == user.email, sa.func.coalesce(own.first_name, "") == "")

        await application.map(link=find_without_name)
        await application.apply_all()
        rows = application.rows(application.users, "email", "logto_user_id")
        assert [row for row in rows if row[0] == "ana@x"] == [("ana@x", "ana")]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize(
    "find",
    [
        lambda own, user: sa.or_(own.email == user.email, own.first_name == user.phone),
        lambda own, user: sa.or_(
            own.email == user.email,
            sa.and_(own.first_name == user.phone, own.first_name.is_not(None)),
        ),
        lambda own, user: sa.and_(
            own.email == user.email,
            sa.not_(sa.and_(own.first_name == user.phone, own.plan != "free")),
        ),
    ],
    ids=["or", "guarded", "not"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_values_of_a_condition_count(
    kind: StoreKind, find: Callable[[Any, Any], sa.ColumnElement[bool]], tmp_path: Path
) -> None:
    """A user without a phone is found by email, if the function takes either."""

    async def live(application: Application) -> None:
        own = application.users
        insert(application, "ana@x", "bo@x", first_name=None, plan="free")
        host = await application.map(link=lambda user: find(own.c, user))
        await application.apply_all()
        await Copy(host).take([created("ana", "ana@x")])
        rows = application.rows(own, "email", "logto_user_id")
        assert rows == [("ana@x", "ana"), ("bo@x", None)]

    Application.run(kind, tmp_path, live)


MAY_RETURN = threading.Event()
FAILS: list[str] = []


def choose_plan(user: Any) -> str:
    """Fail for the user ann, or don't return, as long as a test says so."""
    if user.logto_user_id == "ann":
        if FAILS:
            raise KeyError
        MAY_RETURN.wait(60)
    return "paid"


async def none_is_stuck() -> bool:
    """Whether all functions have returned."""
    return functions.list_stuck() == []


@contextmanager
def is_hindered(application: Application, by: str) -> Iterator[None]:
    """Let the user ann not be compared."""
    MAY_RETURN.set()
    with application.engine.begin() as connection:
        if by == "lock":
            options = {"schema_translate_map": {None: postgres.schema()}}
            is_it = records.c.logto_id == "ann"
            locking = sa.select(records.c.logto_id).where(is_it).with_for_update()
            connection.execute(locking, execution_options=options)
        elif by == "slow":
            MAY_RETURN.clear()
        else:
            FAILS.append("ann")
        yield
    MAY_RETURN.set()
    FAILS.clear()


@pytest.mark.parametrize("by", ["slow", "error", "lock"])
@pytest.mark.parametrize("way", ["service", "command", "delivery"])
@pytest.mark.parametrize("kind", KINDS)
def test_somebody_who_could_not_be_compared_counts(
    kind: StoreKind, way: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else is linked to a row that may be theirs."""
    if by == "lock" and (kind == "sqlite" or way == "delivery"):
        pytest.skip("SQLite has no locks of rows, and a delivery waits for them")
    monkeypatch.setattr(functions, "SHARED_S", 0.2)
    monkeypatch.setattr(runner, "OPEN_S", 0.2)

    async def live(application: Application) -> None:
        own = application.users
        users = [created("ann", "Ann@x"), created("bo", "ann@x"), created("cy", "cy@x")]
        if way != "delivery":
            await Copy(application.host).take(users)
        insert(application, "ann@x", "cy@x")
        host = await application.map(
            link=own.c.email, columns={own.c.plan: choose_plan}, create_defaults={own.c.active: 1}
        )
        with is_hindered(application, by):
            if way == "service":
                await application.apply_all()
            elif way == "command":
                await apply_all(host, application.mappings)
            else:
                await application.apply_all()
                await Copy(host).take(users)
            rows = dict(application.rows(own, "email", "logto_user_id"))
            assert rows["ann@x"] is None
        await eventually(none_is_stuck)
        for _ in "12":
            await retry_unsettled(host, application.mappings, UNSETTLED)
            await SlowRows(host, application.mappings).write_due()
        assert dict(application.rows(own, "email", "logto_user_id")) == {
            "ann@x": None,
            "cy@x": "cy",
        }
        counts = await counts_of(host, own)
        assert (counts.conflict, counts.ok) == (2, 1)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("is_gone", [False, True], ids=["other lives", "other is gone"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_with_another_users_former_primary_key_is_for_the_application_to_decide(
    kind: StoreKind, is_gone: bool, tmp_path: Path
) -> None:
    """It imported the table anew, for example. Once it has written the ID, all is well."""

    async def live(application: Application) -> None:
        own = application.users
        copy = Copy(await application.map(link=own.c.email))
        await application.apply_all()
        ana, carl = (
            make.user_created(id=name, email=f"{name}@x", at=1_000).body for name in ("ana", "carl")
        )
        await copy.take([ana])
        [(row_id,)] = application.rows(own, "id")
        row = {"id": row_id, "email": "carl@x", "plan": "paid", "active": True}
        with application.engine.begin() as connection:
            connection.execute(sa.delete(own))
            connection.execute(sa.insert(own).values(row))
        if is_gone:
            await copy.take([make.user_deleted(id="ana", at=2_000).body])
        await copy.take([carl])
        assert application.rows(own, "id", "logto_user_id") == [(row_id, None)]
        conflict = await application.host.read(lambda store: store.mappings.find_oldest("conflict"))
        assert conflict is not None
        assert conflict.reason == OF_ANOTHER
        with application.engine.begin() as connection:
            connection.execute(sa.update(own).values(logto_user_id="carl"))
        await retry_unsettled(application.host, application.mappings)
        await application.apply_again()
        assert (await counts_of(application.host, own)).conflict == 0
        assert ("carl", row_id) in application.rows(own, "logto_user_id", "id")

    Application.run(kind, tmp_path, live)


def test_a_row_with_the_primary_key_of_an_unlinked_one_is_for_the_application_to_decide(
    tmp_path: Path,
) -> None:
    """SQLite gives the primary key of a deleted row to the next one."""

    async def live(application: Application) -> None:
        own = application.users
        copy = Copy(await application.map(link=own.c.email, when_deleted="unlink"))
        await application.apply_all()
        await copy.take([make.user_created(id="bo", email="bo@x", at=1_000).body])
        [(row_id,)] = application.rows(own, "id")
        await copy.take([make.user_deleted(id="bo", at=2_000).body])
        application.delete_all(own)
        insert(application, "carl@x", **PLAN)
        assert application.rows(own, "id") == [(row_id,)]
        await copy.take([make.user_created(id="carl", email="carl@x", at=3_000).body])
        assert application.rows(own, "email", "logto_user_id") == [("carl@x", None)]
        conflict = await application.host.read(lambda store: store.mappings.find_oldest("conflict"))
        assert conflict is not None
        assert conflict.reason == OF_ANOTHER

    Application.run("sqlite", tmp_path, live)
