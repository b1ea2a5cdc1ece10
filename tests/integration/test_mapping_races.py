"""The application changes a row after it was found, and before it is locked or written
(PostgreSQL)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.events.local import UserRow
from logto_webhooks.mapping.apply import retry_unsettled
from logto_webhooks.mapping.declare import declare_entities
from tests.integration.test_mapping_restored import ANA, DELETED, RESTORED
from tests.integration.test_mapping_roles import ACME, BO, JOINED, LEFT, read_member_roles
from tests.support.mapped_application import KINDS, PLAN, Application, counts_of, learn
from tests.support.stores import Copy, StoreKind

SERVERS = [kind for kind in KINDS if kind != "sqlite"]
LOCKS_FREE_ROW = r"IS NULL.*FOR NO KEY UPDATE"
EMAIL = "ana@x.example"


@contextmanager
def changing(application: Application, pattern: str, change: sa.Executable) -> Iterator[None]:
    """The application commits a change right before the first statement that has the pattern."""
    changed = False

    def commit(_: Any, __: Any, statement: str, *more: Any) -> None:
        nonlocal changed
        if changed or not re.search(pattern, statement, re.DOTALL):
            return
        changed = True
        with application.engine.begin() as connection:
            connection.execute(sa.text("SET LOCAL lock_timeout = '5s'"))
            connection.execute(change)

    sa.event.listen(sa.Engine, "before_cursor_execute", commit)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", commit)
    assert changed


async def link(application: Application, *, by_condition: bool, change: dict[str, str]) -> None:
    """Link an existing row, which the application changes meanwhile."""
    own = application.users.c

    def has_email(user: UserRow) -> sa.ColumnElement[bool]:
        return own.email == user.email

    host = await application.map(
        columns={own.active: lambda user: not user.is_suspended},
        fill={own.first_name: lambda user: "from Logto"},
        link=has_email if by_condition else own.email,
    )
    with application.engine.begin() as connection:
        connection.execute(sa.insert(application.users).values(PLAN | {"email": EMAIL}))
    with changing(application, LOCKS_FREE_ROW, sa.update(application.users).values(change)):
        await Copy(host).take([ANA])


@pytest.mark.parametrize("by_condition", [False, True])
@pytest.mark.parametrize("kind", SERVERS)
def test_a_row_that_became_somebody_elses_is_not_linked(
    kind: StoreKind, by_condition: bool, tmp_path: Path
) -> None:
    """The user gets a row of its own, when it is tried again."""

    async def live(application: Application) -> None:
        own = application.users
        await link(application, by_condition=by_condition, change={"email": "eve@x.example"})
        assert application.rows(own, "logto_user_id", "email") == [(None, "eve@x.example")]
        assert (await counts_of(application.host, own)).owed == 1
        await retry_unsettled(application.host, application.mappings)
        rows = application.rows(own, "logto_user_id", "email")
        assert rows == [("ana", None), (None, "eve@x.example")]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("by_condition", [False, True])
@pytest.mark.parametrize("kind", SERVERS)
def test_what_the_application_filled_meanwhile_stays(
    kind: StoreKind, by_condition: bool, tmp_path: Path
) -> None:
    async def live(application: Application) -> None:
        await link(application, by_condition=by_condition, change={"first_name": "Ana"})
        rows = application.rows(application.users, "logto_user_id", "first_name")
        assert rows == [("ana", "Ana")]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_condition_can_join_a_table(kind: StoreKind, tmp_path: Path) -> None:
    """Its rows aren't locked: here, the application has locked one."""

    async def live(application: Application) -> None:
        own, teams = application.users, application.teams
        host = await application.map(
            link=lambda user: (own.c.first_name == teams.c.name) & (own.c.email == user.email)
        )
        with application.engine.begin() as connection:
            user = PLAN | {"email": EMAIL, "first_name": "Acme"}
            connection.execute(sa.insert(own).values(user))
            connection.execute(sa.insert(teams).values(name="Acme"))
        with application.engine.begin() as connection:
            connection.execute(sa.select(teams).with_for_update())
            await Copy(host).take([ANA])
        assert application.rows(own, "logto_user_id", "email") == [("ana", EMAIL)]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize(
    ("document", "linked"),
    [({"theme": "dark"}, {"theme": "dark", "logto": "ana"}), (["no object"], ["no object"])],
)
@pytest.mark.parametrize("kind", SERVERS)
def test_a_document_that_gets_the_key_keeps_what_was_set_meanwhile(
    kind: StoreKind, document: object, linked: object, tmp_path: Path
) -> None:
    """If it has no room for the key any more, that is a conflict."""

    async def live(application: Application) -> None:
        accounts = sa.Table(
            "accounts",
            application.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("email", sa.Text),
            sa.Column("data", sa.JSON),
        )
        application.metadata.create_all(application.engine)
        own, host = accounts.c, application.host
        mapping = declare_entities(
            "user",
            accounts,
            key=own.data["logto"],
            columns={own.email: "email"},
            link=own.email,
            when_deleted="keep",
        )
        await application.map_tables(mapping)
        await application.apply_all()
        with application.engine.begin() as connection:
            connection.execute(sa.insert(accounts).values(email=EMAIL, data={"theme": "light"}))
        change = sa.update(accounts).values(data=document)
        with changing(application, LOCKS_FREE_ROW, change):
            await Copy(host).take([ANA])
        assert application.rows(accounts, "data") == [(linked,)]
        [counts] = await host.read(lambda store: store.mappings.counts())
        assert counts.conflict == (linked == document)
        problems = await host.read(lambda store: store.mappings.list_unwritten(["conflict"]))
        assert all("isn't an object" in (problem.reason or "") for problem in problems)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_former_row_that_became_another_meanwhile_is_not_taken(
    kind: StoreKind, tmp_path: Path
) -> None:
    async def live(application: Application) -> None:
        own = application.users
        copy = Copy(await application.map(when_deleted="unlink"))
        await copy.take([ANA])
        await copy.take([DELETED])
        change = sa.update(own).values(email="eve@x.example")
        with changing(application, LOCKS_FREE_ROW, change):
            await copy.take([RESTORED])
        await retry_unsettled(application.host, application.mappings)
        rows = application.rows(own, "logto_user_id", "email")
        assert rows == [("ana", EMAIL), (None, "eve@x.example")]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_former_row_that_is_locked_is_taken_when_it_is_free(
    kind: StoreKind, tmp_path: Path
) -> None:
    async def live(application: Application) -> None:
        own = application.users
        copy = Copy(await application.map(when_deleted="unlink"))
        await copy.take([ANA])
        await copy.take([DELETED])
        [before] = application.rows(own, "id")
        with application.engine.begin() as connection:
            connection.execute(sa.select(own).with_for_update())
            await copy.take([RESTORED])
            assert (await counts_of(application.host, own)).owed == 1
        await retry_unsettled(application.host, application.mappings)
        assert application.rows(own, "id", "logto_user_id") == [(*before, "ana")]

    Application.run(kind, tmp_path, live)


