"""A restored user gets the row back from which it was unlinked, and the rows of memberships that
may have been restored, too, wait for Logto's answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.logto.api_responses import Span, read_pairs
from logto_webhooks.mapping.apply import apply_all, retry_unsettled
from logto_webhooks.mapping.declare import MappedKind
from logto_webhooks.records.record import membership
from logto_webhooks.testing import make
from tests.integration.test_mapping_roles import (
    EDITOR,
    VIEWER,
    RoleApplication,
    read_member_roles,
    read_user_roles,
)
from tests.support.mapped_application import KINDS, PLAN, Application, counts_of, learn
from tests.support.stores import Copy, StoreKind

ACME = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
ANA = make.user_created(id="ana", email="ana@x.example", at=1_000).body
DELETED_AT = 100_000
DELETED = make.user_deleted(id="ana", at=DELETED_AT).body
RESTORED = make.user_data_updated(id="ana", email="ana@x.example", at=200_000).body
JOINED = make.organization_membership_updated(id="acme", at=170_000, addedUserIds=["ana"]).body
EARLIER = make.organization_membership_updated(id="acme", at=2_000, addedUserIds=["ana"]).body
# Of each that is restored: its deletion and its return, and the later deletion of the other end.
LIVES: dict[MappedKind, tuple[bytes, bytes, bytes]] = {
    "user": (
        DELETED,
        RESTORED,
        make.event("Organization.Deleted", id="acme", at=400_000).body,
    ),
    "organization": (
        make.event("Organization.Deleted", id="acme", at=100_000).body,
        make.event("Organization.Created", id="acme", name="Acme", at=200_000).body,
        make.user_deleted(id="ana", at=400_000).body,
    ),
}


def run(
    kind: StoreKind, folder: Path, live: Callable[[Application, Copy], Awaitable[None]]
) -> None:
    async def unlink(application: Application) -> None:
        copy = Copy(await application.map(when_deleted="unlink"))
        await copy.take([ACME, ANA])
        await live(application, copy)

    Application.run(kind, folder, unlink)


@pytest.mark.parametrize("kind", KINDS)
def test_it_gets_its_row_back(kind: StoreKind, tmp_path: Path) -> None:
    async def live(application: Application, copy: Copy) -> None:
        own = application.users
        [before] = application.rows(own, "id", "logto_user_id")
        await copy.take([DELETED])
        assert application.rows(own, "id", "logto_user_id") == [(before[0], None)]
        await copy.take([RESTORED])
        assert application.rows(own, "id", "logto_user_id") == [before]

    run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_all_get_their_rows_back_whatever_was_allowed(kind: StoreKind, tmp_path: Path) -> None:
    """`--allow-deletes` counts deletions anew, but forgets no row that was unlinked."""

    async def live(application: Application, copy: Copy) -> None:
        own, names = application.users, [f"u{number}" for number in range(30)]

        def tell(names: Iterable[str], at: int) -> list[bytes]:
            create = make.user_created if at < DELETED_AT else make.user_data_updated
            return [create(id=name, email=f"{name}@x.example", at=at).body for name in names]

        def delete(names: Iterable[str]) -> list[bytes]:
            return [make.user_deleted(id=name, at=DELETED_AT).body for name in names]

        await copy.take(tell(names, 1_000))
        before = application.rows(own, "id", "logto_user_id")
        await copy.take(delete(names[:1]))
        await copy.take(delete(names[1:]))
        assert (await counts_of(application.host, own)).held > 0
        await apply_all(application.host, application.mappings, allow_deletes=True)
        assert [key for _, key in application.rows(own, "id", "logto_user_id") if key] == ["ana"]
        await copy.take(tell(names, 200_000))
        assert application.rows(own, "id", "logto_user_id") == before

    run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_came_back_is_no_longer_unlinked(kind: StoreKind, tmp_path: Path) -> None:
    """If the application then empties its key, because it is somebody else's, so is what refers to
    it."""

    async def live(application: Application, copy: Copy) -> None:
        own, members = application.users, application.members
        await copy.take([DELETED, RESTORED, JOINED])
        [(row_id, _)] = application.rows(own, "id", "logto_user_id")
        with application.engine.begin() as connection:
            connection.execute(sa.update(own).values(logto_user_id=None, email="carl@x.example"))
        await copy.take([left(180_000)])
        assert application.rows(members, "user_id") == [(row_id,)]

    run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_it_gets_its_row_back_if_texts_are_stored_otherwise(
    kind: StoreKind, tmp_path: Path
) -> None:
    """By a function of the mapping, a trigger, or a column that adds spaces."""

    async def live(application: Application) -> None:
        own = application.users.c
        columns = {own.email: lambda user: user.email.upper(), own.active: lambda user: True}
        copy = Copy(await application.map(when_deleted="unlink", columns=columns))
        await copy.take([ANA])
        [before] = application.rows(application.users, "id", "logto_user_id")
        await copy.take([DELETED])
        with application.engine.begin() as connection:
            stored = sa.update(application.users).values(email="Ana@X.example   ")
            connection.execute(stored)
        await copy.take([RESTORED])
        assert application.rows(application.users, "id", "logto_user_id") == [before]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize(
    "change", [{"email": None}, {"email": "eve@x.example"}, {"logto_user_id": "eve"}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_became_another_is_not_taken(
    kind: StoreKind, change: dict[str, str | None], tmp_path: Path
) -> None:
    """The application emptied it, has given it to somebody else, or SQLite used its primary key
    again."""

    async def live(application: Application, copy: Copy) -> None:
        own = application.users
        await copy.take([DELETED])
        with application.engine.begin() as connection:
            connection.execute(sa.update(own).values({"email": "other@x.example"} | change))
        [(before, _)] = application.rows(own, "id", "logto_user_id")
        await copy.take([RESTORED])
        keys = dict(application.rows(own, "id", "logto_user_id"))
        assert len(keys) == 2
        assert keys[before] == change.get("logto_user_id")

    run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_tells_nobody(kind: StoreKind, tmp_path: Path) -> None:
    """The row is somebody else's by now, who has the same name, and an email."""

    async def live(application: Application) -> None:
        own = application.users
        columns = {own.c.email: "email", own.c.first_name: "name"}
        host = await application.map(columns=columns, create_defaults=PLAN, when_deleted="unlink")
        copy = Copy(host)
        told: dict[str, Any] = {"email": None, "name": "Ana", "username": "ana"}
        await copy.take([make.user_created(id="ana", at=1_000, **told).body])
        await copy.take([DELETED])
        [(before,)] = application.rows(own, "id")
        with application.engine.begin() as connection:
            connection.execute(sa.update(own).values(email="ana@smith.example"))
        await copy.take([make.user_data_updated(id="ana", at=200_000, **told).body])
        rows = application.rows(own, "logto_user_id", "email")
        assert rows == [("ana", None), (None, "ana@smith.example")]
        assert before in dict(application.rows(own, "id", "email"))

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_the_application_emptied_stays_empty(kind: StoreKind, tmp_path: Path) -> None:
    """The link was wrong, for example. Only what we have unlinked is linked again."""

    async def live(application: Application, copy: Copy) -> None:
        own = application.users
        with application.engine.begin() as connection:
            connection.execute(sa.update(own).values(logto_user_id=None))
        await copy.take([RESTORED])
        assert application.rows(own, "logto_user_id") == [(None,)]
        assert (await counts_of(application.host, own)).conflict == 1  # its email is unique

    run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_many_have_tells_nothing(kind: StoreKind, tmp_path: Path) -> None:
    """The application deleted the row, and another one has its primary key."""

    async def live(application: Application) -> None:
        own = application.users
        status = {own.c.plan: lambda user: "blocked" if user.is_suspended else "free"}
        host = await application.map(
            columns=status,
            create_defaults={},
            fill={own.c.active: lambda user: True},
            when_deleted="unlink",
        )
        copy = Copy(host)
        await copy.take([ANA])
        await copy.take([DELETED])
        [(row_id,)] = application.rows(own, "id")
        other = {"id": row_id, "email": "carl@x.example", "plan": "free", "active": True}
        with application.engine.begin() as connection:
            connection.execute(sa.delete(own))
            connection.execute(sa.insert(own).values(other))
        await copy.take([RESTORED])
        rows = dict(application.rows(own, "id", "logto_user_id"))
        assert rows[row_id] is None
        assert "ana" in rows.values()

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_membership_has_one_row_whatever_became_of_its_user(
    kind: StoreKind, tmp_path: Path
) -> None:
    """The deletion arrives late: after a membership that is newer. The user gets another row."""

    async def live(application: Application, copy: Copy) -> None:
        own = application.users
        await copy.take([JOINED])
        assert len(application.rows(application.members, "id")) == 1
        await copy.take([DELETED])
        with application.engine.begin() as connection:
            connection.execute(sa.update(own).values(email=None))
        await copy.take([RESTORED])
        assert (await counts_of(application.host, application.members)).ok == 1
        rows = dict(application.rows(own, "logto_user_id", "id"))
        assert application.rows(application.members, "user_id") == [(rows["ana"],)]

    run(kind, tmp_path, live)


