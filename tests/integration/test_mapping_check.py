"""`mapping check` says why rows aren't written, and counts what `mapping apply` counts."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from logto_webhooks.database.schema import mapped_rows
from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping import functions
from logto_webhooks.mapping.apply import apply_all, retry_unsettled
from logto_webhooks.mapping.check import Difference, find_differences
from logto_webhooks.mapping.tally import AppliedMapping
from logto_webhooks.testing import make
from tests.integration.test_mapping_deletions import created, founded, joined
from tests.support.mapped_application import KINDS, PLAN, Application
from tests.support.stores import Copy, StoreKind


async def find(application: Application) -> dict[tuple[str, str | None], Difference]:
    """The differences by table and record."""
    pages = find_differences(application.host, application.mappings)
    found = [difference async for page in pages for difference in page]
    by_record = {(each.mapping.rpartition(".")[2], each.logto_id): each for each in found}
    assert len(by_record) == len(found)
    return by_record


def insert(application: Application, table: sa.Table, **values: Any) -> None:
    with application.engine.begin() as connection:
        connection.execute(sa.insert(table).values(values))


def count(found: list[AppliedMapping]) -> dict[str, int]:
    """How many rows weren't written, by what they count as."""
    names = ("waiting", "held", "ambiguous", "refused")
    counts = {name: sum(getattr(each, name) for each in found) for name in names}
    return {name: number for name, number in counts.items() if number}


def read_active(user: Any) -> Any:
    """A mapping with faults for some users."""
    return {"cleo": None, "dan": object()}.get(user.logto_user_id, True)


def refer_to_teams(application: Application) -> sa.Table:
    """Make another table of the application, which refers to teams."""
    invoices = sa.Table(
        "invoices",
        application.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("team_id", sa.ForeignKey(application.teams.c.id), nullable=False),
    )
    with application.engine.begin() as connection:
        invoices.create(connection)
    return invoices


@pytest.mark.parametrize("is_applied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_difference_says_why_it_stays(
    kind: StoreKind, is_applied: bool, tmp_path: Path
) -> None:
    """Whether the mapping was applied before or not. What is in the way is named, too."""

    async def live(application: Application) -> None:
        own, teams, members = application.users, application.teams, application.members
        invoices = refer_to_teams(application)
        insert(application, own, id=161, email="ana@x", **PLAN)
        host = await application.map(columns={own.c.email: "email", own.c.active: read_active})
        copy = Copy(host)
        await copy.take([founded("acme"), *map(created, ("ana", "bo", "cleo", "dan", "eve"))])
        insert(application, invoices, team_id=application.rows(teams, "id")[0][0])
        insert(application, own, id=999, email="taken@x", **PLAN)
        await copy.take(
            [
                make.event("Organization.Deleted", organizationId="acme", at=3_000).body,
                make.user_data_updated(id="bo", primaryEmail="taken@x", at=3_000).body,
                joined("lost", ["eve"]),  # an organization of which nothing is known
            ]
        )
        if not is_applied:
            forget = sa.delete(mapped_rows).where(mapped_rows.c.state != "ok")
            await host.run(lambda store: store._connection.execute(forget))
        found = await find(application)
        said = {name: (each.problem, each.state) for name, each in found.items()}
        assert said == {
            ("users", "ana"): ("missing", "refused"),
            ("users", "bo"): ("different", "refused"),
            ("users", "cleo"): ("waiting", "waiting"),
            ("users", "dan"): ("missing", "refused"),
            ("teams", "acme"): ("extra", "refused"),
            ("team_members", "lost:eve"): ("missing", "waiting"),
        }
        ana, bo = found["users", "ana"], found["users", "bo"]
        assert (ana.reason, ana.blocked_by) == ("another row has the value of email", "[161]")
        assert (bo.reason, bo.blocked_by) == ("another row has the value of email", "[999]")
        assert bo.columns == ("email",)
        reasons = {name: each.reason or "" for name, each in found.items()}
        assert reasons["users", "cleo"] == "active is NOT NULL, but Logto has no value"
        assert "the value of active is of type object" in reasons["users", "dan"]
        assert "invoices" in reasons["teams", "acme"]
        waiting = found["team_members", "lost:eve"]
        assert waiting.reason == "the organization has no row yet"
        assert waiting.blocked_by == "organization:lost"
        states = dict(Counter(each.state for each in found.values()))
        dry = await apply_all(host, application.mappings, dry_run=True)
        assert dry == await apply_all(host, application.mappings)
        assert count(dry) == states == {"refused": 4, "waiting": 2}
        assert members.fullname == dry[2].mapping
        assert (dry[2].created, dry[2].waiting) == (0, 1)
        again = await find(application)
        assert {name: (each.problem, each.state) for name, each in again.items()} == said

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_created_in_a_dry_run_if_both_ends_would_be(
    kind: StoreKind, tmp_path: Path
) -> None:
    """Else they wait: also if the first of them would be there."""

    async def live(application: Application) -> None:
        own = application.users
        insert(application, own, id=161, email="bo@x", **PLAN)
        copy = Copy(application.host)
        await copy.take([founded("acme"), created("ana"), created("bo")])
        await copy.take([joined("acme", ["ana", "bo"]), joined("lost", ["ana", "bo"])])
        host = await application.map()
        found = {
            id_: each for (table, id_), each in (await find(application)).items() if "m" in table
        }
        waiting = {"acme:bo", "lost:ana", "lost:bo"}
        assert {id_ for id_, each in found.items() if each.state == "waiting"} >= waiting
        assert found["acme:ana"].state is None
        assert found["acme:ana"].problem == "missing"
        dry = await apply_all(host, application.mappings, dry_run=True)
        assert dry == await apply_all(host, application.mappings)
        [users, teams, members] = dry
        assert (users.created, users.refused, users.waiting) == (1, 1, 0)
        assert teams.created == 1
        assert (members.created, members.waiting, members.refused) == (1, 3, 0)
        [_, _, members] = await apply_all(host, application.mappings, dry_run=True)
        assert (members.created, members.waiting) == (0, 3)

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_an_existing_row_that_will_be_linked_is_unlinked(kind: StoreKind, tmp_path: Path) -> None:
    """The columns are those that differ beside its key."""

    async def live(application: Application) -> None:
        own = application.users
        insert(application, own, email="ana@x", first_name="Ana", plan="paid", active=True)
        insert(application, own, email="bo@x", first_name="Ana", plan="paid", active=False)
        await Copy(application.host).take([created("ana"), created("bo")])
        columns = {
            own.c.email: "email",
            own.c.first_name: lambda user: "Ana",
            own.c.active: lambda user: True,
        }
        await application.map(link=own.c.email, columns=columns)
        found = await find(application)
        assert {name: (each.problem, each.columns) for (_, name), each in found.items()} == {
            "ana": ("unlinked", ()),
            "bo": ("unlinked", ("active",)),
        }
        await application.apply_again()
        assert await find(application) == {}

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_that_cannot_be_checked_is_named(kind: StoreKind, tmp_path: Path) -> None:
    """The others are checked."""

    async def live(application: Application) -> None:
        host = await application.map()
        await Copy(host).take([founded("acme"), created("ana")])
        with application.engine.begin() as connection:
            connection.execute(sa.delete(application.teams))
            users = application.users.fullname
            connection.execute(sa.text(f"ALTER TABLE {users} DROP COLUMN first_name"))
        found = await find(application)
        assert found["users", None] == Difference(
            mapping=users,
            problem="unchecked",
            reason=f"The column {users}.first_name doesn't exist. Run your migrations",
        )
        assert found["teams", "acme"].problem == "missing"

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_release_neither_checks_nor_rehearses(kind: StoreKind, tmp_path: Path) -> None:
    """While a newer one runs. One that isn't registered yet may be tried."""

    async def live(application: Application) -> None:
        own = application.users.c
        await application.map()
        await Copy(application.host).take([created("ana")])
        older = application.mappings
        columns = {own.email: "email", own.first_name: "name", own.active: lambda user: True}
        host = await application.map(columns=columns)
        newer, application.mappings = application.mappings, older
        unchecked = (await find(application))[("users", None)]
        assert unchecked.problem == "unchecked"
        assert (unchecked.reason or "").startswith("a newer release of your application maps it")
        with pytest.raises(InvalidMapping, match="a newer release"):
            await apply_all(host, older, dry_run=True)
        application.mappings = newer
        assert ("users", None) not in await find(application)

    Application.run(kind, tmp_path, live)


