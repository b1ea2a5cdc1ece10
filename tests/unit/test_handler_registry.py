"""Registering handlers: what can't be is refused at once, and says what to write."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from logto_webhooks import Delivery, LogtoWebhooks, UserRow, events
from logto_webhooks.errors import InvalidHandler, LogtoWebhooksError, UnknownEventName
from logto_webhooks.testing import SIGNING_KEY

if TYPE_CHECKING:
    from decimal import Decimal

Register = Callable[..., str]
NAN, INFINITY = float("nan"), float("inf")


def plain(event: events.Event) -> None: ...


async def awaited(event: events.Event) -> None: ...


@pytest.fixture
def logto(tmp_path: Path) -> Iterator[LogtoWebhooks]:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'app.db'}")
    yield LogtoWebhooks(signing_key=SIGNING_KEY, engine=engine)
    engine.dispose()


@pytest.fixture
def refused(logto: LogtoWebhooks) -> Register:
    """Register what must be refused; return what is said."""

    def register(*what: Any, function: Any = plain, **options: Any) -> str:
        with pytest.raises((InvalidHandler, UnknownEventName)) as raised:
            logto.on(*what, **options)(function)
        assert not len(logto.handlers)
        return str(raised.value)

    return register


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("User.Create", "Did you mean User.Created"),
        ("LocalUserCreate", "Did you mean LocalUserCreated"),
        ("", "Known events: "),
        ("Nothing.*", "No known event matches"),
        ("L*", 'starts with "Local"'),
        ("*Local*", 'starts with "Local"'),
        ("?ocalUserCreated", 'starts with "Local"'),
        ("*.User.Added", '"Organization.User."'),
        (None, "events.UserCreated"),
        (5, "events.UserCreated"),
        (["User.Created"], "as separate arguments"),
        (events.Event, '"*"'),
        (events.User, "events.UserCreated"),
        (LogtoWebhooks, "events.UserCreated"),
        (plain, "@logto.on(events.UserCreated)"),
    ],
)
def test_an_event_that_never_comes_is_refused(refused: Register, what: Any, says: str) -> None:
    """With what to write."""
    assert says in refused(what)


def test_parentheses_that_are_missing_are_told_at_once(logto: LogtoWebhooks) -> None:
    """When decorating, and not when the function is called."""
    for decorate in (logto.on, logto.on_test):
        forgetful: Any = decorate
        with pytest.raises(InvalidHandler, match=r"plain .* in parentheses"):
            forgetful(plain)


@pytest.mark.parametrize("what", ["LocalUserCreated", "Local*", events.OrganizationUserAdded])
def test_what_logto_never_tests_is_no_test(logto: LogtoWebhooks, what: Any) -> None:
    """`on_test` for what is made here would never run."""
    with pytest.raises(UnknownEventName, match="no test payloads"):
        logto.on_test(what)


def test_what_is_accepted_is_what_jobs_are_made_for(logto: LogtoWebhooks) -> None:
    """An alias is the event that it means, with `unknown`, too."""
    logto.on("Post.SignIn", "PostSignIn", "L?c*", "Local*", unknown=True, name="all")(plain_any)
    [handler] = logto.handlers
    assert handler.registered.patterns == ("PostSignIn", "L?c*", "Local*")


def plain_any(event: Any) -> None: ...


def generator(event: events.Event) -> Iterator[int]:
    yield 1


async def async_generator(event: events.Event) -> AsyncIterator[int]:
    yield 1


class Generates:
    def __call__(self, event: events.Event) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    "function",
    [
        generator,
        async_generator,
        functools.partial(generator),
        Generates(),
        staticmethod(generator),
    ],
)
def test_a_generator_is_refused(refused: Register, function: Any) -> None:
    """Nothing of it would run."""
    assert "generator" in refused("*", function=function, name="g")


@pytest.mark.parametrize("name", ["", " ", "a\0b", "\ud800", "a\nb", 5, b"name", "x" * 201])
def test_a_name_that_no_database_holds_is_refused(refused: Register, name: Any) -> None:
    """Or that nobody can read."""
    assert "its name" in refused("*", name=name)


@pytest.mark.parametrize("function", [functools.partial(plain), Generates(), lambda e: e])
def test_what_has_no_name_asks_for_one(refused: Register, function: Any) -> None:
    """As a partial, an object that is called, or a lambda: the next one would have the same."""
    assert "name='…'" in refused("*", function=function)


@pytest.mark.parametrize("function", [5, "app:greet", None, Generates])
def test_what_is_no_function_is_refused(refused: Register, function: Any) -> None:
    """A class, too: nobody would call what it makes."""
    assert "isn't a function" in refused("*", function=function)


def test_two_of_one_name_are_refused(logto: LogtoWebhooks) -> None:
    """Jobs couldn't tell them apart."""
    logto.on("Newer.Event", unknown=True, name="one")(plain)
    with pytest.raises(InvalidHandler, match="another handler has this name"):
        logto.on("*", name="one")(plain)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("concurrency", [0, -1, "2", 1.5, True]),
        ("max_attempts", [0, -1, "3", 1.5, None]),
        ("time_limit", [NAN, INFINITY, -1, 0, "60", None, True]),
        ("max_age", [NAN, INFINITY, -1, 0, "60", timedelta(minutes=1)]),
        ("waits", [[-1], (NAN,), ("1",), "12", 5, (INFINITY,), (timedelta(minutes=1),)]),
        ("ordered", ["no", None, 0]),
        ("rerun", ["no"]),
    ],
)
def test_an_option_that_can_not_be_is_refused(
    refused: Register, option: str, values: list[Any]
) -> None:
    """By its name."""
    for value in values:
        assert f"{option}" in refused("*", **{option: value})