def left(at: int) -> bytes:
    event = make.organization_membership_updated(
        id="acme", at=at, addedUserIds=[], removedUserIds=["ana"]
    )
    return event.body


def run_with_roles(
    kind: StoreKind,
    folder: Path,
    live: Callable[[RoleApplication, Copy], Awaitable[None]],
) -> None:
    """Ana is a member of Acme, and has a role here and there."""

    async def join(application: RoleApplication) -> None:
        copy = Copy(await application.map_roles())
        await copy.take([ACME, ANA, EARLIER])
        await learn(application.host, read_user_roles("ana", EDITOR, 3_000))
        await learn(application.host, read_member_roles({"o1": "admin"}, 3_000))
        await live(application, copy)

    RoleApplication.run(kind, folder, join)


def count_rows(application: RoleApplication) -> tuple[int, int, int]:
    """Those of members, and of members' and users' roles."""
    tables = (application.members, application.member_roles, application.user_roles)
    members, member_roles, user_roles = (
        len(application.rows(table, table.primary_key.columns[0].name)) for table in tables
    )
    return members, member_roles, user_roles


async def count_waiting(application: RoleApplication) -> tuple[int, int]:
    """Those of members, and of their roles."""
    members = await counts_of(application.host, application.members)
    roles = await counts_of(application.host, application.member_roles)
    return members.waiting, roles.waiting


