"""Generated lives through generated tables: each row is right or says why not, and the
application's own rows stay as they are."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.mapped_rows import ARRIVED
from logto_webhooks.database.schema import mapped_rows, members, organizations, users
from logto_webhooks.database.store import Store
from logto_webhooks.errors import InvalidMapping
from logto_webhooks.logto import api_responses
from logto_webhooks.logto.api_responses import Span
from logto_webhooks.mapping.apply import apply_all, retry_unsettled
from logto_webhooks.mapping.check import find_differences
from logto_webhooks.records.record import membership
from tests.integration.test_generated_mapping import People
from tests.support.generated_lives import Told
from tests.support.generated_schemas import ROLES, ShapedApplication, draw_shape
from tests.support.mapped_application import learn
from tests.support.own_changes import OwnChanges, Tagged
from tests.support.stores import Copy, StoreKind

SEEDS = int(os.environ.get("LOGTO_WEBHOOKS_TEST_SCHEMAS", "12"))
STEPS = 40
# Why the application's constraints, or its own rows, can stop a row, as PostgreSQL and SQLite say.
REASONS = (
    "UNIQUE",
    "unique_violation",
    "another row has the value of email",
    "NOTNULL",  # ON DELETE SET NULL of a column that can't be null
    "not_null_violation",
    "FOREIGNKEY",
    "foreign_key_violation",
    "refer to it",
    "no row yet",
    "could be linked",
    "several rows have its",
)


class PeopleWithRoles(People):
    """People who also get roles, of which only Logto's API tells."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.told: list[Told] = []
        self.emails: dict[str, set[str]] = {}  # all that each user ever had

    def step(self) -> None:
        done = len(self.bodies)
        super().step()
        self.told += self.bodies[done:]
        self._note_emails()
        if self._members and self._rng.random() < 0.25:
            pair = membership(*self._rng.choice(sorted(self._members)))
            self.told.append(
                api_responses.read_pairs([pair], {pair: self._draw_roles()}, self._tick())
            )
        if self._emails and self._rng.random() < 0.2:
            user = self._rng.choice(sorted(self._emails))
            roles = [{"id": id_, "name": name} for id_, name in self._draw_roles().items()]
            self.told.append([api_responses.read_roles(user, roles, self._tick())])

    def _change(self, user: str, email: str | None) -> None:
        super()._change(user, email)
        self._note_emails()

    def _note_emails(self) -> None:
        for user, email in self._emails.items():
            self.emails.setdefault(user, set()).add(email)

    def _tick(self) -> Span:
        self._now += 1_000
        return Span(self._now, self._now)

    def _draw_roles(self) -> dict[str, str]:
        """Draw roles by id; the same role can have another name the next time."""
        names = self._rng.sample(ROLES, self._rng.randint(0, 2))
        ids = self._rng.sample(["r1", "r2", "r3"], len(names))
        return dict(zip(ids, names, strict=True))


class State(Struct):
    """All that there is in the end."""

    users: dict[str, Any]  # of the mirror
    teams: dict[str, Any]
    pairs: set[tuple[str, str]]  # memberships whose ends are there
    states: dict[tuple[str, str], Any]  # of own rows, by table and record
    own_users: list[sa.RowMapping]
    own_teams: list[sa.RowMapping]
    own_members: list[sa.RowMapping]
    tasks: list[sa.RowMapping]
    shifts: list[sa.RowMapping]

    def is_settled(self, table: sa.Table, id_: str) -> bool:
        """Whether a record's row needs nothing."""
        state = self.states.get((table.fullname, id_))
        return state is None or state.state in ("ok", "excluded")

    def is_excluded(self, table: sa.Table, id_: str) -> bool:
        """Whether a record gets no row."""
        state = self.states.get((table.fullname, id_))
        return state is not None and state.state == "excluded"

    def rows_of_user(self, id_: str | None) -> list[sa.RowMapping]:
        """Return the own rows of a user."""
        return [row for row in self.own_users if row["user"] == id_]

    def rows_of_team(self, id_: str | None) -> list[sa.RowMapping]:
        """Return the own rows of an organization."""
        return [row for row in self.own_teams if row["logto_id"] == id_]


