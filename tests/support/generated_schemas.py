"""Applications with generated tables: their keys, unique columns and foreign keys vary."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

import sqlalchemy as sa
from msgspec import Struct
from sqlalchemy.orm import registry

from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.declare import EntityMapping, declare_entities
from logto_webhooks.mapping.declare_pairs import (
    PairMapping,
    declare_member_roles,
    declare_members,
    declare_user_roles,
)
from tests.support import postgres
from tests.support.mapped_application import Application
from tests.support.stores import StoreKind, open_host

ROLES: Final = ("admin", "editor", "viewer")
EXCLUDED: Final = "a@x.example"  # whoever has this email, if the mapping has `where`
OnDelete = Literal["NO ACTION", "CASCADE", "SET NULL"]


class Shape(Struct, frozen=True, kw_only=True):
    """What varies in the tables and in their mappings."""

    user_key: Literal["integer", "bigint", "text", "uuid", "logto_id"]
    team_key: Literal["integer", "text", "uuid"]
    member_key: Literal["integer", "uuid", "ends"]
    holds_id: Literal["unique", "plain", "json"]  # the column with Logto's id of a user
    email: Literal["unique", "lower", "nocase", "computed", "partial", "plain"]
    refers_to: Literal["key", "logto_id", "nothing"]  # the ends of members
    on_delete: OnDelete
    on_update: Literal["NO ACTION", "CASCADE"]
    is_deferred: bool
    allows_invitations: bool
    pairs_are_unique: bool
    roles: Literal["none", "of users, by name", "of users", "of members", "of ends", "of pairs"]
    tasks: OnDelete | None  # of users
    shifts: OnDelete | None  # of members
    shifts_refer_to: Literal["id", "ends"]
    manager: OnDelete | None  # of a user
    owner: OnDelete | None  # of a team
    link: Literal["email", "function"] | None  # how rows of users are found
    links_teams: bool
    creates: bool
    excludes: bool
    fills_email: bool
    user_deleted: Literal["delete", "unlink", "keep", "inactive"]
    team_deleted: Literal["delete", "unlink", "keep"]
    inherits: bool  # whether the rows of users are of a class that shares its table
    trigger: Literal["counts", "lowers"] | None  # the changes of a user, or the letters of emails
    enforces: bool  # foreign keys, on SQLite

    @property
    def owns_key(self) -> bool:
        """Whether users have a primary key of their own."""
        return self.user_key != "logto_id" or self.holds_id == "json"

    @property
    def folds_email(self) -> bool:
        """Whether two emails are equal if only the case of their letters differs."""
        return self.email in ("lower", "nocase", "computed") or self.trigger == "lowers"

    @property
    def members_have_id(self) -> bool:
        """Whether members have a primary key of one column."""
        return self.member_key != "ends"


_USUAL: Final = 2  # so often is the first choice drawn more


def draw_shape(rng: random.Random) -> Shape:
    """Draw a shape; the first choice of each is the usual one."""
    actions = ("NO ACTION", "CASCADE", "SET NULL")

    def choose(*choices: Any) -> Any:
        return rng.choice([choices[0]] * _USUAL + list(choices[1:]))

    return Shape(
        user_key=choose("integer", "bigint", "text", "uuid", "logto_id"),
        team_key=choose("integer", "text", "uuid"),
        member_key=choose("integer", "uuid", "ends"),
        holds_id=choose("unique", "plain", "json"),
        email=choose("unique", "lower", "nocase", "computed", "partial", "plain"),
        refers_to=choose("key", "logto_id", "nothing"),
        on_delete=choose(*actions),
        on_update=choose("NO ACTION", "CASCADE"),
        is_deferred=choose(False, True),
        allows_invitations=choose(True, False),
        pairs_are_unique=choose(True, False),
        roles=choose("none", "of users, by name", "of users", "of members", "of ends", "of pairs"),
        tasks=choose(*actions, None),
        shifts=choose(*actions, None),
        shifts_refer_to=choose("id", "ends"),
        manager=choose(None, *actions),
        owner=choose(None, *actions),
        link=choose("email", "function", None),
        links_teams=choose(False, True),
        creates=choose(True, True, False),
        excludes=choose(False, True),
        fills_email=choose(False, False, True),
        user_deleted=choose("delete", "unlink", "keep", "inactive"),
        team_deleted=choose("delete", "unlink", "keep"),
        inherits=choose(False, True),
        trigger=choose(None, "counts", "lowers"),
        enforces=choose(True, False),
    )


def draw_application(kind: StoreKind, rng: random.Random) -> ShapedApplication:
    """Draw an application whose tables can be mapped."""
    while True:
        application = ShapedApplication(kind, draw_shape(rng))
        with suppress(InvalidMapping):
            application.declare_all()
            return application


class Person:
    """Whose rows the application has in its table of users."""


class ShapedApplication(Application):
    """An application with tables of a shape."""

    def __init__(self, kind: StoreKind, shape: Shape) -> None:
        self.kind = kind
        self.shape = shape
        self.metadata = sa.MetaData(schema=None if kind == "sqlite" else "app")
        self._uuids = random.Random(1)
        self.users = self._define_users()
        self.user_class = self._define_user_class()
        self.teams = self._define_teams()
        self.user_ref = self._find_referred(self.users)
        self.team_ref = self._find_referred(self.teams)
        self.members = self._define_members()
        self.roles = sa.Table(
            "roles",
            self.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("name", sa.Text, unique=True),
        )
        self.role_rows = self._define_role_rows()
        self.tasks = self._define_work("tasks", [self.user_ref], shape.tasks)
        self.shifts = self._define_work("shifts", self._find_shift_ends(), shape.shifts)

    def create(self, folder: Path) -> None:
        """Create the database, and what is in its tables from the beginning."""
        self.host = open_host(self.kind, folder)
        if self.kind == "sqlite":
            self.engine = sa.create_engine(f"sqlite:///{folder / 'copy.db'}")
            if self.shape.enforces:
                self.enforce_foreign_keys()
        else:
            url = postgres.server_url().set(drivername="postgresql+psycopg")
            self.engine = sa.create_engine(url)
        with self.engine.begin() as connection:
            if self.kind != "sqlite":
                connection.execute(sa.text("DROP SCHEMA IF EXISTS app CASCADE"))
                connection.execute(sa.text("CREATE SCHEMA app"))
            self.metadata.create_all(connection)
            if self.shape.trigger is not None:
                create_trigger(connection, self.users, self.shape.trigger)
            connection.execute(sa.insert(self.roles), [{"name": name} for name in ROLES])

    @property
    def user_id(self) -> sa.ColumnElement[Any]:
        """Logto's id of a user, in SQL."""
        own = self.users.c
        is_json = self.shape.holds_id == "json"
        return own.meta["logto"]["id"].as_string() if is_json else own.logto_id

    def _make_uuid(self) -> uuid.UUID:
        return uuid.UUID(int=self._uuids.getrandbits(128), version=4)

    def _make_key(self, kind: str) -> sa.Column[Any]:
        if kind == "text":
            return sa.Column(
                "id", sa.Text, primary_key=True, default=lambda: str(self._make_uuid())
            )
        if kind == "uuid":
            return sa.Column("id", sa.Uuid, primary_key=True, default=lambda: self._make_uuid())
        is_big = kind == "bigint" and self.kind != "sqlite"
        return sa.Column("id", sa.BigInteger if is_big else sa.Integer, primary_key=True)

    def _define_users(self) -> sa.Table:
        shape = self.shape
        # On PostgreSQL, this needs an extension that isn't installed everywhere.
        is_nocase = shape.email == "nocase" and self.kind == "sqlite"
        text = sa.Text(collation="NOCASE") if is_nocase else sa.Text()
        email = sa.Column("email", text, unique=shape.email == "unique" or is_nocase)
        lower = sa.Computed("lower(email)", persisted=True)
        columns: list[sa.Column[Any]] = [
            email,
            sa.Column("email_in_lower", sa.Text, lower, unique=shape.email == "computed"),
            sa.Column("name", sa.Text),
            sa.Column("active", sa.Boolean, default=True),
            sa.Column("kind", sa.Text),
            sa.Column("changes", sa.Integer, server_default="0"),
        ]
        if shape.holds_id == "json":
            columns.append(sa.Column("meta", sa.JSON))
        elif shape.owns_key:
            columns.append(sa.Column("logto_id", sa.Text, unique=shape.holds_id == "unique"))
        else:
            columns.append(sa.Column("logto_id", sa.Text, primary_key=True))
        if shape.owns_key:
            key = self._make_key(shape.user_key)
            columns.append(key)
            if shape.manager is not None:
                manager = sa.ForeignKey(key, ondelete=shape.manager)
                columns.append(sa.Column("manager", manager))
        table = sa.Table("people", self.metadata, *columns, sa.Column("tag", sa.Text))
        if shape.email == "lower" or (shape.email == "nocase" and not is_nocase):
            sa.Index("people_lower", sa.func.lower(table.c.email), unique=True)
        elif shape.email == "partial":
            where = table.c.active
            sa.Index(
                "people_active", email, unique=True, sqlite_where=where, postgresql_where=where
            )
        return table

    def _define_user_class(self) -> type[Person]:
        classes = registry(metadata=self.metadata)
        person: type[Person] = type("Person", (Person,), {})  # a class has one table
        if not self.shape.inherits:
            classes.map_imperatively(person, self.users)
            return person
        customer: type[Person] = type("Customer", (person,), {})
        kind = self.users.c.kind
        classes.map_imperatively(
            person, self.users, polymorphic_on=kind, polymorphic_identity="person"
        )
        classes.map_imperatively(customer, inherits=person, polymorphic_identity="customer")
        return customer

    def _define_teams(self) -> sa.Table:
        columns: list[sa.Column[Any]] = [
            self._make_key(self.shape.team_key),
            sa.Column("logto_id", sa.Text, unique=True),
            sa.Column("name", sa.Text),
        ]
        if self.shape.owner is not None:
            [key] = self.users.primary_key
            columns.append(sa.Column("owner", sa.ForeignKey(key, ondelete=self.shape.owner)))
        return sa.Table("teams", self.metadata, *columns)

    def _find_referred(self, table: sa.Table) -> sa.Column[Any]:
        """Find the column to which members refer."""
        [key] = table.primary_key
        column: sa.Column[Any] = table.c.get("logto_id", key)
        return column if self.shape.refers_to == "logto_id" and column.unique else key

    def _make_end(self, name: str, referred: sa.Column[Any], **options: Any) -> sa.Column[Any]:
        shape = self.shape
        if shape.refers_to == "nothing":
            return sa.Column(name, sa.Text, **options)
        key = sa.ForeignKey(
            referred,
            ondelete=shape.on_delete,
            onupdate=shape.on_update,
            deferrable=shape.is_deferred or None,
            initially="DEFERRED" if shape.is_deferred else None,
        )
        return sa.Column(name, key, **options)

    def _define_members(self) -> sa.Table:
        shape = self.shape
        options: dict[str, Any] = {"nullable": shape.allows_invitations}
        parts: list[Any] = [sa.Column("role", sa.Text), sa.Column("tag", sa.Text)]
        if shape.members_have_id:
            parts.append(self._make_key(shape.member_key))
            if shape.pairs_are_unique:
                parts.append(sa.UniqueConstraint("team", "person"))
        else:
            options = {"primary_key": True}
        ends = [
            self._make_end("team", self.team_ref, **options),
            self._make_end("person", self.user_ref, **options),
        ]
        return sa.Table("seats", self.metadata, *ends, *parts)

    def _define_role_rows(self) -> sa.Table | None:
        roles = self.shape.roles
        role = sa.Column("role", sa.Text, nullable=False)
        more: list[Any] = []
        if roles == "of users":
            role = sa.Column("role", sa.ForeignKey(self.roles.c.id), nullable=False)
        if roles in ("of users, by name", "of users"):
            owners = [self._make_end("person", self.user_ref)]
        elif roles == "of members" and self.shape.members_have_id:
            owners = [sa.Column("seat", sa.ForeignKey(self.members.c.id))]
        elif roles == "of ends":
            owners = [
                self._make_end("team", self.team_ref),
                self._make_end("person", self.user_ref),
            ]
        elif roles == "of pairs" and (
            self.shape.pairs_are_unique or not self.shape.members_have_id
        ):
            pair = [self.members.c.team, self.members.c.person]
            owners = [sa.Column(column.name, column.type) for column in pair]
            more.append(sa.ForeignKeyConstraint(owners, pair, onupdate=self.shape.on_update))
        else:
            return None
        more.append(sa.UniqueConstraint(*(column.name for column in (*owners, role))))
        return sa.Table("role_rows", self.metadata, _id(), *owners, role, *more)

    def _find_shift_ends(self) -> list[sa.Column[Any]]:
        """Find the columns of members to which shifts refer, perhaps several in one key."""
        own, shape = self.members.c, self.shape
        if not shape.members_have_id or (
            shape.shifts_refer_to == "ends" and shape.pairs_are_unique
        ):
            return [own.team, own.person]
        return [own.id]

    def _define_work(
        self, name: str, referred: Sequence[sa.Column[Any]], on_delete: OnDelete | None
    ) -> sa.Table | None:
        """Rows of the application's own that refer to those of users or members."""
        if on_delete is None:
            return None
        columns = [sa.Column(f"of_{column.name}", column.type) for column in referred]
        key = sa.ForeignKeyConstraint(
            columns, referred, ondelete=on_delete, onupdate=self.shape.on_update
        )
        tag = sa.Column("tag", sa.Text)
        return sa.Table(name, self.metadata, _id(), *columns, tag, key)

    def read_members(self, connection: sa.Connection) -> list[sa.RowMapping]:
        """Read the rows of members, with Logto's ids of their `organization` and `user`."""
        own = self.members.c
        ids = [own.team.label("organization"), own.person.label("user")]
        joined: Any = self.members
        if self.shape.refers_to != "nothing":
            ids = [self.teams.c.logto_id.label("organization"), self.user_id.label("user")]
            joined = joined.outerjoin(self.teams, own.team == self.team_ref)
            joined = joined.outerjoin(self.users, own.person == self.user_ref)
        query = sa.select(self.members, *ids).select_from(joined)
        return list(connection.execute(query).mappings())

    def declare_all(self, *, changed: bool = False) -> Mappings:
        """Declare the mappings; with `changed`, those of another release, which mean the same.
        Raises InvalidMapping."""
        shape, columns = self.shape, self.users.c
        own: dict[str, Any] = {"name": (lambda user: user.name) if changed else "name"}
        if shape.user_deleted != "inactive":
            own["active"] = lambda user: not user.is_suspended
        email = {"email": "email"}
        mappings = Mappings()
        parts: list[EntityMapping | PairMapping] = [
            declare_entities(
                "user",
                self.user_class,
                key=columns.meta["logto"]["id"] if shape.holds_id == "json" else "logto_id",
                columns=own if shape.fills_email else own | email,
                fill=email if shape.fills_email else None,
                link=self._link_users(),
                where=(lambda user: user.email != EXCLUDED) if shape.excludes else None,
                create=shape.creates,
                when_deleted=(
                    {"active": False} if shape.user_deleted == "inactive" else shape.user_deleted
                ),
            ),
            declare_entities(
                "organization",
                self.teams,
                key="logto_id",
                columns={"name": "name"},
                link="name" if shape.links_teams else None,
                when_deleted=shape.team_deleted,
            ),
            declare_members(
                self.members,
                organization="team",
                user="person",
                columns={"role": lambda member: ",".join(sorted(member.roles)) or None},
            ),
        ]
        if self.role_rows is not None:
            parts.append(self._declare_roles(self.role_rows))
        for mapping in parts:
            mappings.add(mapping)
        mappings.check_complete()
        return mappings

    def _link_users(self) -> Any:
        lower = sa.func.lower(self.users.c.email)
        if self.shape.link == "function":
            return lambda user: lower == (user.email and user.email.lower())
        return self.shape.link

    def _declare_roles(self, table: sa.Table) -> PairMapping:
        match self.shape.roles:
            case "of users, by name":
                return declare_user_roles(table, user="person", role="role", role_by="name")
            case "of users":
                return declare_user_roles(table, user="person", role="role")
            case "of members":
                return declare_member_roles(table, member="seat", role="role", role_by="name")
            case _:
                return declare_member_roles(
                    table, organization="team", user="person", role="role", role_by="name"
                )


