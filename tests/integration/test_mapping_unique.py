"""What is unique only for some rows, or by an expression, is decided by the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.mapping.apply import retry_unsettled
from logto_webhooks.mapping.check import find_differences
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.own_tables import OwnTables
from logto_webhooks.testing import make
from tests.support.mapped_application import KINDS, Application, counts_of
from tests.support.stores import Copy, StoreKind

IS_LIVE = sa.text("active")


class SoftDeleting(Application):
    """Only rows that are active have an email of their own; names differ by an expression."""

    def __init__(self, kind: StoreKind, folder: Path, *unique: sa.Index | sa.Column[str]) -> None:
        super().__init__(kind, folder)
        metadata = sa.MetaData(schema=self.metadata.schema)
        self.users = sa.Table(
            "people",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("logto_user_id", sa.Text, unique=True),
            sa.Column("email", sa.Text),
            sa.Column("first_name", sa.Text),
            sa.Column("plan", sa.Text, nullable=False),
            sa.Column("active", sa.Boolean, nullable=False),
            *unique,
        )
        self.members = sa.Table(
            "people_of_teams",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("team_id", sa.Text, nullable=False),
            sa.Column("user_id", sa.ForeignKey(self.users.c.id), nullable=False),
            sa.Column("role", sa.Text, nullable=False),
        )
        with self.engine.begin() as connection:
            metadata.create_all(connection)

    def reflect(self) -> None:
        """Take the tables as the database describes them."""
        metadata = sa.MetaData(schema=self.users.schema)
        self.members = sa.Table(self.members.name, metadata, autoload_with=self.engine)
        self.users = sa.Table(self.users.name, metadata, autoload_with=self.engine)

    def insert(self, email: str, *, active: bool) -> None:
        """Insert a row of the application's own."""
        with self.engine.begin() as connection:
            values = {"email": email, "plan": "paid", "active": active}
            connection.execute(sa.insert(self.users).values(values))


def partial() -> sa.Index:
    return sa.Index(
        "live_emails", "email", unique=True, sqlite_where=IS_LIVE, postgresql_where=IS_LIVE
    )


def by_expression() -> sa.Index:
    email_of_live = sa.text("(CASE WHEN active THEN email END)")
    return sa.Index("live_emails", email_of_live, unique=True)


def user(name: str, email: str, at: int) -> bytes:
    return make.user_data_updated(id=name, email=email, at=at).body