@pytest.mark.parametrize("restored", LIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_who_joined_after_the_restore_can_leave(
    kind: StoreKind, restored: MappedKind, tmp_path: Path
) -> None:
    """A delivery says so, so Logto needn't be asked first."""

    async def live(application: RoleApplication, copy: Copy) -> None:
        deleted, returned, _ = LIVES[restored]
        for delivery in (deleted, returned):
            await copy.take([delivery])
        again = make.organization_membership_updated(id="acme", at=300_000, addedUserIds=["ana"])
        await copy.take([again.body])
        await learn(application.host, read_member_roles({"o1": "admin"}, 310_000))
        assert count_rows(application) == (1, 1, 1)
        await copy.take([left(400_000)])
        assert count_rows(application) == (0, 0, 1)
        await application.check()
        assert await count_waiting(application) == (0, 0)

    run_with_roles(kind, tmp_path, live)


@pytest.mark.parametrize("restored", LIVES)
@pytest.mark.parametrize("joins_again", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_with_the_other_end(
    kind: StoreKind, joins_again: bool, restored: MappedKind, tmp_path: Path
) -> None:
    """Nobody is a member of an organization that was deleted, nor is a user who was. A membership
    from before the restore, whose rows wait, is over as surely as one from after it."""

    async def live(application: RoleApplication, copy: Copy) -> None:
        deleted, returned, other_deleted = LIVES[restored]
        for delivery in (returned, deleted):
            await copy.take([delivery])
        assert await count_waiting(application) == (1, 1)
        if joins_again:
            await learn(application.host, read_member_roles({"o1": "admin"}, 310_000))
            assert await count_waiting(application) == (0, 0)
        await copy.take([other_deleted])
        await retry_unsettled(application.host, application.mappings)
        assert count_rows(application) == (0, 0, 1 if restored == "user" else 0)
        await application.check()
        assert await count_waiting(application) == (0, 0)

    run_with_roles(kind, tmp_path, live)


@pytest.mark.parametrize("restored", LIVES)
@pytest.mark.parametrize("is_member", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_only_the_deletion_ended_waits_for_an_answer(
    kind: StoreKind, is_member: bool, restored: MappedKind, tmp_path: Path
) -> None:
    """The membership may have been restored, too. What was told or read before says nothing."""

    async def live(application: RoleApplication, copy: Copy) -> None:
        deleted, returned, _ = LIVES[restored]
        for delivery in (returned, deleted):
            await copy.take([delivery])
        pair = membership("acme", "ana")
        before = [left(100_050), *read_pairs([pair], {}, Span(150_000, 150_000))]
        for told in (None, *before):
            if isinstance(told, bytes):
                await copy.take([told])
            elif told is not None:
                await learn(application.host, [told])
            await retry_unsettled(application.host, application.mappings)
            assert count_rows(application) == (1, 1, 1)
            assert await count_waiting(application) == (1, 1)
        present = {pair: {"o1": "admin"}} if is_member else {}
        await learn(application.host, read_pairs([pair], present, Span(300_000, 300_000)))
        assert count_rows(application) == ((1, 1, 1) if is_member else (0, 0, 1))
        await application.check()
        assert await count_waiting(application) == (0, 0)

    run_with_roles(kind, tmp_path, live)


@pytest.mark.parametrize("restored", LIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_roles_of_an_earlier_membership_go(
    kind: StoreKind, restored: MappedKind, tmp_path: Path
) -> None:
    """A delivery says that the user joined again: without roles, as far as is known."""

    async def live(application: RoleApplication, copy: Copy) -> None:
        deleted, returned, _ = LIVES[restored]
        for delivery in (returned, deleted):
            await copy.take([delivery])
        again = make.organization_membership_updated(id="acme", at=300_000, addedUserIds=["ana"])
        await copy.take([again.body])
        assert count_rows(application) == (1, 0, 1)
        await application.check()
        assert await count_waiting(application) == (0, 0)

    run_with_roles(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_user_keeps_roles_until_logto_takes_them(
    kind: StoreKind, tmp_path: Path
) -> None:
    """Also while Logto doesn't answer which memberships the user has."""

    async def live(application: RoleApplication, copy: Copy) -> None:
        for delivery in (RESTORED, DELETED):
            await copy.take([delivery])
        await learn(application.host, read_user_roles("ana", EDITOR | VIEWER, 300_000))
        assert application.user_role_names == [("ana", "editor"), ("ana", "viewer")]
        await learn(application.host, read_user_roles("ana", VIEWER, 310_000))
        assert application.user_role_names == [("ana", "viewer")]
        counts = await counts_of(application.host, application.user_roles)
        assert (counts.ok, counts.waiting) == (1, 0)

    run_with_roles(kind, tmp_path, live)
