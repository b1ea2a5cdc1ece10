"""A changed mapping has another definition, and an unchanged one has the same in every process."""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from logto_webhooks.errors import InvalidMapping
from logto_webhooks.mapping.declare import declare_entities
from logto_webhooks.mapping.declare_pairs import declare_members


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    logto_id: Mapped[str | None] = mapped_column(unique=True)
    data: Mapped[Any | None] = mapped_column(sa.JSON)
    a: Mapped[str | None]


class Member(Base):
    __tablename__ = "members"

    team: Mapped[str] = mapped_column(primary_key=True)
    user: Mapped[str] = mapped_column(primary_key=True)
    a: Mapped[str | None]


class Getter:
    """A callable object of the application's."""

    __slots__ = ("field",)

    def __init__(self, field: Any) -> None:
        self.field = field

    def __call__(self, row: Any) -> Any:
        return getattr(row, self.field)

    def read(self, row: Any) -> Any:
        return getattr(row, self.field)


def closure(value: Any) -> Any:
    return lambda row: getattr(row, value)


def nested(value: Any) -> Any:
    read = closure(value)
    return lambda row: read(row)


def default(value: Any) -> Any:
    return lambda row, field=value: getattr(row, field)


def keyword_default(value: Any) -> Any:
    return lambda row, *, field=value: getattr(row, field)


def cached(value: Any) -> Any:
    @functools.lru_cache
    def read(row: Any) -> Any:
        return getattr(row, value)

    return read


WAYS: list[Callable[[Any], Any]] = [
    closure,
    nested,
    default,
    keyword_default,
    cached,
    Getter,
    lambda value: Getter(value).read,
    operator.attrgetter,
    lambda value: functools.partial(lambda row, field: getattr(row, field), field=value),
    lambda value: closure({"of": [value, {value}, timedelta(len(value))]}),
    lambda value: closure(Getter(Getter(value))),
]


def define(read: Any, **changes: Any) -> str:
    options: dict[str, Any] = {"key": User.logto_id, "when_deleted": "keep"}
    return declare_entities(
        "user", User, **options | {"columns": {User.a: read}} | changes
    ).definition


def define_member(read: Any) -> str:
    return declare_members(
        Member, organization=Member.team, user=Member.user, columns={Member.a: read}
    ).definition


@pytest.mark.parametrize("way", WAYS)
def test_a_changed_value_of_a_function_is_noticed(way: Callable[[Any], Any]) -> None:
    """Wherever the function has it from."""
    for use in (define, define_member):
        assert use(way("name")) == use(way("name"))
        assert use(way("name")) != use(way("username"))
    assert define("name", where=way("name")) != define("name", where=way("username"))


def test_other_changes_are_noticed() -> None:
    def link(phone: Any) -> Any:
        return lambda user: User.a == phone

    definitions = [
        define("name"),
        define("username"),
        define("name", key=User.data["name"]),
        define("name", key=User.data["username"]),
        define("name", key=User.data["name"]["username"]),
        define("name", create_defaults={User.data: {"theme": "dark"}}),
        define("name", create_defaults={User.data: {"theme": "light"}}),
        define("name", create_defaults={User.data: [True]}),
        define("name", create_defaults={User.data: [1]}),
        define("name", when_deleted={User.a: "gone"}),
        define("name", when_deleted={User.a: None}),
        define("name", link=link("1")),
        define("name", link=link("2")),
        define("name", link=link(User.a)),
        define("name", link=link(sa.func.lower(User.a) + "x")),
        define("name", link=link(sa.func.lower(User.a) + "y")),
    ]
    assert len(set(definitions)) == len(definitions)
    by_name = declare_entities(
        "user", User, key="logto_id", columns={"a": "name"}, when_deleted="keep"
    )
    assert by_name.definition == definitions[0]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (threading.Lock(), "lock"),
        ((n for n in range(3)), "generator"),
        ({"deep": [Getter(threading.Lock())]}, "lock"),
        (sa.create_engine("sqlite://"), "object of type"),
    ],
)
def test_an_object_that_cannot_be_compared_is_refused(value: Any, kind: str) -> None:
    with pytest.raises(InvalidMapping, match=f"`columns` uses .*{kind}.*global variable"):
        define(closure(value))


def test_an_object_can_contain_itself() -> None:
    values: list[Any] = [1]
    values.append(values)
    assert define(closure(values)) == define(closure(values))


SOURCE = """
import functools, operator, re, sys
import sqlalchemy as sa
from datetime import date
from enum import Enum
from logto_webhooks.mapping.declare import declare_entities

class Plan(Enum):
    FREE = "free"

class Getter:
    def __init__(self, field): self.field, self.seen = field, {"a", "b", "c"}
    def __call__(self, user): return getattr(user, self.field)
    def read(self, user): return getattr(user, self.field)

def read(user, field): return [getattr(user, name) for name in (field,)][0]
def closure(*values): return lambda user: values
shared = {"x": frozenset(("a", "b", "c", "d")), "plan": Plan.FREE, "at": date(2026, 1, 2)}
columns = {
    "c0": lambda user: "x" if user.username in {"a", "b", "c"} else None,
    "c1": functools.partial(read, field="email"),
    "c2": Getter("email"),
    "c3": Getter("email").read,
    "c4": closure(shared, re.compile("x+"), Plan, object(), read, len, "x".join, sa.String(3)),
    "c5": operator.attrgetter("email"),
}
t = sa.Table("t", sa.MetaData(), sa.Column("id", sa.Text, primary_key=True),
             *(sa.Column(name, sa.Text) for name in columns))
m = declare_entities("user", t, key="id", when_deleted="delete", columns=columns)
print(m.definition)
"""


@pytest.mark.process
def test_a_definition_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Whatever the order of sets, and wherever objects lie in memory. Also if one process starts
    the module, and another imports it."""
    (tmp_path / "application.py").write_text(SOURCE)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    definitions = set()
    for seed, command in [
        ("1", ["application.py"]),
        ("2", ["-m", "application"]),
        ("3", ["-c", "import application"]),
    ]:
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        printed = subprocess.run(
            [sys.executable, *command],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        definitions.add(printed.stdout)
    assert len(definitions) == 1
    assert definitions != {""}