async def read_state(application: ShapedApplication) -> State:
    def read(store: Store) -> tuple[Any, ...]:
        connection = store._connection
        ids = (members.c.logto_organization_id, members.c.logto_user_id)
        states = connection.execute(sa.select(mapped_rows))
        return (
            {row.logto_user_id: row for row in connection.execute(sa.select(users))},
            {r.logto_organization_id: r for r in connection.execute(sa.select(organizations))},
            {tuple(row) for row in connection.execute(sa.select(*ids))},
            {(row.mapping, row.logto_id): row for row in states},
        )

    known_users, teams, pairs, states = await application.host.read(read)
    living = {id_ for id_, row in known_users.items() if row.deleted_at is None}
    living_teams = {id_ for id_, row in teams.items() if row.deleted_at is None}
    with application.engine.connect() as connection:

        def rows(table: sa.Table | None, *more: Any) -> list[sa.RowMapping]:
            query = None if table is None else sa.select(table, *more)
            return [] if query is None else list(connection.execute(query).mappings())

        return State(
            users=known_users,
            teams=teams,
            pairs={pair for pair in pairs if pair[0] in living_teams and pair[1] in living},
            states=states,
            own_users=rows(application.users, application.user_id.label("user")),
            own_teams=rows(application.teams),
            own_members=application.read_members(connection),
            tasks=rows(application.tasks),
            shifts=rows(application.shifts),
        )


def find_wrong_users(application: ShapedApplication, state: State) -> Iterator[str]:
    """A living user has one row, which is equal; a deleted one has none, or as was asked for."""
    shape = application.shape
    for id_, record in state.users.items():
        rows = state.rows_of_user(id_)
        if not state.is_settled(application.users, id_):
            continue
        if record.deleted_at is not None:
            if rows and shape.user_deleted in ("delete", "unlink"):
                yield f"{id_} is deleted, but has {rows}"
            if shape.user_deleted == "inactive" and any(row["active"] for row in rows):
                yield f"{id_} is deleted, but active: {rows}"
        elif state.is_excluded(application.users, id_):
            if len(rows) > 1:
                yield f"{id_} has several rows: {rows}"
        elif len(rows) != 1:
            yield f"{id_} has not one row: {rows}"
        elif rows[0]["name"] != record.name or (
            not shape.fills_email and rows[0]["email"] != record.email
        ):
            yield f"{rows[0]} is not {record}"
    for row in state.own_users:
        if row["user"] is not None and row["user"] not in state.users:
            yield f"{row} is nobody's"


def find_wrong_teams(application: ShapedApplication, state: State) -> Iterator[str]:
    """The same for organizations."""
    for id_, record in state.teams.items():
        rows = state.rows_of_team(id_)
        if not state.is_settled(application.teams, id_):
            continue
        if record.deleted_at is None and [row["name"] for row in rows] != [record.name]:
            yield f"{rows} are not {record}"
        if record.deleted_at is not None and rows and application.shape.team_deleted != "keep":
            yield f"{id_} is deleted, but has {rows}"


def find_wrong_members(
    application: ShapedApplication, state: State, changes: OwnChanges
) -> Iterator[str]:
    """A membership whose ends have rows has one; one that is over has none."""
    counts = Counter((row["organization"], row["user"]) for row in state.own_members)
    for team, user in state.pairs:
        has_ends = application.shape.refers_to == "nothing" or (
            len(state.rows_of_user(user)) == len(state.rows_of_team(team)) == 1
        )
        is_settled = state.is_settled(application.members, f"{team}:{user}")
        if has_ends and is_settled and counts[team, user] != 1:
            yield f"{team}:{user} has {counts[team, user]} rows"
    own = list_own_pairs(state, changes)
    for pair in counts.keys() - state.pairs - own:
        if None not in pair and (
            state.is_settled(application.members, ":".join(pair))
            and state.is_settled(application.teams, pair[0])
            and state.is_settled(application.users, pair[1])
        ):
            yield f"{pair} is over, but has a row"


