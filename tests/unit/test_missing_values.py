"""Comparisons with values that a record lacks find nobody; an IS NULL that is meant stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from threading import Event
from typing import Any

import pytest
import sqlalchemy as sa
from msgspec import Struct
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from logto_webhooks.mapping.functions import FunctionCaller, NotEvaluated
from logto_webhooks.mapping.missing_values import CannotTell, MissingValues

own = sa.table(
    "own",
    *[sa.column(name, sa.Text()) for name in ("id", "key", "email", "phone", "legacy")],
    sa.column("deleted", sa.DateTime()),
).c


class Base(DeclarativeBase):
    """Of all models."""


class Person(Base):
    """Somebody with several numbers."""

    __tablename__ = "people"

    id: Mapped[int] = mapped_column(primary_key=True)
    numbers: Mapped[list[Number]] = relationship()


class Number(Base):
    """One of them."""

    __tablename__ = "numbers"

    id: Mapped[int] = mapped_column(primary_key=True)
    person_id: Mapped[int] = mapped_column(sa.ForeignKey(Person.id))
    number: Mapped[str | None]


class User(Struct):
    """A row of the mirror that lacks nearly everything."""

    email: str | None = None
    phone: str | None = None
    custom_data: dict[str, Any] = {}
    identities: dict[str, Any] = {}


def call(function: Callable[[Any], Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, row in rows.items():
        try:
            results[name] = function(row)
        except Exception as error:
            results[name] = error
    return results


def describe(condition: Any) -> str:
    text = str(condition.compile(compile_kwargs={"literal_binds": True}))
    return text.replace("own.", "").replace("\n", "")


def by_email_or_else_phone(user: User) -> Any:
    if user.email:
        return sa.and_(own.deleted.is_(None), own.email == user.email)
    return sa.and_(own.phone == user.phone, own.deleted.is_(None))


def by_legacy_id_or_else_email(user: User) -> Any:
    if user.custom_data.get("legacy"):
        return own.legacy == user.custom_data["legacy"]
    return sa.and_(own.email == user.email, own.deleted.is_(None))


def by_number(user: User) -> Any:
    legacy = user.custom_data.get("legacy")
    number = None if legacy is None else int(legacy)
    return sa.and_(own.legacy == number, own.deleted.is_(None))


def by_identity(user: User) -> Any:
    google = user.identities.get("google") or {}
    return sa.or_(own.email == user.email, own.legacy == google.get("userId"))


def by_nested(user: User) -> Any:
    return own.legacy == user.custom_data.get("old", {}).get("id")


def with_more_if_known(user: User) -> Any:
    condition = own.phone == user.phone
    return sa.and_(condition, own.deleted.is_(None)) if user.phone else condition


def by_digits(user: User) -> Any:
    return own.phone == ("".join(filter(str.isdigit, user.phone or "")) or None)


def by_valid_email(user: User) -> Any:
    return own.email == (user.email.lower() if user.email and "@" in user.email else None)


def by_legacy_id_if_there(user: User) -> Any:
    has_one = "legacy" in user.custom_data
    return own.legacy == (user.custom_data["legacy"] if has_one else None)


def by_national_number(user: User) -> Any:
    is_german = user.phone and user.phone.startswith("49")
    return own.phone == (user.phone[2:] if user.phone and is_german else None)


def by_any_identity(user: User) -> Any:
    ids = [identity["userId"] for identity in user.identities.values()]
    return own.legacy == next(iter(ids), None)


@pytest.mark.parametrize(
    ("function", "user", "says"),
    [
        (lambda user: own.phone == user.phone, User(), "phone = NULL"),
        (lambda user: own.phone != user.phone, User(), "phone = NULL"),
        (
            lambda user: sa.or_(own.email == user.email, own.phone == user.phone),
            User(email="a"),
            "email = 'a' OR phone = NULL",
        ),
        (
            lambda user: sa.and_(own.email == user.email, own.deleted.is_(None)),
            User(email="a"),
            "email = 'a' AND deleted IS NULL",
        ),
        (
            lambda user: sa.exists().where(own.email == user.email, own.deleted.is_(None)),
            User(),
            "EXISTS (SELECT * FROM own WHERE email = NULL AND deleted IS NULL)",
        ),
        (by_email_or_else_phone, User(), "phone = NULL AND deleted IS NULL"),
        (by_email_or_else_phone, User(email="a"), "deleted IS NULL AND email = 'a'"),
        (by_email_or_else_phone, User(phone="1"), "phone = '1' AND deleted IS NULL"),
        (by_legacy_id_or_else_email, User(email="a"), "email = 'a' AND deleted IS NULL"),
        (by_number, User(), "legacy = NULL AND deleted IS NULL"),
        (by_identity, User(email="a"), "email = 'a' OR legacy = NULL"),
        (by_nested, User(), "legacy = NULL"),
        (by_nested, User(custom_data={"old": {"id": None}}), "legacy = NULL"),
        (with_more_if_known, User(), "phone = NULL"),
        (by_digits, User(), "phone = NULL"),
        (by_valid_email, User(), "email = NULL"),
        (by_legacy_id_if_there, User(), "legacy = NULL"),
        (
            lambda user: Person.numbers.any(Number.number == user.phone),
            User(),
            "EXISTS (SELECT 1 FROM numbers, people WHERE people.id = numbers.person_id AND "
            "numbers.number = NULL)",
        ),
        (
            lambda user: sa.literal(user.phone, sa.Text()).is_not_distinct_from(own.phone),
            User(),
            "phone = NULL",
        ),
        (
            lambda user: sa.and_(own.email == user.email, own.key.is_(None)),
            User(email="a"),
            "email = 'a' AND key IS NULL",
        ),
        (
            lambda user: sa.and_(own.email == user.email, own.phone.is_not(None)),
            User(email="a"),
            "email = 'a' AND phone IS NOT NULL",
        ),
    ],
)
def test_a_missing_value_is_never_equal(
    function: Callable[[User], Any], user: User, says: str
) -> None:
    """Whatever branches the function has, and what it converts."""
    condition = MissingValues(function, call, "own.key").ignore("ana", user, function(user))
    assert describe(condition) == says


def test_what_cannot_be_told_is_said() -> None:
    def by_weekday(user: User) -> Any:
        weekdays = {"Monday": "1"}
        phone = user.phone and weekdays[user.phone]
        return own.phone == phone

    said = MissingValues(by_weekday, call, "own.key").ignore("ana", User(), by_weekday(User()))
    assert isinstance(said, CannotTell)
    assert "fails if phone has a value" in str(said)


@pytest.mark.parametrize(
    ("function", "user"),
    [
        (by_national_number, User()),
        (by_national_number, User(phone="1")),
        (by_any_identity, User()),
        (lambda user: own.legacy == dict(user.custom_data).get("legacy"), User()),
        (lambda user: sa.and_(own.email == user.email, own.phone.is_(None)), User(email="a")),
        (lambda user: sa.not_(sa.or_(own.phone.is_not(None), own.id == 1)), User()),
        (lambda user: sa.case((own.phone.is_not(None), False), else_=True), User()),
    ],
)
def test_an_is_null_by_which_somebody_is_known_finds_nobody(
    function: Callable[[User], Any], user: User
) -> None:
    """Unless an example shows that it is a comparison with a missing value."""
    said = MissingValues(function, call, "own.key").ignore("ana", user, function(user))
    assert isinstance(said, CannotTell)
    assert "it can't be told whether that is a comparison with a value that the " in str(said)


def test_a_call_that_does_not_return_holds_up_no_other_record() -> None:
    may_return = Event()
    stuck: list[User] = []

    def by_phone(user: User) -> Any:
        if user.phone and not stuck:
            stuck.append(user)
            may_return.wait(60)
        return own.phone == user.phone

    def ignore(logto_id: str) -> Any:
        values = MissingValues(by_phone, partial(FunctionCaller(0.5).call, "users"), "")
        return values.ignore(logto_id, User(), by_phone(User()))

    assert isinstance(ignore("ana"), NotEvaluated)
    assert describe(ignore("bo")) == "phone = NULL"
    may_return.set()
