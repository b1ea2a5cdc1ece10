"""Register the application's handlers: their patterns, options and parameters."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from logto_webhooks.errors import InvalidHandler, UnknownEventName
from logto_webhooks.events import ALIASES, BY_NAME, DERIVED, Event, TestPayload, UnknownEvent
from logto_webhooks.events.local import LOCAL, LocalEvent
from logto_webhooks.handlers.parameters import (
    Mapped,
    ParameterSource,
    Transactions,
    handler_name,
    is_awaited,
    resolve_parameters,
)
from logto_webhooks.jobs import RegisteredHandler, Tests, matches
from logto_webhooks.mapping import Mappings
from logto_webhooks.retries import MAX_ATTEMPTS

What = type[Event] | type[LocalEvent] | str
_KNOWN: Final[dict[str, type[Event] | type[LocalEvent]]] = {**BY_NAME, **LOCAL}
_SENT: Final = tuple(name for name in BY_NAME if name not in DERIVED)
_EACH: Final = (
    "Pass event classes such as events.UserCreated, or names, as separate arguments. For all "
    'events, use "*".'
)
_BY_NAME_ONLY: Final = (
    'To select local events, use their names, or a pattern that starts with "Local" or '
    '"Organization.User.".'
)
_NO_TEST: Final = "Logto's console sends no test payloads for this event."


def parse_patterns(what: Sequence[What], *, unknown: bool, tests: Tests) -> tuple[str, ...]:
    """Return the names and patterns of event classes, names or patterns. Each must match a known
    event, by the same rule as for jobs. `unknown` allows events that this release doesn't know.

    Raises UnknownEventName, and InvalidHandler for a function.
    """
    return tuple(dict.fromkeys(_check_pattern(event, unknown, tests) for event in what))


def match_classes(patterns: Sequence[str], tests: Tests) -> list[type]:
    """Return the event classes that a handler can receive."""
    if tests == "only":
        return [TestPayload]
    names = [name for name in _KNOWN if any(matches(pattern, name) for pattern in patterns)]
    classes: list[type] = [_KNOWN[name] for name in names]
    if any(pattern == "*" or not _matches_any(pattern, tuple(_KNOWN)) for pattern in patterns):
        classes.append(UnknownEvent)
    if tests == "too" and any(name in _SENT for name in names):
        classes.append(TestPayload)
    return classes


def _check_pattern(what: What, unknown: bool, tests: Tests) -> str:
    name = _read_name(what)
    names = _SENT if tests == "only" else tuple(_KNOWN)
    if _matches_any(name, names) or (unknown and name and name.isprintable()):
        return name
    raise UnknownEventName(name=name, hint=_suggest(name, tests))


def _read_name(what: Any) -> str:
    if isinstance(what, str):
        return ALIASES.get(what, what)
    if not isinstance(what, type):
        if callable(what):
            problem = "pass the events in parentheses: @logto.on(events.UserCreated)"
            raise InvalidHandler(name=getattr(what, "__qualname__", repr(what)), problem=problem)
        raise UnknownEventName(name=what, hint=_EACH)
    if issubclass(what, Event | LocalEvent) and what.name:
        return what.name
    raise UnknownEventName(name=what.__name__, hint=_EACH)


def _suggest(name: str, tests: Tests) -> str:
    if any(fnmatchcase(known_name, name) for known_name in _KNOWN):
        return _NO_TEST if tests == "only" else _BY_NAME_ONLY
    if "*" in name or "?" in name:
        return "No known event matches it."
    near = get_close_matches(name, _KNOWN, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else f"Known events: {', '.join(_KNOWN)}."


def _matches_any(pattern: str, names: Sequence[str]) -> bool:
    return any(matches(pattern, name) for name in names)


T = TypeVar("T")
TIME_LIMIT_S: Final = 60.0
_LONGEST_S: Final = 1e9  # 31 years, because databases can't add infinity to a time
Wait = Annotated[float, Meta(ge=0, le=_LONGEST_S)]
Duration = Annotated[float, Meta(gt=0, le=_LONGEST_S)]
Count = Annotated[int, Meta(ge=1)]


class HandlerOptions(
    Struct, frozen=True, kw_only=True, rename={"time_limit_s": "time_limit", "max_age_s": "max_age"}
):
    """How a handler is run. Times are in seconds.

    `waits` are the times before the second, third, … attempt. By default, they grow from 1 s to 15
    min. A job older than `max_age_s` is discarded. `concurrency` is how many jobs of the handler a
    process runs at once.
    """

    max_attempts: Count = MAX_ATTEMPTS
    waits: tuple[Wait, ...] = ()
    time_limit_s: Duration = TIME_LIMIT_S
    max_age_s: Duration | None = None
    concurrency: Count | None = None


def check_options(options: HandlerOptions) -> HandlerOptions:
    """Return valid options unchanged. Raises ValueError, which names an invalid one."""
    fields = msgspec.structs.fields(HandlerOptions)
    values = {field.encode_name: getattr(options, field.name) for field in fields}
    return make_options(values, HandlerOptions)


def make_options(values: dict[str, Any], kind: type[T]) -> T:
    """Make a struct from values. Raises ValueError, which names an invalid value."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        expected, _, where = str(error).partition(" - at `$.")
        expected = _TYPE.sub(lambda name: _TYPES.get(name[1], name[1]), expected)
        raise ValueError(f"{where.rstrip('`')}: {expected[:1].lower()}{expected[1:]}") from None


