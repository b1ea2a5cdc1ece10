"""The reference of FakeLogto, made of its methods."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from logto_webhooks.testing.fake import FakeLogto

_LONG: Final = re.compile(r"\(.{40,}\)")  # a default that its method explains


def table() -> str:
    """A line for each public method: how it is called, and what its docstring says."""
    lines = [f"| `{_call(each)}` | {_told(each)} |" for each in _methods()]
    return "\n".join(["| method | |", "| --- | --- |", *lines])


def _methods() -> Iterator[Callable[..., Any]]:
    of = [each for kind in reversed(FakeLogto.__mro__) for each in vars(kind).values()]
    yield from (each for each in of if inspect.isfunction(each) and each.__name__[0] != "_")


def _call(method: Callable[..., Any]) -> str:
    _, *parameters = inspect.signature(method).parameters.values()
    plain = [str(each.replace(annotation=inspect.Parameter.empty)) for each in parameters]
    keyword = next((n for n, each in enumerate(parameters) if each.kind is each.KEYWORD_ONLY), None)
    if keyword is not None:
        plain.insert(keyword, "*")
    awaited = "await " if inspect.iscoroutinefunction(method) else ""
    return f"{awaited}{method.__name__}({', '.join(_LONG.sub('…', each) for each in plain)})"


def _told(method: Callable[..., Any]) -> str:
    return re.sub(r"\s+", " ", inspect.getdoc(method) or "").replace("|", "\\|")