def _id() -> sa.Column[Any]:
    return sa.Column("id", sa.Integer, primary_key=True)


def list_work_ends(table: sa.Table) -> list[sa.Column[Any]]:
    """List the columns of an application's own work that say whose it is."""
    return [column for column in table.c if column.foreign_keys]


def create_trigger(
    connection: sa.Connection, table: sa.Table, what: Literal["counts", "lowers"]
) -> None:
    """Create a trigger that changes the rows that are written."""
    event = "UPDATE" if what == "counts" else "INSERT OR UPDATE"
    if connection.dialect.name == "sqlite":  # whose triggers can't change the new row before
        change = "changes = changes + 1" if what == "counts" else "email = lower(email)"
        for each in event.split(" OR "):
            connection.exec_driver_sql(
                f"CREATE TRIGGER {each}_{what} AFTER {each} ON {table.name} BEGIN "
                f"UPDATE {table.name} SET {change} WHERE rowid = NEW.rowid; END"
            )
        return
    change = "changes := OLD.changes + 1" if what == "counts" else "email := lower(NEW.email)"
    function = f"{table.schema}.{what}"
    connection.exec_driver_sql(
        f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN NEW.{change}; RETURN NEW; END $$"
    )
    connection.exec_driver_sql(
        f"CREATE TRIGGER {what} BEFORE {event} ON {table.fullname} "
        f"FOR EACH ROW EXECUTE FUNCTION {function}()"
    )