def test_its_type_is_told_in_pythons_words(refused: Register) -> None:
    """Not in those of JSON."""
    assert "waits: expected a list such as [1, 60], got a whole number" in refused("*", waits=5)
    assert "max_attempts: expected a whole number >= 1" in refused("*", max_attempts=0)


def test_waits_may_be_any_sequence(logto: LogtoWebhooks) -> None:
    """Of whole numbers, or others."""
    for waits in ([1, 2.5], (1, 2.5), range(1, 3)):
        logto.on("*", name=str(waits), waits=waits)(plain)
    found = [each.options.waits for each in logto.handlers]
    assert found == [(1, 2.5), (1, 2.5), (1, 2)]


def positional(event: events.Event, /) -> None: ...
def odd(event: events.Event, cache: dict[str, int]) -> None: ...
async def wrong_engine(event: events.Event, session: AsyncSession) -> None: ...
def two(session: Session, connection: sa.Connection) -> None: ...
def unknown(who) -> None: ...  # type: ignore[no-untyped-def]
def no_type(event: 5) -> None: ...  # type: ignore[valid-type]
def no_types(event: [events.Event]) -> None: ...  # type: ignore[valid-type, misc]
def quoted(event: "events.Event") -> None: ...  # noqa: UP037
def nowhere(event: events.Nowhere) -> None: ...  # type: ignore[name-defined]
def for_checkers(event: events.Event, price: Decimal) -> None: ...
def by_default(event: events.Event, price: Decimal | None = None) -> None: ...
def never_none(user: UserRow) -> None: ...
def another(event: events.PostSignIn) -> None: ...


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (positional, "'event' of type Event is positional-only"),
        (odd, "'cache'"),
        (wrong_engine, "AsyncSession"),
        (two, "two transactions"),
        (unknown, "'who'"),
        (no_type, "'event' of type 5"),
        (no_types, "'event'"),
        (quoted, "remove the quotes"),
        (nowhere, "Nowhere"),
        (for_checkers, "'price' of type Decimal isn't defined at runtime"),
        (by_default, "TYPE_CHECKING"),
        (never_none, "UserRow | None"),
        (another, "doesn't accept UserCreated"),
    ],
)
def test_a_parameter_that_can_not_be_filled_is_refused(
    refused: Register, function: Any, says: str
) -> None:
    """By its name."""
    assert says in refused("User.Created", function=function)


