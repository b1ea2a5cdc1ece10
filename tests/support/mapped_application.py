"""An application whose tables of users, teams and members are mapped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import sqlalchemy as sa

from logto_webhooks.apply import batch
from logto_webhooks.database.mapped_rows import MappingCounts
from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.schema import mapped_rows, members, organizations, users
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.apply import apply_all, apply_step
from logto_webhooks.mapping.declare import EntityMapping, declare_entities
from logto_webhooks.mapping.declare_pairs import PairMapping, declare_members
from logto_webhooks.mapping.tally import AppliedMapping
from logto_webhooks.records.record import Change
from tests.support import postgres
from tests.support.stores import StoreKind, open_host

KINDS: tuple[StoreKind, ...] = ("sqlite", "asyncpg", "postgres-thread")
PLAN: Final[dict[str, Any]] = {"plan": "paid", "active": True}  # what a row of users needs


class Application:
    """An application's tables: users with unique emails, teams, and members with foreign keys."""

    def __init__(self, kind: StoreKind, folder: Path, *, deferred: bool = False) -> None:
        """With `deferred`, foreign keys are checked at the end of a transaction."""
        self.host = open_host(kind, folder)
        key: dict[str, Any] = {"deferrable": True, "initially": "DEFERRED"} if deferred else {}
        if kind == "sqlite":
            self.engine = sa.create_engine(f"sqlite:///{folder / 'copy.db'}")
        else:
            url = postgres.server_url().set(drivername="postgresql+psycopg")
            self.engine = sa.create_engine(url)
        self.metadata = sa.MetaData(schema=None if kind == "sqlite" else "app")
        self.users = sa.Table(
            "users",
            self.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("logto_user_id", sa.Text, unique=True),
            sa.Column("email", sa.Text, unique=True),
            sa.Column("first_name", sa.Text),
            sa.Column("plan", sa.Text, nullable=False),
            sa.Column("active", sa.Boolean, nullable=False),
        )
        self.teams = sa.Table(
            "teams",
            self.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("logto_id", sa.Text, unique=True),
            sa.Column("name", sa.Text, nullable=False),
        )
        self.members = sa.Table(
            "team_members",
            self.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("team_id", sa.ForeignKey(self.teams.c.id, **key), nullable=False),
            sa.Column("user_id", sa.ForeignKey(self.users.c.id, **key), nullable=False),
            sa.Column("role", sa.Text, nullable=False),
            sa.UniqueConstraint("team_id", "user_id"),
        )
        with self.engine.begin() as connection:
            if kind != "sqlite":
                connection.execute(sa.text("DROP SCHEMA IF EXISTS app CASCADE"))
                connection.execute(sa.text("CREATE SCHEMA app"))
            self.metadata.create_all(connection)

    async def map(self, **changes: Any) -> HandlerRunner:
        """Map the three tables, and register that; `changes` are those to the mapping of users."""
        return await self.map_tables(*self.declare(**changes).all)

    async def map_tables(self, *mappings: EntityMapping | PairMapping) -> HandlerRunner:
        """Map tables, and register that."""
        self.mappings = Mappings()
        for mapping in mappings:
            self.mappings.add(mapping)
        self.host.project = self.mappings.write
        await self.host.run(lambda store: store.mappings.register(self.mappings.registered))
        return self.host

    def declare(self, **changes: Any) -> Mappings:
        """Declare the mappings of the three tables."""
        mappings = Mappings()
        own = self.users.c
        users: dict[str, Any] = {
            "key": own.logto_user_id,
            "columns": {
                own.email: "email",
                own.first_name: "profile.givenName",
                own.active: lambda user: not user.is_suspended,
            },
            "create_defaults": {own.plan: "free"},
            "when_deleted": "delete",
        }
        mappings.add(declare_entities("user", self.users, **users | changes))
        mappings.add(
            declare_entities(
                "organization",
                self.teams,
                key="logto_id",
                columns={"name": "name"},
                when_deleted="delete",
            )
        )
        mappings.add(
            declare_members(
                self.members,
                organization="team_id",
                user="user_id",
                columns={"role": lambda m: "admin" if "admin" in m.roles else "member"},
            )
        )
        return mappings

    @property
    def host_engine(self) -> sa.Engine:
        """The engine of the service itself, on SQLite."""
        engine: sa.Engine = vars(self.host)["_engine"]
        return engine

    def enforce_foreign_keys(self) -> None:
        """Let SQLite enforce foreign keys, as many applications do."""
        for engine in (self.host_engine, self.engine):
            sa.event.listen(engine, "connect", _enforce_keys)
            engine.dispose()

    async def apply_all(self) -> None:
        """Apply the mappings to all records."""
        while await apply_step(self.host, self.mappings) is not None:
            pass

    async def apply_again(self) -> list[AppliedMapping]:
        """Apply the mappings to all records, as the command does."""
        return await apply_all(self.host, self.mappings)

    def rows(self, table: sa.Table, *names: str) -> list[tuple[Any, ...]]:
        """The rows of a table, in order."""
        columns = [table.c[name] for name in names]
        with self.engine.connect() as connection:
            return sorted(map(tuple, connection.execute(sa.select(*columns))), key=repr)

    def delete_all(self, table: sa.Table) -> None:
        """Delete a table's rows, as the application does."""
        with self.engine.begin() as connection:
            connection.execute(sa.delete(table))

    async def check(self) -> None:
        """Compare all of the application's rows with the mirror; nothing waits or conflicts."""
        mirror = await self.host.read(lambda store: _read_mirror(store._connection))
        assert mirror["states"] == []
        own = self.rows(self.users, "logto_user_id", "email", "first_name", "active")
        assert own == mirror["users"]
        assert self.rows(self.teams, "logto_id", "name") == mirror["teams"]
        pairs = sa.select(self.teams.c.logto_id, self.users.c.logto_user_id)
        pairs = pairs.select_from(self.members.join(self.teams).join(self.users))
        with self.engine.connect() as connection:
            assert sorted(map(tuple, connection.execute(pairs))) == mirror["members"]

    async def close(self) -> None:
        await self.host.close()
        self.engine.dispose()

    @classmethod
    def run(cls, kind: StoreKind, folder: Path, live: Callable[[Self], Awaitable[None]]) -> None:
        """Run `live` with an application, which is closed in the end."""

        async def run() -> None:
            application = cls(kind, folder)
            try:
                await live(application)
            finally:
                await application.close()

        asyncio.run(run())