# msgspec's names of types, in its messages -> ours.
_TYPE: Final = re.compile(r"`(\w+)(?: \| null)?`")
_TYPES: Final = {
    "array": "a list such as [1, 60]",
    "bool": "True or False",
    "float": "a number",
    "int": "a whole number",
    "null": "None",
    "object": "a dict",
    "str": "text",
}


Function = TypeVar("Function", bound=Callable[..., Any])
# Returns the types of session that the database has for a handler, awaited or not.
Provides = Callable[[bool], Sequence[type]]


class Handler(Struct, frozen=True, kw_only=True):
    """A registered function, and what fills its parameters. `transaction` is one of these."""

    name: str  # by which jobs refer to it
    registered: RegisteredHandler
    function: Callable[..., Any]
    is_async: bool  # whether it is awaited
    options: HandlerOptions
    parameters: tuple[ParameterSource, ...] = ()
    transaction: ParameterSource | None = None

    @property
    def asks_for_user(self) -> bool:
        """Whether a parameter is the row of the event's user."""
        return any(parameter.kind == "user" for parameter in self.parameters)


class Handlers:
    """All handlers of an application."""

    def __init__(self, mappings: Mappings | None = None) -> None:
        """`mappings` are those of classes that handlers can ask for."""
        self._mappings = Mappings() if mappings is None else mappings
        self._provides: Provides | None = None  # None until the database is known
        self.by_name: dict[str, Handler] = {}
        # The event loop on which the handlers run, of an application or a command.
        self.loop: asyncio.AbstractEventLoop | None = None

    def __iter__(self) -> Iterator[Handler]:
        return iter(self.by_name.values())

    @property
    def longest_transaction_s(self) -> float:
        """The longest time limit of a handler with a transaction; 0 if there is none."""
        return max((each.options.time_limit_s for each in self if each.transaction), default=0.0)

    def __len__(self) -> int:
        return len(self.by_name)

    def add(
        self,
        function: Function,
        patterns: Sequence[str],
        *,
        name: str | None = None,
        ordered: bool = True,
        tests: Tests = "no",
        rerun: bool = True,
        options: HandlerOptions,
    ) -> Function:
        """Register a function for the result of `parse_patterns`. Return it unchanged.

        Raises InvalidHandler.
        """
        called = handler_name(function, name)
        if called in self.by_name:
            problem = "another handler has this name; choose another with name='…'"
            raise InvalidHandler(name=called, problem=problem)
        if self.loop is not None:
            problem = "the application has already started: register handlers before"
            raise InvalidHandler(name=called, problem=problem)
        if not patterns:
            raise InvalidHandler(name=called, problem="it has no events; for all events, use '*'")
        fields: dict[str, Any] = {"name": called, "patterns": patterns, "tests": tests}
        fields |= {"ordered": ordered, "rerun": rerun}
        try:
            handler = Handler(
                name=called,
                registered=make_options(fields, RegisteredHandler),
                function=function,
                is_async=is_awaited(function),
                options=check_options(options),
            )
            self.by_name[called] = self._fit(handler)
        except ValueError as error:
            raise InvalidHandler(name=called, problem=str(error)) from None
        return function

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Run handlers within the block. No more can be registered, because they wouldn't run."""
        before, self.loop = self.loop, asyncio.get_running_loop()
        try:
            yield
        finally:
            self.loop = before

    def copy(self, provides: Provides) -> Handlers:
        """Copy the handlers for another database. Raises InvalidHandler."""
        copied = Handlers(self._mappings)
        copied.by_name = dict(self.by_name)
        copied.fit(provides)
        return copied

    def fit(self, provides: Provides) -> None:
        """Resolve all parameters, now that the database and the mappings are known.

        Raises InvalidHandler.
        """
        self._provides = provides
        for name, handler in self.by_name.items():
            try:
                self.by_name[name] = self._fit(handler, are_mapped=True)
            except ValueError as error:
                raise InvalidHandler(name=name, problem=str(error)) from None

    def _fit(self, handler: Handler, *, are_mapped: bool = False) -> Handler:
        provided = None
        if self._provides:
            is_async = handler.is_async
            provided = Transactions(self._provides(is_async), self._provides(not is_async))
        classes = match_classes(handler.registered.patterns, handler.registered.tests)
        mapped = Mapped(self._mappings, are_mapped)
        parameters = resolve_parameters(handler.function, provided, classes, mapped)
        transactions = (source for source in parameters if source.kind == "transaction")
        return replace(handler, parameters=parameters, transaction=next(transactions, None))