def of_users(event: events.UserCreated | events.UserDeleted) -> None: ...
def of_a_test(event: events.TestPayload) -> None: ...
def of_what_is_new(event: events.UnknownEvent) -> None: ...
def of_the_record(event: events.LocalEvent) -> None: ...
def of_all(event: events.Event | events.LocalEvent) -> None: ...
def with_a_row(event: events.LocalEvent, user: UserRow) -> None: ...


@pytest.mark.parametrize(
    ("function", "what", "options", "missing"),
    [
        (of_users, ["User.Created", "User.Deleted"], {}, None),
        (of_users, ["User.*"], {}, "UserDataUpdated"),
        (of_users, ["User.Created"], {"test": True}, "TestPayload"),
        (of_users, ["*"], {}, "PostRegister"),
        (of_users, ["Newer.Event"], {"unknown": True}, "UnknownEvent"),
        (of_what_is_new, ["Newer.Event"], {"unknown": True}, None),
        (of_the_record, ["Local*"], {}, None),
        (of_the_record, ["Local*", "Organization.User.*"], {}, "OrganizationUserAdded"),
        (plain, ["LocalUserCreated"], {}, "LocalUserCreated: .*, or use events.LocalEvent."),
        (plain, ["Local*", "*"], {}, r"or use events.Event \| events.LocalEvent."),
        (of_users, ["User.*"], {}, "or use events.Event."),
        (of_all, ["Local*", "*"], {"test": True}, None),
        (with_a_row, ["LocalUser*"], {}, None),
        (with_a_row, ["Local*"], {}, "UserRow"),
    ],
)
def test_an_event_parameter_is_for_all_that_come(
    logto: LogtoWebhooks, function: Any, what: list[Any], options: Any, missing: str | None
) -> None:
    """By class, by union, or by a base; a pattern means what it matches."""
    if missing is None:
        assert logto.on(*what, **options)(function) is function
        return
    with pytest.raises(InvalidHandler, match=missing):
        logto.on(*what, **options)(function)


def test_a_test_is_a_test_payload(logto: LogtoWebhooks) -> None:
    """Whatever the event whose name it has."""
    logto.on_test(events.UserCreated)(of_a_test)
    with pytest.raises(InvalidHandler, match="TestPayload"):
        logto.on_test(events.UserCreated)(of_users)


def in_all_forms(
    event: Annotated[events.Event, "an event"],
    delivery: Delivery | None,
    user: Annotated[UserRow | None, "or none"],
    logger: logging.LoggerAdapter[logging.Logger],
    session: Session | None = None,
    number: int = 5,
) -> Decimal:
    raise NotImplementedError


def by_name(event, *, delivery, logger: Any, user: Any = None, **more) -> None: ...  # type: ignore[no-untyped-def]


async def awaits_a_session(event: events.Event, session: Session) -> None: ...
async def awaits_a_connection(event: events.Event, connection: sa.Connection) -> None: ...
def calls_an_awaited_session(event: events.Event, session: AsyncSession) -> None: ...
async def awaits_unknown(who) -> None: ...  # type: ignore[no-untyped-def]


CANT = "can't be filled"
PLAIN, AWAITED = "`def` instead of `async def`", "`async def` instead of `def`"