def list_taken(changes: OwnChanges) -> set[str | None]:
    """List the users whose rows the application had taken for itself. It keeps what referred to
    these, also if such a row is linked again."""
    return {known.user for known in changes.tagged.values() if known.what == "own"} - {None}


def list_own_pairs(state: State, changes: OwnChanges) -> set[tuple[str | None, str | None]]:
    """List the pairs of rows that the application has added, or taken for itself."""
    own = set(changes.entered)
    taken = list_taken(changes)
    for row in state.own_members:
        known = changes.tagged.get(row["tag"])
        if row["user"] in taken or (known is not None and known.what == "given"):
            own.add((row["organization"], row["user"]))
    return own


def find_wrong_own_rows(
    application: ShapedApplication, state: State, changes: OwnChanges, emails: dict[str, set[str]]
) -> Iterator[str]:
    """The application's own rows are there, and those that it refers to stay the same person's."""
    of_users = {row["tag"]: row for row in state.own_users}
    of_members = {row["tag"]: row for row in state.own_members}
    for tag, known in changes.tagged.items():
        if known.is_over:
            continue
        row = of_users.get(tag)
        member = of_members.get(tag)
        match known.what:
            case "own":
                yield from _find_wrong_own(application, tag, known, row, emails)
            case "user":
                may_be_gone = application.shape.user_deleted == "delete"
                if row is None and not (may_be_gone and known.user in emails):
                    yield f"{tag}: {known} is gone"
                elif row is not None and row["user"] not in (None, known.user):
                    yield f"{tag}: {known} is {row}"
                elif row is not None and row["user"] is not None and "tasks" not in known.lost:
                    value = row[application.user_ref.name]
                    if application.tasks is not None:
                        yield from _find_wrong_work(tag, state.tasks, value)
            case "member":
                pair = (known.team, known.user)
                if member is not None and None not in (
                    now := (member["organization"], member["user"])
                ):
                    if now != pair:
                        yield f"{tag}: {known} is {member}"
                    elif (
                        pair in state.pairs
                        and "shifts" not in known.lost
                        and application.shifts is not None
                    ):
                        yield from _find_wrong_work(tag, state.shifts, member["id"])
            case "invitation":
                may_be_gone = "seats" in known.lost or (
                    application.shape.on_delete == "CASCADE" and not state.rows_of_team(known.team)
                )
                if member is None and not may_be_gone:
                    yield f"{tag}: {known} is gone"
                elif member is not None and (member["person"], member["role"]) != (None, "invited"):
                    yield f"{tag}: {known} is {member}"
            case "given":
                owner = of_users.get(known.owner)
                is_own = (
                    owner is not None and owner["user"] is None and state.rows_of_team(known.team)
                )
                if member is None and is_own and "seats" not in known.lost:
                    yield f"{tag}: {known} is gone"


def _find_wrong_own(
    application: ShapedApplication,
    tag: str,
    known: Tagged,
    row: sa.RowMapping | None,
    emails: dict[str, set[str]],
) -> Iterator[str]:
    shape = application.shape
    if row is None:  # it may have been linked, and deleted with its user
        if not shape.links_users or shape.user_deleted != "delete":
            yield f"{tag}: {known} is gone"
    elif row["user"] not in (None, known.user) and not (
        shape.links_users and known.email in emails.get(row["user"], ())
    ):
        yield f"{tag}: {known} is {row}"


def _find_wrong_work(tag: str, work: list[sa.RowMapping], value: Any) -> Iterator[str]:
    """What refers to a row still does."""
    rows = [row for row in work if row["tag"] == tag]
    if [row["of"] for row in rows] != [value]:
        yield f"{tag}: {rows} don't refer to {value}"


