"""While Logto has sent a record only in part, no row is linked or inserted for it if `link` or
`where` has to decide."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.ensure_user import ensure_user
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.own_rows import find_own_row
from logto_webhooks.records.record import ApiRead, Key
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.testing import make
from tests.support.mapped_application import KINDS, PLAN, Application, counts_of, learn
from tests.support.stores import Copy, StoreKind

ANA = "ana@x.example"
ID_TOKEN = {"sub": "ana", "email": ANA, "email_verified": True, "name": "Ana"}


def insert(application: Application, **values: Any) -> None:
    with application.engine.begin() as connection:
        connection.execute(sa.insert(application.users).values(PLAN | values))


async def claim(application: Application, claims: Mapping[str, Any]) -> None:
    await application.host.run(partial(ensure_user, claims=claims))


async def find_reason(application: Application, kind: Any = "user", id_: str = "ana") -> str:
    [found] = await application.host.read(lambda store: store.find(kind, id_, 1))
    return " ".join(found.own_rows)


def leave_out(sent: SignedRequest, *names: str) -> bytes:
    """The body without some fields of its record, as an old Logto may send it."""
    payload = json.loads(sent.body)
    payload["data"] = {name: value for name, value in payload["data"].items() if name not in names}
    return json.dumps(payload).encode()


@pytest.mark.parametrize("claims", [{"sub": "ana"}, ID_TOKEN], ids=["access", "id"])
@pytest.mark.parametrize("link", ["column", "function"])
@pytest.mark.parametrize("kind", KINDS)
def test_claims_link_no_row_and_insert_none(
    kind: StoreKind, link: str, claims: dict[str, Any], tmp_path: Path
) -> None:
    """A link is for good, so it is left to what Logto sends: then the customer's row is linked, and
    somebody new gets a row."""

    async def live(application: Application) -> None:
        own = application.users.c
        by = own.email if link == "column" else lambda user: own.email == user.email
        copy = Copy(await application.map(link=by))
        await application.apply_all()
        insert(application, id=7, email=ANA, first_name="Ana")
        await claim(application, claims)
        await claim(application, {"sub": "bo", "email": "bo@x.example"})
        assert application.rows(application.users, "id", "logto_user_id", "first_name") == [
            (7, None, "Ana")
        ]
        assert (await counts_of(application.host, application.users)).waiting == 2
        assert "waiting, Logto hasn't sent the whole user yet, which `link`" in await find_reason(
            application
        )
        await application.apply_again()
        assert len(application.rows(application.users, "id")) == 1
        sent = [make.user_created(id="ana", email=ANA), make.user_created(id="bo", email="bo@x")]
        await copy.take([each.body for each in sent])
        rows = application.rows(application.users, "logto_user_id", "email", "id")
        assert (rows[0], rows[1][:2]) == (("ana", ANA, 7), ("bo", "bo@x"))
        await application.check()
        assert (await counts_of(application.host, application.users)).waiting == 0

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_where_decides_by_all_that_logto_sends(kind: StoreKind, tmp_path: Path) -> None:
    """Not by claims, whether it is true or false for these, or raises. The whole may come as
    Logto's answer."""

    async def live(application: Application) -> None:
        host = await application.map(
            where=lambda user: not user.custom_data.get("banned") and user.name[0] != "E"
        )
        copy = Copy(host)
        tokens: list[dict[str, Any]] = [ID_TOKEN, {"sub": "eve", "name": "Eve"}, {"sub": "bo"}]
        for claims in tokens:
            await claim(application, claims)
            reason = await find_reason(application, id_=claims["sub"])
            assert "waiting, Logto hasn't sent the whole user yet, which `where`" in reason
        assert application.rows(application.users, "id") == []
        banned = make.user_created(id="ana", email=ANA, customData={"banned": True}, name="Ana")
        eve = make.user_created(id="eve", email="eve@x", name="Eva")
        await copy.take([banned.body, eve.body])
        fields: dict[str, Any] = dict.fromkeys(("username", "primaryPhone", "avatar"))
        own = fields | {"name": "Bo", "primaryEmail": "bo@x", "identities": {}}
        await learn(host, [ApiRead(Key("user", "bo"), {"own": own}, 1_000, 1_000)])
        assert application.rows(application.users, "logto_user_id") == [("bo",)]
        counts = await counts_of(host, application.users)
        assert (counts.ok, counts.excluded, counts.waiting) == (1, 2, 0)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("lacks", [("customData",), ("name", "avatar")], ids="-".join)
