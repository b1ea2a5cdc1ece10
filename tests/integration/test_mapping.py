"""The application's own tables follow the mirror, in the same transaction."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from logto_webhooks.database.runner import HandlerRunner
from logto_webhooks.database.schema import mapped_rows, members, organizations, users
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.apply import apply_all, apply_step, retry_unsettled
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import declare_members
from logto_webhooks.mapping.tally import AppliedMapping
from logto_webhooks.samples import history
from logto_webhooks.samples.history import Name
from logto_webhooks.testing import make
from tests.support import postgres, recorded
from tests.support.stores import Copy, StoreKind, open_host

ORDERS = int(os.environ.get("LOGTO_WEBHOOKS_TEST_MAPPED_ORDERS", "0"))
KINDS: tuple[StoreKind, ...] = ("sqlite", "asyncpg", "postgres-thread")


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
        """Map the three tables; `changes` are those to the mapping of users."""
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
        self.mappings = mappings
        self.host.project = mappings.write
        await self.host.run(lambda store: store.mappings.register(mappings.registered))
        return self.host

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


async def live_in_some_order(kind: StoreKind, folder: Path, bodies: list[bytes], seed: int) -> None:
    """Any order, in pieces, every tenth twice; with an odd seed, foreign keys are deferred."""
    rng = random.Random(seed)
    sent = bodies + rng.sample(bodies, len(bodies) // 10)
    rng.shuffle(sent)
    application = Application(kind, folder, deferred=seed % 2 == 1)
    copy = Copy(await application.map())
    while sent:
        size = rng.randrange(1, 40)
        await copy.take(sent[:size])
        sent = sent[size:]
    await application.check()
    await application.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", history.NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_own_tables_equal_the_mirror_in_every_order(
    kind: StoreKind, name: Name, tmp_path: Path
) -> None:
    """Recorded histories. `make mapped` runs 200 orders of each."""
    bodies = [each.body for each in history.load(name).deliveries]
    for seed in range(ORDERS or 2):
        asyncio.run(live_in_some_order(kind, tmp_path, bodies, seed))


@pytest.mark.parametrize("kind", KINDS)
def test_own_rows_equal_the_mirror_after_parallel_changes(kind: StoreKind, tmp_path: Path) -> None:
    """Recorded sequences: one user is changed eight times at once."""
    for file in sorted((recorded.FOLDER / "sequences").glob("*.json")):
        sequence = msgspec.json.decode(file.read_bytes(), type=recorded.Sequence)
        bodies = [each.body.encode() for each in sequence.deliveries]
        for seed in range(ORDERS or 1):
            asyncio.run(live_in_some_order(kind, tmp_path, bodies, seed))


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_emails_are_right_in_the_end(kind: StoreKind, tmp_path: Path) -> None:
    """Three users whose emails go round, one delivery at a time, in every order."""
    import itertools

    before = [make.user_created(id=f"u{n}", email=f"e{n}@x", at=1_000).body for n in range(3)]
    after = [
        make.user_data_updated(id=f"u{n}", email=f"e{(n + 1) % 3}@x", at=2_000).body
        for n in range(3)
    ]

    async def live(order: tuple[bytes, ...]) -> None:
        application = Application(kind, tmp_path)
        copy = Copy(await application.map())
        await copy.take(before)
        for body in order:
            await copy.take([body])
        await application.check()
        await application.close()

    for order in itertools.permutations(after):
        asyncio.run(live(order))


@pytest.mark.parametrize("kind", KINDS)
def test_existing_rows_are_linked_or_reported(kind: StoreKind, tmp_path: Path) -> None:
    """By their email, whatever its case. Never a row that has a key, nor one of several."""

    async def live() -> None:
        application = Application(kind, tmp_path)
        own = application.users
        copy = Copy(application.host)
        sent = [make.user_created(id=f"u{n}", email=f"e{n}@x.example", at=1_000) for n in range(6)]
        await copy.take([each.body for each in sent])
        with application.engine.begin() as connection:
            plan = {"plan": "paid", "active": True}
            connection.execute(
                sa.insert(own),
                [
                    {"email": " E0@X.example ", "logto_user_id": None, **plan},
                    {"email": "e1@x.example", "logto_user_id": "somebody", **plan},
                    {"email": "E2@x.example", "logto_user_id": None, **plan},
                    {"email": "e2@x.example", "logto_user_id": None, **plan},
                ],
            )
        host = await application.map(link=own.c.email)
        await application.apply_all()
        [counts] = [
            c
            for c in await host.read(lambda store: store.mappings.counts())
            if c.mapping == own.fullname
        ]
        assert (counts.ok, counts.conflict) == (4, 2)  # u1's email is somebody's; u2 is ambiguous
        rows = application.rows(own, "logto_user_id", "email", "plan")
        assert rows == sorted(
            [
                ("u0", "e0@x.example", "paid"),
                ("somebody", "e1@x.example", "paid"),
                (None, "E2@x.example", "paid"),
                (None, "e2@x.example", "paid"),
                *((f"u{n}", f"e{n}@x.example", "free") for n in (3, 4, 5)),
            ],
            key=repr,
        )
        with application.engine.begin() as connection:
            connection.execute(
                sa.delete(own).where(own.c.email.in_(["E2@x.example", "e1@x.example"]))
            )
        assert await retry_unsettled(host, application.mappings, ["conflict"]) == 2
        await application.check()
        await application.close()

    asyncio.run(live())
