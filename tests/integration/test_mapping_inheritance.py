"""Several classes of an application can share one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping.declare import declare_entities, find_table, match_class
from logto_webhooks.mapping.declare_pairs import declare_members
from logto_webhooks.testing import make
from tests.integration.test_mapping_deletions import founded
from tests.support.mapped_application import KINDS, Application
from tests.support.stores import Copy, StoreKind


def make_classes(metadata: sa.MetaData) -> tuple[Any, Any]:
    """Return a class, and one whose rows are in the same table, as are those of a third one."""

    class Base(DeclarativeBase):
        pass

    Base.metadata = metadata

    class Contact(Base):
        __tablename__ = "contacts"
        __mapper_args__: Any = {"polymorphic_on": "kind", "polymorphic_identity": "contact"}

        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str | None]
        logto_id: Mapped[str | None] = mapped_column(unique=True)
        email: Mapped[str | None]

    class Account(Contact):
        __mapper_args__: Any = {"polymorphic_identity": "account"}

    class Admin(Account):
        __mapper_args__: Any = {"polymorphic_identity": "admin"}

    assert issubclass(Admin, Account)
    return Contact, Account


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_belongs_to_the_class_that_is_mapped(kind: StoreKind, tmp_path: Path) -> None:
    """New ones, and existing ones that are linked: those of other classes aren't."""

    async def live(application: Application) -> None:
        contact, account = make_classes(application.metadata)
        contact.__table__.create(application.engine)
        with application.engine.begin() as connection:
            rows = [{"kind": own, "email": f"{own}@x"} for own in ("contact", "account", "admin")]
            connection.execute(sa.insert(contact.__table__), rows)
        options: dict[str, Any] = {"columns": {"email": "email"}, "when_deleted": "keep"}
        await application.map_tables(
            declare_entities("user", account, key="logto_id", link="email", **options)
        )
        await application.apply_all()
        names = ("contact", "account", "admin", "new")
        bodies = [make.user_created(id=n, email=f"{n}@x", at=1_000).body for n in names]
        await Copy(application.host).take(bodies)
        by_class = application.rows(contact.__table__, "kind", "logto_id")
        linked = [("account", own) for own in ("account", "contact", "new")]
        assert by_class == [*linked, ("admin", "admin"), ("contact", None)]

    Application.run(kind, tmp_path, live)


def test_the_class_of_a_row_is_known_in_its_table() -> None:
    """Also that of an abstract class, but not of one whose discriminator is in another table."""

    class Base(DeclarativeBase):
        pass

    class Person(Base):
        __tablename__ = "people"
        __mapper_args__: Any = {"polymorphic_on": "kind", "polymorphic_identity": "person"}

        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        logto_id: Mapped[str | None] = mapped_column(unique=True)

    class Login(Person):
        __mapper_args__: Any = {"polymorphic_abstract": True}

    class Account(Login):
        __mapper_args__: Any = {"polymorphic_identity": "account"}

    class Employee(Person):
        __tablename__ = "employees"
        __mapper_args__: Any = {"polymorphic_identity": "employee"}

        id: Mapped[int] = mapped_column(sa.ForeignKey(Person.id), primary_key=True)
        badge: Mapped[str | None] = mapped_column(unique=True)

    class Manager(Employee):
        __mapper_args__: Any = {"polymorphic_identity": "manager"}

    assert issubclass(Account, Login)
    [of_login] = match_class(Login)
    assert of_login.compile().params == {"kind_1": ["account"]}
    assert match_class(Employee) == []
    with pytest.raises(InvalidMapping, match="Manager shares the table with Employee"):
        find_table(Manager)


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_can_be_told_by_an_expression(kind: StoreKind, tmp_path: Path) -> None:
    """New rows get it by what `create_defaults` sets. A lead isn't linked."""

    async def live(application: Application) -> None:
        class Base(DeclarativeBase):
            metadata = application.metadata

        class Contact(Base):
            __tablename__ = "contacts"

            id: Mapped[int] = mapped_column(primary_key=True)
            is_lead: Mapped[bool]
            logto_id: Mapped[str | None] = mapped_column(unique=True)
            email: Mapped[str | None]
            __mapper_args__: Any = {
                "polymorphic_on": sa.case((sa.literal_column("is_lead"), "lead"), else_="account"),
                "polymorphic_identity": "contact",
            }

        class Account(Contact):
            __mapper_args__: Any = {"polymorphic_identity": "account"}

        own: Any = Contact.__table__
        own.create(application.engine)
        with application.engine.begin() as connection:
            connection.execute(sa.insert(own).values(is_lead=True, email="ana@x"))
        mapping = declare_entities(
            "user",
            Account,
            key="logto_id",
            link="email",
            columns={"email": "email"},
            create_defaults={"is_lead": False},
            when_deleted="delete",
        )
        copy = Copy(await application.map_tables(mapping))
        await application.apply_all()
        await copy.take([make.user_created(id="ana", email="ana@x", at=1_000).body])
        assert application.rows(own, "is_lead", "logto_id") == [(False, "ana"), (True, None)]
        await copy.take([make.user_deleted(id="ana", at=2_000).body])
        assert application.rows(own, "is_lead", "logto_id") == [(True, None)]

    Application.run(kind, tmp_path, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_membership_of_another_class_is_the_applications_own(
    kind: StoreKind, tmp_path: Path
) -> None:
    """A guest of a team is no member of it, and stays when the user leaves."""

    async def live(application: Application) -> None:
        class Base(DeclarativeBase):
            metadata = application.metadata

        class Seat(Base):
            __tablename__ = "seats"
            __mapper_args__: Any = {"polymorphic_on": "kind", "polymorphic_identity": "seat"}

            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            team: Mapped[str]
            person: Mapped[str]

        class Member(Seat):
            __mapper_args__: Any = {"polymorphic_identity": "member"}

        class Guest(Seat):
            __mapper_args__: Any = {"polymorphic_identity": "guest"}

        own: Any = Seat.__table__
        own.create(application.engine)
        guest = {"kind": "guest", "team": "acme", "person": "ana"}
        with application.engine.begin() as connection:
            connection.execute(sa.insert(own).values(guest))
        assert issubclass(Guest, Seat)
        mapping = declare_members(Member, organization="team", user="person")
        copy = Copy(await application.map_tables(mapping))
        await application.apply_all()
        joined = make.organization_membership_updated(id="acme", addedUserIds=["ana"], at=3_000)
        left = make.organization_membership_updated(
            id="acme", addedUserIds=[], removedUserIds=["ana"], at=9_000
        )
        await copy.take([founded("acme"), make.user_created(id="ana", at=1_000).body, joined.body])
        assert application.rows(own, "kind") == [("guest",), ("member",)]
        await copy.take([left.body])
        assert application.rows(own, "kind") == [("guest",)]

    Application.run(kind, tmp_path, live)