@pytest.mark.parametrize("option", ["link", "where"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_logto_sent_in_part_decides_nothing(
    kind: StoreKind, option: str, lacks: tuple[str, ...], tmp_path: Path
) -> None:
    """The rest may say that the row is another one, or that there is none."""

    async def live(application: Application) -> None:
        own = application.users.c
        link, where = own.email, lambda user: not user.custom_data.get("banned")
        copy = Copy(await application.map(**{option: link if option == "link" else where}))
        await application.apply_all()
        if option == "link":
            insert(application, email=ANA)
        before = application.rows(application.users, "logto_user_id")
        part = make.user_data_updated(id="ana", email=ANA, at=2_000)
        await copy.take([leave_out(part, *lacks)])
        assert application.rows(application.users, "logto_user_id") == before
        assert f"which `{option}` needs" in await find_reason(application)
        await copy.take([make.user_created(id="ana", email=ANA, at=1_000).body])
        assert application.rows(application.users, "logto_user_id") == [("ana",)]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_organizations_wait_too(kind: StoreKind, tmp_path: Path) -> None:
    """Until Logto has sent all of one."""

    async def live(application: Application) -> None:
        teams = application.teams
        mapping = declare_entities(
            "organization",
            teams,
            key="logto_id",
            columns={"name": "name"},
            where=lambda team: team.custom_data.get("plan") == "paid",
            when_deleted="delete",
        )
        copy = Copy(await application.map_tables(mapping))
        sent = make.organization_data_updated(id="acme", customData={"plan": "paid"}, at=1_000)
        await copy.take([leave_out(sent, "description")])
        assert application.rows(teams, "logto_id") == []
        reason = await find_reason(application, "organization", "acme")
        assert "waiting, Logto hasn't sent the whole organization yet" in reason
        await copy.take([sent.body])
        assert application.rows(teams, "logto_id") == [("acme",)]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_nothing_decides_about_are_inserted(kind: StoreKind, tmp_path: Path) -> None:
    """Without `link` and `where`, or if only rows that are there are ever written."""

    async def live(application: Application) -> None:
        await application.map()
        await application.apply_all()
        await claim(application, {"sub": "bo"})
        assert application.rows(application.users, "logto_user_id") == [("bo",)]
        await application.map(create=False, where=lambda user: True)
        await claim(application, {"sub": "carl"})
        assert "excluded" not in await find_reason(application, id_="carl")
        assert (await counts_of(application.host, application.users)).waiting == 0

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("options", [{}, {"where": lambda user: True}], ids=["none", "where"])
def test_a_batch_asks_once(options: dict[str, Any], tmp_path: Path) -> None:
    """And only if a row could be inserted that `link` or `where` decides about."""

    async def live(application: Application) -> None:
        asked: list[str] = []

        def note(connection: Any, cursor: Any, statement: str, *others: object) -> None:
            if "logto_records.groups" in statement and "logto_records.data" not in statement:
                asked.append(statement)

        copy = Copy(await application.map(**options))
        sa.event.listen(application.host_engine, "before_cursor_execute", note)
        people = [make.user_created(id=f"u{n}", email=f"{n}@x", at=1_000).body for n in range(20)]
        await copy.take(people)
        assert len(asked) == len(options)
        await copy.take([make.user_data_updated(id="u1", email="new@x", at=2_000).body])
        assert len(asked) == len(options)
        assert ("u1", "new@x") in application.rows(application.users, "logto_user_id", "email")

    Application.run("sqlite", tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_claims_empty_no_row_that_has_the_id(kind: StoreKind, tmp_path: Path) -> None:
    """The application has written the ID itself, for example before it maps its table."""

    async def live(application: Application) -> None:
        copy = Copy(await application.map())
        await application.apply_all()
        insert(application, logto_user_id="ana", email=ANA, first_name="Ana")
        for _ in range(2):
            await claim(application, {"sub": "ana"})
            await application.apply_again()
            rows = application.rows(application.users, "logto_user_id", "email", "first_name")
            assert rows == [("ana", ANA, "Ana")]
        mapping = application.mappings.entities[0]
        own = await application.host.read(
            lambda store: find_own_row(store.connection, mapping, "ana")
        )
        assert own.state == "here"
        assert "waiting, Logto hasn't sent the whole user yet, so" in await find_reason(application)
        await copy.take([make.user_created(id="ana", email="new@x.example").body])
        rows = application.rows(application.users, "logto_user_id", "email")
        assert rows == [("ana", "new@x.example")]
        await application.check()

    Application.run(kind, tmp_path, live)