def find_wrong_references(application: ShapedApplication, state: State) -> Iterator[str]:
    """Nothing refers to a row that isn't there."""
    there = {row[application.user_ref.name] for row in state.own_users}
    for row in state.tasks:
        if row["of"] is not None and row["of"] not in there:
            yield f"{row} refers to nothing"


def find_wrong_reasons(application: ShapedApplication, state: State) -> Iterator[str]:
    """What isn't settled has a reason that is still true."""
    for (table, id_), own in state.states.items():
        if own.state in ("ok", "excluded") or own.blocked_by == ARRIVED:
            continue
        reason = str(own.reason)
        others = [row["email"] for row in state.own_users if row["user"] != id_]
        if own.state == "owed" or not any(part in reason for part in REASONS):
            yield f"{own} is unexpected"
        elif table == application.users.fullname and ("UNIQUE" in reason or "unique" in reason):
            if state.users[id_].email not in others:
                yield f"nobody has the email of {own}"
        elif reason == "the user has no row yet":
            parts = id_.split(":")
            if state.rows_of_user(parts[1] if own.kind == "membership" else parts[0]):
                yield f"{own} waits for nothing"
        elif reason == "the organization has no row yet" and state.rows_of_team(id_.split(":")[0]):
            yield f"{own} waits for nothing"


async def find_wrong_reports(
    application: ShapedApplication, state: State, changes: OwnChanges
) -> list[str]:
    """`mapping check` finds nothing that isn't known."""
    own = list_own_pairs(state, changes)
    taken = list_taken(changes)

    def is_own(id_: str | None) -> bool:
        parts = str(id_).split(":")
        return tuple(parts[:2]) in own or not taken.isdisjoint(parts)

    return [
        f"`mapping check` finds {difference}"
        async for page in find_differences(application.host, application.mappings)
        for difference in page
        if difference.problem in ("missing", "different", "extra")
        and difference.state in (None, "ok")
        and not (difference.problem == "extra" and is_own(difference.logto_id))
    ]


async def live(application: ShapedApplication, rng: random.Random) -> list[str]:
    """Live for a while. Return what is wrong in the end."""
    await application.map_tables(*application.declare_all().all)
    await application.apply_all()
    people, changes = PeopleWithRoles(rng), OwnChanges(application, rng)
    for _ in range(rng.randint(0, 4)):
        changes.add_user()
    for _ in range(rng.randint(3, STEPS)):
        people.step()
    left = list(people.told)
    if rng.random() < 0.6:
        left += [told for told in left if rng.random() < 0.1]
        rng.shuffle(left)
    copy = Copy(application.host)
    while left:
        size = rng.randint(1, 6)
        piece, left = left[:size], left[size:]
        await copy.take([told for told in piece if isinstance(told, bytes)])
        for told in piece:
            if not isinstance(told, bytes):
                await learn(application.host, told)
        for _ in range(rng.randint(0, 4)):
            changes.change()
        if rng.random() < 0.1:
            await apply_all(application.host, application.mappings)
    await retry_unsettled(application.host, application.mappings)
    await apply_all(application.host, application.mappings)
    await retry_unsettled(application.host, application.mappings)
    state = await read_state(application)
    return [
        *find_wrong_users(application, state),
        *find_wrong_teams(application, state),
        *find_wrong_members(application, state, changes),
        *find_wrong_own_rows(application, state, changes, people.emails),
        *find_wrong_references(application, state),
        *find_wrong_reasons(application, state),
        *await find_wrong_reports(application, state, changes),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", ["sqlite", "postgres-thread"])
def test_rows_are_right_or_say_why_not(kind: StoreKind, seed: int, tmp_path: Path) -> None:
    """Whatever the tables are like, and whatever the application does beside."""
    rng = random.Random(seed)

    async def run() -> list[str]:
        application = ShapedApplication(kind, tmp_path, draw_shape(rng))
        try:
            return await live(application, rng)
        except InvalidMapping:
            pytest.skip("such a mapping is refused")
        finally:
            await application.close()

    assert asyncio.run(run()) == []
