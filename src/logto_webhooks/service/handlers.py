"""The application's own code for events: `on(...)`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.core.jobs import Registered, Tests
from logto_webhooks.errors import HandlerRefused
from logto_webhooks.service import options as how
from logto_webhooks.service.functions import is_awaited, name_of
from logto_webhooks.service.options import Options
from logto_webhooks.service.patterns import classes_of
from logto_webhooks.service.wishes import Wish, wishes_of

Function = TypeVar("Function", bound=Callable[..., Any])
# The kinds of transaction that the database has for a handler, awaited or not.
Provides = Callable[[bool], Sequence[type]]


class Handler(Struct, frozen=True, kw_only=True):
    """A registered function, and what fills its parameters."""

    registered: Registered
    function: Callable[..., Any]
    is_async: bool  # whether it is awaited
    options: Options
    wishes: tuple[Wish, ...] = ()

    @property
    def name(self) -> str:
        """By which jobs know it."""
        return self.registered.name

    @property
    def transaction(self) -> type | None:
        """The kind of transaction that it asks for."""
        asked = [each.types[0] for each in self.wishes if each.kind == "transaction"]
        return asked[0] if asked else None

    def asks_for(self, kind: str) -> bool:
        """Whether a parameter is filled with that."""
        return any(each.kind == kind for each in self.wishes)


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
        options: Options,
    ) -> Function:
        """Register a function for what `patterns_of` gave; return it unchanged.

        Raises HandlerRefused.
        """
        called = name_of(function, name)
        if called in self._all:
            problem = "another has this name; give one of them a name of its own, name='…'"
            raise HandlerRefused(name=called, problem=problem)
        if self._loop is not None:
            problem = "jobs are made for what is known at the start: register it before"
            raise HandlerRefused(name=called, problem=problem)
        if not patterns:
            raise HandlerRefused(name=called, problem="no event is named; for all, name '*'")
        given: dict[str, Any] = {"name": called, "patterns": patterns, "tests": tests}
        given |= {"ordered": ordered, "rerun": rerun}
        try:
            handler = Handler(
                registered=how.of(given, Registered),
                function=function,
                is_async=is_awaited(function),
                options=how.checked(options),
            )
            self._all[called] = self._fitted(handler)
        except ValueError as error:
            raise HandlerRefused(name=called, problem=str(error)) from None
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
        """The same handlers on another database. Raises HandlerRefused."""
        made = Handlers()
        made._all = dict(self._all)
        made.fit(provides)
        return made

    def fit(self, provides: Provides) -> None:
        """Look at all parameters, now that the database is known. Raises HandlerRefused."""
        self._provides = provides
        for name, each in self._all.items():
            try:
                self._all[name] = self._fitted(each)
            except ValueError as error:
                raise HandlerRefused(name=name, problem=str(error)) from None

    def _fitted(self, handler: Handler) -> Handler:
        provided = self._provides(handler.is_async) if self._provides else None
        told = classes_of(handler.registered.patterns, handler.registered.tests)
        return replace(handler, wishes=wishes_of(handler.function, provided, told))