@pytest.mark.parametrize(
    ("function", "is_async", "says"),
    [
        (awaits_a_session, True, f"Session {CANT}; use AsyncSession, or write {PLAIN}."),
        (awaits_a_connection, True, f"Connection {CANT}; use AsyncConnection, or write {PLAIN}."),
        (calls_an_awaited_session, True, f"AsyncSession {CANT}; use Session, or write {AWAITED}."),
        (awaits_a_session, False, f"Session {CANT}; write {PLAIN}."),
        (wrong_engine, False, f"AsyncSession {CANT}; write {PLAIN}, and use Session."),
        (calls_an_awaited_session, False, f"AsyncSession {CANT}; use Session."),
    ],
)
def test_the_other_kind_of_transaction_is_named(function: Any, is_async: bool, says: str) -> None:
    """Where the engine has it; otherwise, the other kind of function."""
    logto = LogtoWebhooks.from_env()
    logto.on("*")(function)
    awaited = (AsyncSession, AsyncConnection) if is_async else ()
    with pytest.raises(InvalidHandler) as raised:
        logto.handlers.fit(lambda awaits: awaited if awaits else (Session, sa.Connection))
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("function", "is_async", "says"),
    [
        (unknown, True, "Session, Connection, or one of the names"),
        (awaits_unknown, True, "AsyncSession, AsyncConnection, or one of the names"),
        (awaits_unknown, False, f"Session or Connection (but write {PLAIN}), or one of the names"),
        (unknown, None, "a session or connection of SQLAlchemy, or one of the names"),
    ],
)
def test_a_parameter_without_a_type_is_told_all_types(
    function: Any, is_async: bool | None, says: str
) -> None:
    """Those of the engine's transactions, too, as far as it is known."""
    logto = LogtoWebhooks.from_env()
    awaited = (AsyncSession, AsyncConnection) if is_async else ()
    if is_async is not None:
        logto.handlers.fit(lambda awaits: awaited if awaits else (Session, sa.Connection))
    with pytest.raises(InvalidHandler) as raised:
        logto.on("*")(function)
    assert f"logging.LoggerAdapter, {says}" in str(raised.value)


def test_annotations_of_all_forms_are_read(logto: LogtoWebhooks) -> None:
    """Annotated, optional, quoted; a default is no reason not to fill it."""
    quoted: dict[str, Any] = {"logging": logging}
    source = "def quoted(log: 'logging.LoggerAdapter[logging.Logger]'): ..."
    exec(compile(source, "quoted", "exec", dont_inherit=True), quoted)
    logto.on("*")(in_all_forms)
    logto.on("*")(by_name)
    logto.on("*", name="quoted")(quoted["quoted"])
    kinds = [[each.kind for each in handler.parameters] for handler in logto.handlers]
    given = ["event", "delivery", "user", "logger"]
    by_names = ["event", "delivery", "logger", "user"]
    assert kinds == [[*given, "transaction"], by_names, ["logger"]]


def test_a_default_is_filled_once_the_database_is_known() -> None:
    """It isn't, as long as settings may come from the environment."""
    logto = LogtoWebhooks.from_env()

    @logto.on("*")
    def handler(event: events.Event, session: Session | None = None, number: int = 1) -> None: ...

    [before] = logto.handlers
    assert before.transaction is None
    logto.handlers.fit(lambda awaited: (Session,))
    [after] = logto.handlers
    assert after.transaction is not None
    assert after.transaction.types == (Session,)


class Awaited:
    async def __call__(self, event: events.Event) -> None: ...

    async def method(self, event: events.Event) -> None: ...


@pytest.mark.parametrize(
    "function",
    [
        awaited,
        functools.partial(awaited),
        functools.partial(functools.partial(Awaited())),
        Awaited(),
        Awaited().method,
        staticmethod(awaited),
        functools.partial(staticmethod(awaited)),
    ],
)
def test_what_is_asynchronous_is_known(logto: LogtoWebhooks, function: Any) -> None:
    """As a partial, an object or a method, too."""
    logto.on("*", name="async")(function)
    logto.on("*", name="sync")(plain)
    assert [each.is_async for each in logto.handlers] == [True, False]


def test_none_is_registered_once_it_is_started(logto: LogtoWebhooks) -> None:
    """It would never run; when it has ended, one can be, and started again it runs."""

    async def run() -> None:
        async with logto.lifespan():
            for register in (logto.on("*"), logto.on_test()):
                with pytest.raises(InvalidHandler, match="register handlers before"):
                    register(plain)
        logto.on("*", name="later")(plain)
        async with logto.lifespan():
            known = await logto.known_handlers()
        assert [each.handler for each in known] == ["later"]

    asyncio.run(run())


def test_a_database_must_be_given() -> None:
    """When mounted; there is none by default."""
    with pytest.raises(LogtoWebhooksError, match="the application's database"):
        LogtoWebhooks(signing_key="k")
