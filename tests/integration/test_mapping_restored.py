"""A restored user gets the row back from which it was unlinked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.testing import make
from tests.support.mapped_application import KINDS, Application, counts_of
from tests.support.stores import Copy, StoreKind

ACME = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
ANA = make.user_created(id="ana", email="ana@x.example", at=1_000).body
DELETED = make.user_deleted(id="ana", at=100_000).body
RESTORED = make.user_data_updated(id="ana", email="ana@x.example", at=200_000).body
JOINED = make.organization_membership_updated(id="acme", at=170_000, addedUserIds=["ana"]).body


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
