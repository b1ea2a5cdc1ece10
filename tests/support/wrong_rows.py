"""What is wrong with the rows of an application with generated tables, by what the docs say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.database.mapped_rows import ARRIVED
from logto_webhooks.database.schema import mapped_rows, members, organizations, users
from logto_webhooks.database.store import Store
from logto_webhooks.mapping.check import find_differences
from tests.support.generated_schemas import Shape, ShapedApplication, list_work_ends
from tests.support.own_changes import OwnChanges, Tagged
from tests.support.people_with_roles import PeopleWithRoles

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


def store_email(shape: Shape, email: str | None) -> str | None:
    """Return what the database stores if an email is written."""
    return email.lower() if shape.trigger == "lowers" and email is not None else email


def are_equal(shape: Shape, one: str | None, other: str | None) -> bool:
    """Whether two rows' emails are equal to the database, which compares them."""
    if one is None or other is None:
        return False
    return one.lower() == other.lower() if shape.folds_email else one == other


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
            not shape.fills_email and rows[0]["email"] != store_email(shape, record.email)
        ):
            yield f"{rows[0]} is not {record}"
        elif shape.inherits and rows[0]["kind"] != "customer":
            yield f"{rows[0]} is of another class"
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
        if row["user"] in taken or (known is not None and known.what in ("given", "handed")):
            own.add((row["organization"], row["user"]))
    return own


def find_wrong_own_rows(
    application: ShapedApplication, state: State, changes: OwnChanges, people: PeopleWithRoles
) -> Iterator[str]:
    """The application's own rows are there, and those that it refers to stay the same person's."""
    emails = people.emails
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
            case "employee" if row is None or row["user"] is not None:
                yield f"{tag}: {known} is {row}"
            case "user":
                may_be_gone = application.shape.user_deleted == "delete"
                if row is None and not (may_be_gone and known.user in emails):
                    yield f"{tag}: {known} is gone"
                elif row is not None and row["user"] not in (None, known.user):
                    yield f"{tag}: {known} is {row}"
                elif row is not None and row["user"] is not None and "tasks" not in known.lost:
                    yield from _find_wrong_work(tag, application.tasks, state.tasks, row)
            case "member":
                pair = (known.team, known.user)
                if member is not None and None not in (
                    now := (member["organization"], member["user"])
                ):
                    if now != pair:
                        yield f"{tag}: {known} is {member}"
                    elif pair in state.pairs and "shifts" not in known.lost:
                        yield from _find_wrong_work(tag, application.shifts, state.shifts, member)
            case "invitation":
                may_be_gone = "seats" in known.lost or (
                    application.shape.on_delete == "CASCADE" and not state.rows_of_team(known.team)
                )
                if member is None and not may_be_gone:
                    yield f"{tag}: {known} is gone"
                elif member is not None and (member["person"], member["role"]) != (None, "invited"):
                    yield f"{tag}: {known} is {member}"
            case "given" | "handed" if "seats" not in known.lost:
                owner = of_users.get(known.owner) if known.owner is not None else None
                if known.what == "handed" and _is_handed_for_good(known, people):
                    owner = next(iter(state.rows_of_user(known.user)), None)
                is_of_owner = owner is not None and owner["user"] == known.user
                if owner is not None and is_of_owner and state.rows_of_team(known.team):
                    yield from _find_wrong_given(application, tag, known, member, owner)


def _is_handed_for_good(known: Tagged, people: PeopleWithRoles) -> bool:
    """Whether the user to whom a row was given was never deleted, and never became a member."""
    was_member = (known.team, known.user) in people.joined
    return known.user not in people.deleted and not was_member


def _find_wrong_given(
    application: ShapedApplication,
    tag: str,
    known: Tagged,
    member: sa.RowMapping | None,
    owner: sa.RowMapping,
) -> Iterator[str]:
    """A row that the application gave to others is never changed again."""
    ends = (owner[application.user_ref.name], known.role)
    if member is None or (member["person"], member["role"]) != ends:
        yield f"{tag}: {known} is {member}"


def _find_wrong_own(
    application: ShapedApplication,
    tag: str,
    known: Tagged,
    row: sa.RowMapping | None,
    emails: dict[str, set[str]],
) -> Iterator[str]:
    shape = application.shape
    if row is None:  # it may have been linked, and deleted with its user
        if shape.link is None or shape.user_deleted != "delete":
            yield f"{tag}: {known} is gone"
    elif row["user"] not in (None, known.user) and not (
        shape.link is not None
        and known.email is not None
        and known.email.lower() in {email.lower() for email in emails.get(row["user"], ())}
    ):
        yield f"{tag}: {known} is {row}"


def _find_wrong_work(
    tag: str, table: sa.Table | None, work: list[sa.RowMapping], row: sa.RowMapping
) -> Iterator[str]:
    """What refers to a row still does."""
    if table is not None:
        rows = [each for each in work if each["tag"] == tag]
        refers = {end.name: row[end.name.removeprefix("of_")] for end in list_work_ends(table)}
        if len(rows) != 1 or any(rows[0][name] != value for name, value in refers.items()):
            yield f"{tag}: {rows} don't refer to {row}"


