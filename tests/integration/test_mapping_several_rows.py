"""Several rows with one ID of Logto's: it is unknown which is the right one, so none changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.mapping.apply import retry_unsettled
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import declare_members
from logto_webhooks.testing import make
from tests.integration.test_mapping_deletions import states_of
from tests.support.mapped_application import KINDS, Application
from tests.support.stores import Copy, StoreKind

ANA = make.user_created(id="ana", email="ana@x", at=1_000).body
CHANGED = make.user_data_updated(id="ana", email="ana@y", at=2_000, updatedAt=2_000).body
DELETED = make.user_deleted(id="ana", at=3_000).body
JOINED = make.organization_membership_updated(id="acme", at=1_000, addedUserIds=["ana"]).body
LEFT = make.organization_membership_updated(id="acme", at=2_000, removedUserIds=["ana"]).body


async def map_tables(application: Application) -> tuple[sa.Table, sa.Table]:
    """Users of which some are deleted softly, and members with a row for each of their tasks."""
    people = sa.Table(
        "people",
        application.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("logto_id", sa.Text),
        sa.Column("email", sa.Text),
        sa.Column("deleted_at", sa.Text),
    )
    is_kept = people.c.deleted_at.is_(None)
    where: Any = {"sqlite_where": is_kept, "postgresql_where": is_kept}
    sa.Index("people_logto_id", people.c.logto_id, unique=True, **where)
    tasks = sa.Table(
        "tasks",
        application.metadata,
        sa.Column("team", sa.Text, primary_key=True),
        sa.Column("person_id", sa.ForeignKey(people.c.id), primary_key=True),
        sa.Column("task", sa.Text, primary_key=True),
    )
    application.metadata.create_all(application.engine, [people, tasks])
    entity: dict[str, Any] = {
        "key": "logto_id",
        "columns": {"email": "email"},
        "when_deleted": "delete",
    }
    members: dict[str, Any] = {"organization": "team", "user": "person_id"}
    await application.map_tables(
        declare_entities("user", people, **entity),
        declare_members(tasks, **members, create_defaults={"task": "any"}),
    )
    await application.apply_all()
    return people, tasks


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_with_several_rows(kind: StoreKind, tmp_path: Path) -> None:
    """Neither is changed nor deleted, nor is it known to whom a membership refers."""

    async def live(application: Application) -> None:
        people, tasks = await map_tables(application)
        with application.engine.begin() as connection:
            rows: list[dict[str, Any]] = [
                {"logto_id": "ana", "email": "old", "deleted_at": "yes"},
                {"logto_id": "ana", "email": "new", "deleted_at": None},
            ]
            connection.execute(sa.insert(people), rows)
        copy = Copy(application.host)
        for body in (ANA, CHANGED, JOINED, DELETED):
            await copy.take([body])
            assert application.rows(people, "email") == [("new",), ("old",)]
            assert application.rows(tasks, "team") == []
            assert (await states_of(application.host, people))["conflict"] == 1
        with application.engine.begin() as connection:
            connection.execute(sa.update(people).where(people.c.email == "old").values(logto_id=""))
        await retry_unsettled(application.host, application.mappings)
        assert application.rows(people, "email") == [("old",)]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_membership_with_several_rows(kind: StoreKind, is_first: bool, tmp_path: Path) -> None:
    """The application added them, before or after it was known. Once it is over, the state says
    that they stay."""

    async def live(application: Application) -> None:
        people, tasks = await map_tables(application)
        copy = Copy(application.host)
        await copy.take([ANA] if is_first else [ANA, JOINED])
        [(person_id,)] = application.rows(people, "id")
        with application.engine.begin() as connection:
            for task in ("any", "billing") if is_first else ("billing",):
                own = {"team": "acme", "person_id": person_id, "task": task}
                connection.execute(sa.insert(tasks).values(own))
        if is_first:
            await copy.take([JOINED])
            assert (await states_of(application.host, tasks))["conflict"] == 1
        await copy.take([LEFT])
        assert application.rows(tasks, "task") == [("any",), ("billing",)]
        assert (await states_of(application.host, tasks))["conflict"] == 1
        with application.engine.begin() as connection:
            connection.execute(sa.delete(tasks).where(tasks.c.task == "billing"))
        await retry_unsettled(application.host, application.mappings)
        assert application.rows(tasks, "task") == []
        assert "conflict" not in await states_of(application.host, tasks)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_membership_whose_row_was_inserted_again(kind: StoreKind, tmp_path: Path) -> None:
    """With another primary key, as an application does that replaces all members of a team."""

    async def live(application: Application) -> None:
        _, tasks = await map_tables(application)
        copy = Copy(application.host)
        await copy.take([ANA, JOINED])
        with application.engine.begin() as connection:
            connection.execute(sa.update(tasks).values(task="billing"))
        assert application.rows(tasks, "task") == [("billing",)]
        await copy.take([LEFT])
        assert application.rows(tasks, "task") == []

    Application.run(kind, tmp_path, live)
