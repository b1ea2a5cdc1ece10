"""The application's own code for events: `on(...)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Final, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.core.events import Event, named
from logto_webhooks.core.events.catalog import ALIASES, BY_NAME
from logto_webhooks.core.events.local import LOCAL, LocalEvent
from logto_webhooks.core.jobs import Registered, Tests
from logto_webhooks.core.lifecycle import MAX_ATTEMPTS
from logto_webhooks.errors import HandlerRefused, UnknownEventName
from logto_webhooks.service.wishes import Wish, wishes_of

Function = TypeVar("Function", bound=Callable[..., Any])
What = type[Event] | type[LocalEvent] | str
# The kinds of transaction that the database has for a handler, awaited or not.
Provides = Callable[[bool], Sequence[type]]
TIME_LIMIT_S: Final = 60.0


class Options(Struct, frozen=True, kw_only=True):
    """How a handler is run; times in seconds.

    `waits` are those before the second, third, … attempt; without any they grow from 1 s to 15
    min. A job older than `max_age_s` is discarded. `concurrency` is how many of its jobs a process
    runs at once.
    """

    max_attempts: int = MAX_ATTEMPTS
    waits: tuple[float, ...] = ()
    time_limit_s: float = TIME_LIMIT_S
    max_age_s: float | None = None
    concurrency: int | None = None

    @property
    def times(self) -> tuple[float, ...]:
        """All of them."""
        return (self.time_limit_s, self.max_age_s or 0, *self.waits)


class Handler(Struct, frozen=True, kw_only=True):
    """A registered function, and what fills its parameters."""

    registered: Registered
    function: Callable[..., Any]
    options: Options
    wishes: tuple[Wish, ...] = ()

    @property
    def name(self) -> str:
        """By which jobs know it."""
        return self.registered.name

    @property
    def is_async(self) -> bool:
        """Whether it is awaited."""
        call = type(self.function).__call__  # of an object that is called as a function
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    @property
    def transaction(self) -> type | None:
        """The kind of transaction that it asks for."""
        asked = [each.annotation for each in self.wishes if each.kind == "transaction"]
        return asked[0] if asked else None

    def asks_for(self, kind: str) -> bool:
        """Whether a parameter is filled with that."""
        return any(each.kind == kind for each in self.wishes)


class Handlers:
    """All handlers of an application."""

    def __init__(self) -> None:
        self._provides: Provides | None = None  # as long as the database isn't known
        self._all: dict[str, Handler] = {}

    def __iter__(self) -> Iterator[Handler]:
        return iter(self._all.values())

    def __len__(self) -> int:
        return len(self._all)

    def get(self, name: str) -> Handler | None:
        """Find one by its name."""
        return self._all.get(name)

    def add(
        self,
        function: Function,
        what: Sequence[What],
        *,
        name: str | None = None,
        ordered: bool = True,
        tests: Tests = "no",
        rerun: bool = True,
        unknown: bool = False,
        options: Options,
    ) -> Function:
        """Register a function for events; return it unchanged.

        Raises UnknownEventName, HandlerRefused.
        """
        called = name or f"{function.__module__}:{function.__qualname__}"
        if not what:
            raise HandlerRefused(name=called, problem="no event is named; for all, name '*'")
        patterns = tuple(dict.fromkeys(_pattern(each, unknown) for each in what))
        if called in self._all:
            problem = "another has this name; give one of them a name of its own, name='…'"
            raise HandlerRefused(name=called, problem=problem)
        if not all(isinstance(each, int | float) for each in options.times):
            raise HandlerRefused(name=called, problem="its times must be numbers, of seconds")
        if options.max_attempts < 1 or options.time_limit_s <= 0:
            problem = "max_attempts must be 1 or more, and time_limit_s more than 0"
            raise HandlerRefused(name=called, problem=problem)
        registered = Registered(
            name=called, patterns=patterns, ordered=ordered, tests=tests, rerun=rerun
        )
        handler = Handler(registered=registered, function=function, options=options)
        self._all[called] = self._fitted(handler)
        return function

    def copy(self, provides: Provides, around: Callable[[Handler], Callable[..., Any]]) -> Handlers:
        """The same handlers on another database, with other functions `around` theirs.

        Raises HandlerRefused.
        """
        made = Handlers()
        made._all = dict(self._all)
        made.fit(provides)
        made._all = {name: replace(each, function=around(each)) for name, each in made._all.items()}
        return made

    def fit(self, provides: Provides) -> None:
        """Look at all parameters, now that the database is known. Raises HandlerRefused."""
        self._provides = provides
        self._all = {name: self._fitted(each) for name, each in self._all.items()}

    def _fitted(self, handler: Handler) -> Handler:
        provided = self._provides(handler.is_async) if self._provides else None
        try:
            wishes = wishes_of(handler.function, provided)
        except ValueError as error:
            raise HandlerRefused(name=handler.name, problem=str(error)) from None
        return replace(handler, wishes=wishes)


def _pattern(what: What, unknown: bool) -> str:
    if not isinstance(what, str):
        return what.name
    if what in LOCAL or what in BY_NAME or unknown:
        return what
    if "*" in what or "?" in what:
        if what == "*" or any(fnmatchcase(name, what) for name in (*BY_NAME, *LOCAL)):
            return what
        raise UnknownEventName(name=what, hint="No event that this release knows is like that.")
    if what in ALIASES:
        return named(what).name
    near = get_close_matches(what, (*BY_NAME, *LOCAL), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Known are: {', '.join((*BY_NAME, *LOCAL))}."
    raise UnknownEventName(name=what, hint=hint)
