"""Register handlers: `on(...)` and its options."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from logto_webhooks.errors import InvalidHandler
from logto_webhooks.handlers.matching import match_classes
from logto_webhooks.handlers.parameters import (
    ParameterSource,
    handler_name,
    is_awaited,
    resolve_parameters,
)
from logto_webhooks.jobs import RegisteredHandler, Tests
from logto_webhooks.retries import MAX_ATTEMPTS

T = TypeVar("T")
TIME_LIMIT_S: Final = 60.0
_LONGEST_S: Final = 1e9  # 31 years: what a database can add to a time, and no infinity
Wait = Annotated[float, Meta(ge=0, le=_LONGEST_S)]
Duration = Annotated[float, Meta(gt=0, le=_LONGEST_S)]
Count = Annotated[int, Meta(ge=1)]


class HandlerOptions(
    Struct,
    frozen=True,
    kw_only=True,
    rename={"time_limit_s": "time_limit", "max_age_s": "max_age"},
):
    """How a handler is run; times in seconds.

    `waits` are those before the second, third, … attempt; without any they grow from 1 s to 15
    min. A job older than `max_age_s` is discarded. `concurrency` is how many of its jobs a process
    runs at once.
    """

    max_attempts: Count = MAX_ATTEMPTS
    waits: tuple[Wait, ...] = ()
    time_limit_s: Duration = TIME_LIMIT_S
    max_age_s: Duration | None = None
    concurrency: Count | None = None


def check_options(options: HandlerOptions) -> HandlerOptions:
    """The same, if each can be. Raises ValueError, which says what can't."""
    fields = msgspec.structs.fields(HandlerOptions)
    given = {field.encode_name: getattr(options, field.name) for field in fields}
    return make_options(given, HandlerOptions)


def make_options(given: dict[str, Any], kind: type[T]) -> T:
    """Make a struct of what was given. Raises ValueError, which names what can't be."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        expected, _, where = str(error).partition(" - at `$.")
        raise ValueError(f"{where.rstrip('`')}: {expected}") from None


Function = TypeVar("Function", bound=Callable[..., Any])
# The kinds of transaction that the database has for a handler, awaited or not.
Provides = Callable[[bool], Sequence[type]]


class Handler(Struct, frozen=True, kw_only=True):
    """A registered function, and what fills its parameters."""

    registered: RegisteredHandler
    function: Callable[..., Any]
    is_async: bool  # whether it is awaited
    options: HandlerOptions
    parameters: tuple[ParameterSource, ...] = ()

    @property
    def name(self) -> str:
        """By which jobs know it."""
        return self.registered.name

    @property
    def transaction(self) -> type | None:
        """The kind of transaction that it asks for."""
        asked = [
            parameter.types[0] for parameter in self.parameters if parameter.kind == "transaction"
        ]
        return asked[0] if asked else None

    def asks_for(self, kind: str) -> bool:
        """Whether a parameter is filled with that."""
        return any(parameter.kind == kind for parameter in self.parameters)


class Handlers:
    """All handlers of an application."""

    def __init__(self) -> None:
        self._provides: Provides | None = None  # as long as the database isn't known
        self._all: dict[str, Handler] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def __iter__(self) -> Iterator[Handler]:
        return iter(self._all.values())

    def __len__(self) -> int:
        return len(self._all)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop on which they run, of an application or a command; None if they don't."""
        return self._loop

    def get(self, name: str) -> Handler | None:
        """Find one by its name."""
        return self._all.get(name)

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
        """Register a function for what `parse_patterns` gave; return it unchanged.

        Raises InvalidHandler.
        """
        called = handler_name(function, name)
        if called in self._all:
            problem = "another has this name; give one of them a name of its own, name='…'"
            raise InvalidHandler(name=called, problem=problem)
        if self._loop is not None:
            problem = "jobs are made for what is known at the start: register it before"
            raise InvalidHandler(name=called, problem=problem)
        if not patterns:
            raise InvalidHandler(name=called, problem="no event is named; for all, name '*'")
        given: dict[str, Any] = {"name": called, "patterns": patterns, "tests": tests}
        given |= {"ordered": ordered, "rerun": rerun}
        try:
            handler = Handler(
                registered=make_options(given, RegisteredHandler),
                function=function,
                is_async=is_awaited(function),
                options=check_options(options),
            )
            self._all[called] = self._fitted(handler)
        except ValueError as error:
            raise InvalidHandler(name=called, problem=str(error)) from None
        return function

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """As long as the block lasts, they run, and none can be registered: it never would."""
        before, self._loop = self._loop, asyncio.get_running_loop()
        try:
            yield
        finally:
            self._loop = before

    def copy(self, provides: Provides) -> Handlers:
        """The same handlers on another database. Raises InvalidHandler."""
        made = Handlers()
        made._all = dict(self._all)
        made.fit(provides)
        return made

    def fit(self, provides: Provides) -> None:
        """Look at all parameters, now that the database is known. Raises InvalidHandler."""
        self._provides = provides
        for name, handler in self._all.items():
            try:
                self._all[name] = self._fitted(handler)
            except ValueError as error:
                raise InvalidHandler(name=name, problem=str(error)) from None

    def _fitted(self, handler: Handler) -> Handler:
        provided = self._provides(handler.is_async) if self._provides else None
        told = match_classes(handler.registered.patterns, handler.registered.tests)
        return replace(handler, parameters=resolve_parameters(handler.function, provided, told))