@pytest.mark.parametrize(
    ("index", "is_reflected"), [(partial, False), (partial, True), (by_expression, False)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_only_rows_of_the_index_are_in_the_way(
    kind: StoreKind, index: Callable[[], sa.Index], is_reflected: bool, tmp_path: Path
) -> None:
    """An inactive row isn't, an active one is, until it is no longer active."""

    async def live() -> None:
        application = SoftDeleting(kind, tmp_path, index())
        if is_reflected:
            application.reflect()
        application.insert("ana@x.example", active=False)
        application.insert("bo@x.example", active=True)
        host = await application.map()
        copy = Copy(host)
        await copy.take([user("ana", "ana@x.example", 1_000), user("bo", "bo@x.example", 1_000)])
        own = application.users
        assert (await counts_of(host, own)).conflict == 1
        assert ("ana", "ana@x.example") in application.rows(own, "logto_user_id", "email")
        with application.engine.begin() as connection:
            connection.execute(sa.update(own).where(own.c.plan == "paid").values(active=False))
        await retry_unsettled(host, application.mappings)
        assert (await counts_of(host, own)).conflict == 0
        if index is partial:  # our own rows give their values up
            swapped = [user("ana", "bo@x.example", 2_000), user("bo", "ana@x.example", 2_000)]
            for body in swapped:
                await copy.take([body])
            await retry_unsettled(host, application.mappings)
            assert (await counts_of(host, own)).conflict == 0
            assert ("ana", "bo@x.example") in application.rows(own, "logto_user_id", "email")
        await application.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_value_of_an_expression_decides(kind: StoreKind, tmp_path: Path) -> None:
    """Two rows have the same email, but the expression is null in both."""

    async def live() -> None:
        application = SoftDeleting(kind, tmp_path)
        own = application.users
        index = sa.Index("no_anas", sa.func.nullif(own.c.email, "ana@x.example"), unique=True)
        index.create(application.engine)
        application.insert("ana@x.example", active=True)
        host = await application.map()
        await Copy(host).take([user("ana", "ana@x.example", 1_000)])
        assert (await counts_of(host, own)).conflict == 0
        assert len(application.rows(own, "id")) == 2
        await application.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", KINDS)
def test_a_unique_value_that_is_filled_in_can_be_anothers(kind: StoreKind, tmp_path: Path) -> None:
    """As one that is kept equal: the row that has it is named, also before anything is written."""

    async def live() -> None:
        application = Application(kind, tmp_path)
        own = application.users
        with application.engine.begin() as connection:
            values = {"id": 61, "email": "ana@x.example", "plan": "paid", "active": True}
            connection.execute(sa.insert(own).values(values))
        columns = {own.c.active: lambda row: not row.is_suspended}
        host = await application.map(columns=columns, fill={own.c.email: "email"})
        for name in ("ana", "bo"):
            await Copy(host).take([user(name, f"{name}@x.example", 1_000)])
        pages = find_differences(host, application.mappings)
        [refused] = [difference async for page in pages for difference in page]
        assert (refused.logto_id, refused.blocked_by) == ("ana", "[61]")
        assert refused.reason == "another row has the value of email"
        await application.close()

    asyncio.run(live())


def of_lower() -> sa.Index:
    return sa.Index("live_emails", sa.text("lower(email)"), unique=True)


def generated() -> sa.Column[str]:
    return sa.Column("login", sa.Text, sa.Computed("lower(email)", persisted=True), unique=True)


@pytest.mark.parametrize("unique", [partial, of_lower, generated])
@pytest.mark.parametrize("kind", KINDS)
def test_unique_values_go_round_beside_one_that_differs_in_case(
    kind: StoreKind, unique: Callable[[], sa.Index | sa.Column[str]], tmp_path: Path
) -> None:
    """It isn't in the way of an index of the column. If the lower case is unique, there is none."""

    async def live() -> None:
        application = SoftDeleting(kind, tmp_path, unique())
        own = application.users
        if unique is partial:
            application.insert("ANA@x.example", active=True)
        copy = Copy(await application.map())
        await go_round(copy)
        assert rows_of_three(application) == ["bo@x.example", "cy@x.example", "ana@x.example"]
        assert (await counts_of(application.host, own)).conflict == 0
        await application.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_can_not_be_deleted_keeps_its_value(kind: StoreKind, tmp_path: Path) -> None:
    """A row of the application's refers to it, and the database would say so only at the commit,
    which would take the delivery along."""

    async def live() -> None:
        application = Application(kind, tmp_path, deferred=True)
        if kind == "sqlite":
            application.enforce_foreign_keys()
        own = application.users
        copy = Copy(await application.map())
        acme = make.event("Organization.Created", id="acme", name="Acme", at=1_000).body
        await copy.take([acme, *(user(name, f"{name}@x.example", 1_000) for name in ("ana", "bo"))])
        ids = dict(application.rows(own, "logto_user_id", "id"))
        [(team,)] = application.rows(application.teams, "id")
        with application.engine.begin() as connection:
            row = {"team_id": team, "user_id": ids["bo"], "role": "guest"}
            connection.execute(sa.insert(application.members).values(row))
        await copy.take([make.user_deleted(id="bo", at=2_000).body])
        await copy.take([user("ana", "bo@x.example", 3_000)])
        assert (await counts_of(application.host, own)).conflict == 2
        assert dict(application.rows(own, "logto_user_id", "id")) == ids
        application.delete_all(application.members)
        await retry_unsettled(application.host, application.mappings)
        assert application.rows(own, "logto_user_id", "email") == [("ana", "bo@x.example")]
        await application.close()

    asyncio.run(live())


async def go_round(copy: Copy) -> None:
    """Three users take each other's emails, and the webhooks between were lost."""
    names = ["ana", "bo", "cy"]
    await copy.take([user(name, f"{name}@x.example", 1_000) for name in names])
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        await copy.take([user(name, f"{other}@x.example", 2_000)])


def rows_of_three(application: Application) -> list[str]:
    """Return the emails of the three."""
    rows = application.rows(application.users, "logto_user_id", "email")
    return [email for name, email in rows if name is not None]


def test_sqlite_names_the_column_that_another_records_row_has(tmp_path: Path) -> None:
    """Both rows are of known records, so either may change."""

    async def live() -> None:
        application = Application("sqlite", tmp_path)
        host = await application.map()
        for name in ("ana", "bo"):
            await Copy(host).take([user(name, "both@x.example", 1_000)])
        pages = find_differences(host, application.mappings)
        [refused] = [difference async for page in pages for difference in page]
        assert refused.reason == "SQLITE_CONSTRAINT_UNIQUE: users.email"
        await application.close()

    asyncio.run(live())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_whose_ids_the_application_swapped_get_their_values(
    kind: StoreKind, tmp_path: Path
) -> None:
    """Whose row it is now counts, not whose it was."""

    async def live(application: Application) -> None:
        own = application.users
        copy = Copy(await application.map())
        await copy.take([user("u1", "a@x", 1_000), user("u2", "b@x", 1_000)])
        with application.engine.begin() as connection:
            for old, new in (("u1", "swap"), ("u2", "u1"), ("swap", "u2")):
                change = sa.update(own).where(own.c.logto_user_id == old)
                connection.execute(change.values(logto_user_id=new))
        await application.apply_again()
        rows = application.rows(own, "logto_user_id", "email")
        assert rows == [("u1", "a@x"), ("u2", "b@x")]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_of_an_expression_is_reflected_for_a_file(kind: StoreKind, tmp_path: Path) -> None:
    """SQLAlchemy doesn't reflect it from SQLite."""

    async def live() -> None:
        application = SoftDeleting(kind, tmp_path, of_lower())
        with application.engine.connect() as connection:
            users = OwnTables(connection).find(application.users.fullname)
            mapping = declare_entities(
                "user",
                users,
                key="logto_user_id",
                columns={"email": "email"},
                create=False,
                when_deleted="keep",
            )
            [unique] = mapping.list_unique(connection.dialect.name)
        assert (unique.column.name, unique.by_expression) == ("email", True)
        await application.close()

    asyncio.run(live())