def choose_plan(user: Any) -> str:
    """Take a moment, and for one user long."""
    time.sleep(0.3 if user.logto_user_id == "u007" else 0.004)
    return "paid"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_only_too_slow_if_it_takes_too_long_alone(
    kind: StoreKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of these takes a large part of the time, but not too long."""
    names = [f"u{number}" for number in range(5)]

    def choose(user: Any) -> str:
        time.sleep(0.21)
        return "paid"

    async def live(application: Application) -> None:
        own = application.users.c
        host = await application.map(columns={own.plan: choose}, create_defaults={own.active: True})
        await Copy(host).take([make.user_created(id=name, at=1_000).body for name in names])
        await retry_unsettled(host, application.mappings)
        monkeypatch.setattr(functions, "SHARED_S", 0.6)
        assert await find(application) == {}

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("links", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_no_differences_because_functions_take_a_while(
    kind: StoreKind, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compared in as many transactions as that takes."""
    names = [f"u{number:03}" for number in range(90)]

    async def live(application: Application) -> None:
        own = application.users.c
        options = {"columns": {own.plan: choose_plan}, "create_defaults": {own.active: True}}
        host = await application.map(**options, link=own.email if links else None)
        if not links:
            await Copy(host).take([make.user_created(id=name, at=1_000).body for name in names])
            await retry_unsettled(host, application.mappings)
            assert len(application.rows(application.users, "id")) == len(names)
        else:
            host.project = None
            emails = [make.user_created(id=n, email=f"{n}@x", at=1_000).body for n in names]
            await Copy(host).take(emails)
            for name in names:
                insert(application, application.users, email=f"{name}@x", plan="a", active=True)
        monkeypatch.setattr(functions, "SHARED_S", 0.2)
        found = await find(application)
        slow = found.pop(("users", "u007"))
        assert (slow.problem, slow.state) == ("refused", "refused")
        assert "takes longer than 0.2 s" in str(slow.reason)
        problems = {difference.problem for difference in found.values()}
        assert problems == ({"unlinked"} if links else set())
        assert len(found) == (len(names) - 1 if links else 0)

    Application.run(kind, tmp_path, live)