def find_wrong_references(application: ShapedApplication, state: State) -> Iterator[str]:
    """Nothing refers to a row that isn't there."""
    for table, work, rows in (
        (application.tasks, state.tasks, state.own_users),
        (application.shifts, state.shifts, state.own_members),
    ):
        names = [] if table is None else [end.name for end in list_work_ends(table)]
        there = {tuple(row[name.removeprefix("of_")] for name in names) for row in rows}
        for row in work:
            ends = tuple(row[name] for name in names)
            if None not in ends and ends not in there:
                yield f"{row} refers to nothing"


def find_wrong_swaps(application: ShapedApplication, state: State) -> Iterator[str]:
    """Emails that go round are written together, so nobody waits for who waits for the first."""
    shape, table = application.shape, application.users.fullname
    if shape.fills_email:  # which never changes an email
        return
    conflicting = {
        id_ for (of, id_), own in state.states.items() if (of, own.state) == (table, "conflict")
    }
    holder_of = {
        id_: row["user"]
        for id_ in conflicting
        for row in state.own_users
        if row["user"] in conflicting - {id_}
        and are_equal(shape, row["email"], state.users[id_].email)
    }
    for id_ in holder_of:
        chain = [id_]
        while (holder := holder_of.get(chain[-1])) is not None and holder not in chain:
            chain.append(holder)
        if holder == id_:
            yield f"{chain} wait for each other's emails"


def find_wrong_links(application: ShapedApplication, before: State, after: State) -> Iterator[str]:
    """A row that several users want was linked to none of them."""
    free = [row for row in before.own_users if _is_linkable(row)]
    emails = Counter(row["email"].lower() for row in free)
    now = {row["tag"]: row["user"] for row in after.own_users}
    for row in free:
        email, user = row["email"].lower(), now.get(row["tag"])
        if user is None or emails[email] > 1:
            continue
        rivals = [
            id_
            for id_ in before.users.keys() - {user}
            if _wants(application, before, id_, email) and _wants(application, after, id_, email)
        ]
        if rivals:
            yield f"{row} was linked to {user}, but {rivals} want it, too"


def _is_linkable(row: sa.RowMapping) -> bool:
    """Whether a row never was a user's: one that was may be linked to that user again."""
    is_own = str(row["tag"]).startswith("own ") and row["name"] == row["tag"]
    return is_own and row["user"] is None and row["email"] is not None


def _wants(application: ShapedApplication, state: State, id_: str, email: str) -> bool:
    """Whether a user who never had a row is to be linked by an email."""
    own = state.states.get((application.users.fullname, id_))
    is_settled = own is not None and own.state in ("ok", "excluded")
    is_in_part = own is not None and "the whole user" in str(own.reason)
    had_row = own is not None and own.row_id is not None  # which the application has emptied
    record = state.users[id_]
    return (
        record.deleted_at is None
        and str(record.email).lower() == email
        and not state.rows_of_user(id_)
        and not (is_settled or is_in_part or had_row)
    )


def find_wrong_reasons(application: ShapedApplication, state: State) -> Iterator[str]:
    """What isn't settled has a reason that is still true."""
    for (table, id_), own in state.states.items():
        if own.state in ("ok", "excluded") or own.blocked_by == ARRIVED:
            continue
        reason = str(own.reason)
        others = [row["email"] for row in state.own_users if row["user"] != id_]
        shape = application.shape
        if own.state == "owed" or not any(part in reason for part in REASONS):
            yield f"{own} is unexpected"
        elif table == application.users.fullname and ("UNIQUE" in reason or "unique" in reason):
            if not any(are_equal(shape, state.users[id_].email, other) for other in others):
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

    def is_lowered(id_: str | None) -> bool:
        """Whether a trigger has changed what was written."""
        email = state.users[str(id_)].email if id_ in state.users else None
        return email != store_email(application.shape, email)

    return [
        f"`mapping check` finds {difference}"
        async for page in find_differences(application.host, application.mappings)
        for difference in page
        if difference.problem in ("missing", "different", "extra")
        and difference.state in (None, "ok")
        and not (difference.problem == "extra" and is_own(difference.logto_id))
        and not (difference.problem == "different" and is_lowered(difference.logto_id))
    ]


async def find_wrong(
    application: ShapedApplication, changes: OwnChanges, people: PeopleWithRoles
) -> list[str]:
    """Find all that is wrong in the end."""
    state = await read_state(application)
    return [
        *find_wrong_users(application, state),
        *find_wrong_teams(application, state),
        *find_wrong_members(application, state, changes),
        *find_wrong_own_rows(application, state, changes, people),
        *find_wrong_references(application, state),
        *find_wrong_swaps(application, state),
        *find_wrong_reasons(application, state),
        *await find_wrong_reports(application, state, changes),
    ]