def _enforce_keys(connection: Any, record: object) -> None:
    connection.execute("PRAGMA foreign_keys=ON")


def _read_mirror(connection: sa.Connection) -> dict[str, Any]:
    living = sa.select(users).where(users.c.deleted_at.is_(None))
    teams = sa.select(organizations.c.logto_organization_id, organizations.c.name)
    teams = teams.where(organizations.c.deleted_at.is_(None))
    here = [
        set(connection.scalars(sa.select(table.c[key]).where(table.c.deleted_at.is_(None))))
        for table, key in ((organizations, "logto_organization_id"), (users, "logto_user_id"))
    ]
    pairs = connection.execute(sa.select(members.c.logto_organization_id, members.c.logto_user_id))
    waiting = sa.select(mapped_rows).where(~mapped_rows.c.state.in_(["ok", "former", "waiting"]))
    return {
        "users": sorted(
            (
                (row.logto_user_id, row.email, row.profile.get("givenName"), not row.is_suspended)
                for row in connection.execute(living)
            ),
            key=repr,
        ),
        "teams": sorted(map(tuple, connection.execute(teams)), key=repr),
        "members": sorted(tuple(p) for p in pairs if p[0] in here[0] and p[1] in here[1]),
        "states": [dict(row) for row in connection.execute(waiting).mappings()],
    }


async def counts_of(host: HandlerRunner, table: sa.Table) -> MappingCounts:
    """Count the records of a table's mapping by state."""
    counts = await host.read(lambda store: store.mappings.counts())
    return next(each for each in counts if each.mapping == table.fullname)


async def learn(host: HandlerRunner, changes: list[Change]) -> None:
    """Apply what Logto's API answers."""
    await host.run(partial(batch.apply_reads, changes=changes, source="reconcile"))
