"""What an application does with its own rows, beside the mappings, and remembers of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa
from msgspec import Struct, field

from tests.support.generated_schemas import ShapedApplication, list_work_ends

EMAILS: Final = [f"{letter}@x.example" for letter in "abcde"]
TEAMS: Final = ("acme", "best", "mine")


class Tagged(Struct, kw_only=True):
    """What the application knows of a row that it has given a tag, which no mapping changes."""

    what: str  # "own", "employee", "user", "member", "invitation", "given" or "handed"
    email: str | None = None
    user: str | None = None
    team: str | None = None
    owner: str | None = None  # the tag of an own row
    role: str | None = None  # as it was when the row was given away
    is_over: bool = False  # the application has deleted it, or made something else of it
    # Tables whose rows with this tag are gone, or refer to nothing, by its own deletions.
    lost: set[str] = field(default_factory=set)


class OwnChanges:
    """Changes rows at random, and remembers what must become of them."""

    def __init__(self, application: ShapedApplication, rng: random.Random) -> None:
        self._application = application
        self._shape = application.shape
        self._rng = rng
        self.tagged: dict[str, Tagged] = {}
        self.entered: set[tuple[str | None, str | None]] = set()  # memberships that aren't Logto's
        self.told: list[str] = []

    def add_user(self) -> None:
        """Add a row of users; the database may refuse it."""
        self._try(self._add_user)

    def change(self) -> None:
        """Do one thing; the database may refuse it."""
        changes = [self._add_user, self._edit_user, self._delete_user, self._empty_id]
        changes += 3 * [self._tag_user, self._tag_member]
        changes += 2 * [self._give_away]
        changes += [self._hand_over, self._invite, self._enter_member, self._delete_member]
        changes += [self._set_manager, self._set_owner, self._add_team]
        self._try(self._rng.choice(changes))

    def _try(self, change: Callable[[sa.Connection], None]) -> None:
        tagged, entered = copy.deepcopy(self.tagged), set(self.entered)
        try:
            with self._application.engine.begin() as connection:
                change(connection)
        except sa.exc.IntegrityError:
            self.told.append(f"refused: {change.__name__}")
            self.tagged = tagged
            self.entered = entered

    def _tag(self, **known: Any) -> str:
        tagged = Tagged(**known)
        tag = f"{tagged.what} {len(self.tagged) + len(self.told)}"
        self.tagged[tag] = tagged
        self.told.append(f"{tag}: {tagged}")
        return tag

    def _end_tag(self, tag: str | None) -> None:
        if tag in self.tagged:
            self.tagged[tag].is_over = True

    def _choose(self, rows: list[sa.RowMapping]) -> sa.RowMapping | None:
        rows = sorted(rows, key=lambda row: repr(tuple(row.values())))
        return self._rng.choice(rows) if rows else None

    def _choose_user(
        self, connection: sa.Connection, *where: sa.ColumnElement[bool]
    ) -> sa.RowMapping | None:
        own = self._application
        query = sa.select(own.users, own.user_id.label("user")).where(*where)
        return self._choose(list(connection.execute(query).mappings()))

    def _choose_team(self, connection: sa.Connection) -> sa.RowMapping | None:
        query = sa.select(self._application.teams)
        return self._choose(list(connection.execute(query).mappings()))

    def _choose_member(self, connection: sa.Connection) -> sa.RowMapping | None:
        """Choose a row whose ends are both Logto's."""
        rows = self._application.read_members(connection)
        return self._choose([row for row in rows if row["user"] and row["organization"]])

    def _choose_movable(self, connection: sa.Connection) -> sa.RowMapping | None:
        """Choose a member's row whose ends may change: without checks, shifts wouldn't follow."""
        shifts = self._application.shifts
        is_followed = shifts is None or len(list_work_ends(shifts)) == 1 or self._shape.enforces
        return self._choose_member(connection) if is_followed else None

    def _update(
        self, connection: sa.Connection, table: sa.Table, row: sa.RowMapping, **values: Any
    ) -> None:
        connection.execute(sa.update(table).where(_is(table, row)).values(values))

    def _add_user(self, connection: sa.Connection) -> None:
        # Only rows of the mapped class may be linked.
        is_employee = self._shape.inherits and self._rng.random() < 0.3
        email = self._rng.choice(EMAILS)
        self._insert_user(connection, "employee" if is_employee else "own", email)

    def _insert_user(self, connection: sa.Connection, what: str, email: str | None) -> None:
        if self._shape.owns_key:
            tag = self._tag(what=what, email=email)
            values: dict[str, Any] = {"email": email, "name": tag, "tag": tag, "active": True}
            values["kind"] = "person" if what == "employee" else "customer"
            connection.execute(sa.insert(self._application.users).values(values))

    def _edit_user(self, connection: sa.Connection) -> None:
        if row := self._choose_user(connection, self._application.user_id.is_not(None)):
            changes: list[dict[str, Any]] = [
                {"name": "mine"},
                {"email": self._rng.choice(EMAILS)},
                {"email": None},
            ]
            change = self._rng.choice(changes)
            self.told.append(f"edit {row['user']}: {change}")
            self._update(connection, self._application.users, row, **change)

    def _delete_user(self, connection: sa.Connection) -> None:
        row = self._choose_user(connection)
        if row is not None and self._shape.enforces and self._rng.random() < 0.5:
            self.told.append(f"delete {row['user']}, {row['tag']}")
            users = self._application.users
            connection.execute(sa.delete(users).where(_is(users, row)))
            self._end_tag(row["tag"])
            self._note_lost(connection)

    def _empty_id(self, connection: sa.Connection) -> None:
        """The application takes a user's row for itself."""
        own = self._application
        if not self._shape.owns_key or own.user_ref.name == "logto_id":
            return
        row = self._choose_user(connection, own.user_id.is_not(None))
        if row is not None and self._rng.random() < 0.5:
            tag = self._tag(what="own", email=row["email"], user=row["user"])
            emptied: dict[str, Any] = (
                {"meta": {}} if self._shape.holds_id == "json" else {"logto_id": None}
            )
            self._update(connection, own.users, row, tag=tag, **emptied)
            self._end_tag(row["tag"])
            for member in own.read_members(connection):
                if member["person"] == row[own.user_ref.name] and member["organization"]:
                    given = self._tag(
                        what="given", team=member["organization"], owner=tag, role=member["role"]
                    )
                    self._update(connection, own.members, member, tag=given)
                    self._end_tag(member["tag"])

    def _tag_user(self, connection: sa.Connection) -> None:
        own = self._application
        row = self._choose_user(connection, own.user_id.is_not(None), own.users.c.tag.is_(None))
        if row is None:
            return
        tag = self._tag(what="user", user=row["user"])
        self._update(connection, own.users, row, tag=tag)
        if own.tasks is not None:
            connection.execute(sa.insert(own.tasks).values(_refer(own.tasks, row) | {"tag": tag}))

    def _tag_member(self, connection: sa.Connection) -> None:
        own = self._application
        row = self._choose_member(connection)
        if row is None or row["tag"] is not None:
            return
        tag = self._tag(what="member", team=row["organization"], user=row["user"])
        self._update(connection, own.members, row, tag=tag)
        if own.shifts is not None:
            connection.execute(sa.insert(own.shifts).values(_refer(own.shifts, row) | {"tag": tag}))

    def _invite(self, connection: sa.Connection) -> None:
        own, team = self._application, self._choose_team(connection)
        if team is None or not (self._shape.allows_invitations and self._shape.members_have_id):
            return
        end = "logto_id" if self._shape.refers_to == "nothing" else own.team_ref.name
        tag = self._tag(what="invitation", team=team["logto_id"])
        row = {"team": team[end], "person": None, "role": "invited", "tag": tag}
        connection.execute(sa.insert(own.members).values(row))

    def _give_away(self, connection: sa.Connection) -> None:
        """Give the row of a membership to a user of the application's own."""
        own, row = self._application, self._choose_movable(connection)
        if self._shape.refers_to != "key" or not self._shape.owns_key or row is None:
            return
        is_own = [own.user_id.is_(None), own.users.c.tag.startswith("own ")]
        user = self._choose_user(connection, *is_own)
        if user is None or self._rng.random() < 0.5:
            self._insert_user(connection, "own", None)
            user = self._choose_user(connection, *is_own)
        if user is not None:
            tag = self._tag(
                what="given", team=row["organization"], owner=user["tag"], role=row["role"]
            )
            self._move(connection, row, user, tag)

    def _hand_over(self, connection: sa.Connection) -> None:
        """Give the row of a membership to another user of Logto's."""
        own, row = self._application, self._choose_movable(connection)
        user = self._choose_user(connection, own.user_id.is_not(None))
        if self._shape.refers_to == "nothing" or row is None or user is None:
            return
        if user["user"] != row["user"]:
            team = row["organization"]
            tag = self._tag(what="handed", team=team, user=user["user"], role=row["role"])
            self._move(connection, row, user, tag)

    def _move(
        self, connection: sa.Connection, member: sa.RowMapping, user: sa.RowMapping, tag: str
    ) -> None:
        own = self._application
        self._update(connection, own.members, member, person=user[own.user_ref.name], tag=tag)
        self._end_tag(member["tag"])

    def _enter_member(self, connection: sa.Connection) -> None:
        """Add a member, perhaps before Logto tells of it."""
        own = self._application
        user, team = self._choose_user(connection), self._choose_team(connection)
        if self._shape.refers_to == "nothing" or user is None or team is None:
            return
        tag = None
        is_own = user["user"] is None and str(user["tag"]).startswith("own ")
        if is_own or team["logto_id"] is None:
            owner = user["tag"] if is_own else None
            tag = self._tag(what="given", team=team["logto_id"], owner=owner)
        self.entered.add((team["logto_id"], user["user"]))
        self.told.append(f"enter {team['logto_id']}:{user['user']}")
        ends = {"team": team[own.team_ref.name], "person": user[own.user_ref.name]}
        connection.execute(sa.insert(own.members).values(tag=tag, **ends))

    def _delete_member(self, connection: sa.Connection) -> None:
        own, row = self._application, self._choose_member(connection)
        if row is not None and self._shape.enforces and self._rng.random() < 0.5:
            self.told.append(f"delete {row['organization']}:{row['user']}")
            connection.execute(sa.delete(own.members).where(_is(own.members, row)))
            self._end_tag(row["tag"])
            self._note_lost(connection)

    def _set_manager(self, connection: sa.Connection) -> None:
        row, manager = self._choose_user(connection), self._choose_user(connection)
        if "manager" in self._application.users.c and row is not None and manager is not None:
            self._update(connection, self._application.users, row, manager=manager["id"])

    def _set_owner(self, connection: sa.Connection) -> None:
        own, team = self._application, self._choose_team(connection)
        user = self._choose_user(connection)
        if "owner" in own.teams.c and team is not None and user is not None:
            [key] = own.users.primary_key
            self._update(connection, own.teams, team, owner=user[key.name])

    def _add_team(self, connection: sa.Connection) -> None:
        row = sa.insert(self._application.teams).values(name=self._rng.choice(TEAMS))
        connection.execute(row)

    def _note_lost(self, connection: sa.Connection) -> None:
        """Note what the application's deletions have taken along."""
        own = self._application
        for table in (own.tasks, own.shifts, own.members):
            if table is None:
                continue
            query = sa.select(table.c.tag)
            if table is not own.members:
                query = query.where(*(end.is_not(None) for end in list_work_ends(table)))
            there = set(connection.scalars(query))
            for tag, tagged in self.tagged.items():
                if tag not in there:
                    tagged.lost.add(table.name)


def _is(table: sa.Table, row: sa.RowMapping) -> sa.ColumnElement[bool]:
    return sa.and_(*(column == row[column.name] for column in table.primary_key))


def _refer(work: sa.Table, row: sa.RowMapping) -> dict[str, Any]:
    """Return what the columns of work hold that is of a row."""
    return {end.name: row[end.name.removeprefix("of_")] for end in list_work_ends(work)}
