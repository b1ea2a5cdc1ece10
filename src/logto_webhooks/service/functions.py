"""Which functions can be handlers, by which names, and whether they are awaited."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

from logto_webhooks.errors import HandlerRefused

LONGEST_NAME: Final = 200
_CALL_IT: Final = "give it a name: name='…'"


def name_of(function: Any, name: Any) -> str:
    """By which name jobs know a function: the one that is given, or its module's and its own.

    Raises HandlerRefused.
    """
    if not callable(function) or isinstance(function, type):
        raise HandlerRefused(name=repr(function), problem="it is no function")
    own = _own_name(function) if name is None else name
    if not isinstance(own, str) or not own.strip() or not own.isprintable():
        problem = "its name must be a text that can be printed"
        raise HandlerRefused(name=repr(own), problem=problem)
    if len(own) > LONGEST_NAME:
        problem = f"its name is longer than {LONGEST_NAME} characters; {_CALL_IT}"
        raise HandlerRefused(name=own, problem=problem)
    return own


def _own_name(function: Any) -> str:
    module, own = (getattr(function, each, None) for each in ("__module__", "__qualname__"))
    if module is None or own is None:
        raise HandlerRefused(name=repr(function), problem=f"it has none; {_CALL_IT}")
    return f"{module}:{own}"


def is_awaited(function: Callable[..., Any]) -> bool:
    """Whether calling it gives what must be awaited. Raises ValueError for a generator, which
    nobody would run."""
    called = _called(function)
    if any(
        inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in called
    ):
        raise ValueError("it is a generator, of which nothing would run: let it have no yield")
    return any(inspect.iscoroutinefunction(each) for each in called)


def _called(function: Any) -> tuple[Any, Any]:
    """What runs when it is called: of a partial or a staticmethod its function, of an object its
    `__call__`."""
    while isinstance(function, functools.partial | staticmethod):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    return function, type(function).__call__