def give_to_bo(application: Application) -> sa.Executable:
    """The application gives the row of a membership to another user."""
    own = application.users.c
    bo = sa.select(own.id).where(own.logto_user_id == "bo").scalar_subquery()
    return sa.update(application.members).values(user_id=bo)


def read_members(application: Application) -> list[tuple[Any, ...]]:
    """Whose rows the rows of memberships are, and their roles."""
    users, members = application.users, application.members
    query = sa.select(users.c.logto_user_id, members.c.role).join_from(members, users)
    with application.engine.connect() as connection:
        return list(map(tuple, connection.execute(query)))


@pytest.mark.parametrize("kind", SERVERS)
def test_a_membership_s_row_that_became_another_s_is_not_deleted(
    kind: StoreKind, tmp_path: Path
) -> None:
    async def live(application: Application) -> None:
        copy = Copy(await application.map())
        await copy.take([ANA, BO, ACME, JOINED])
        with changing(application, "DELETE FROM app.team_members", give_to_bo(application)):
            await copy.take([LEFT])
        assert read_members(application) == [("bo", "member")]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_membership_s_row_that_became_another_s_is_not_changed(
    kind: StoreKind, tmp_path: Path
) -> None:
    async def live(application: Application) -> None:
        host = await application.map()
        await Copy(host).take([ANA, BO, ACME, JOINED])
        with changing(application, "UPDATE app.team_members", give_to_bo(application)):
            await learn(host, read_member_roles({"o1": "admin"}, 3_000))
        assert read_members(application) == [("bo", "member")]

    Application.run(kind, tmp_path, live)
