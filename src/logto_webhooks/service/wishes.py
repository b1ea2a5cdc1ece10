"""What a handler's parameters are filled with: decided once, when it is registered."""

from __future__ import annotations

import inspect
import logging
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from msgspec import Struct

from logto_webhooks.core.events import Event
from logto_webhooks.core.events.local import LocalEvent, UserRow
from logto_webhooks.core.jobs import Delivery

Kind = Literal["event", "delivery", "user", "logger", "transaction"]
LOGGER: Final = logging.LoggerAdapter
_BY_NAME: Final[dict[str, Kind]] = {
    "event": "event",
    "delivery": "delivery",
    "user": "user",
    "logger": "logger",
}


class Wish(Struct, frozen=True):
    """One parameter: what fills it; `annotation` is the transaction's type."""

    name: str
    kind: Kind
    annotation: Any = None


def wishes_of(function: Callable[..., Any], provided: Sequence[type] | None) -> tuple[Wish, ...]:
    """Look at a handler's parameters; `provided` are the database's transactions, None if it
    isn't known yet. Raises ValueError, which says what can't be filled."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, TypeError) as error:
        raise ValueError(f"its annotations can't be read ({error})") from None
    wishes = [
        _wish(parameter, provided)
        for parameter in signature.parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and (parameter.default is parameter.empty or _known(parameter))
    ]
    if sum(each.kind == "transaction" for each in wishes) > 1:
        raise ValueError("it asks for two transactions: a handler has one")
    return tuple(wishes)


def _known(parameter: inspect.Parameter) -> bool:
    return _kind(parameter) is not None


def _wish(parameter: inspect.Parameter, provided: Sequence[type] | None) -> Wish:
    kind = _kind(parameter)
    annotation = parameter.annotation
    if kind is not None:
        return Wish(parameter.name, kind)
    if isinstance(annotation, type) and (provided is None or annotation in provided):
        return Wish(parameter.name, "transaction", annotation)
    raise ValueError(_cannot(parameter, provided or ()))


def _kind(parameter: inspect.Parameter) -> Kind | None:
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return _BY_NAME.get(parameter.name)
    classes = _classes(annotation)
    if classes and all(issubclass(each, Event | LocalEvent) for each in classes):
        return "event"
    found: dict[Any, Kind] = {Delivery: "delivery", UserRow: "user", LOGGER: "logger"}
    return found.get(classes[0]) if len(classes) == 1 else None


def _classes(annotation: Any) -> list[type]:
    """The classes that an annotation means: those of a union, without None; none if it is odd."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [each for each in typing.get_args(annotation) if each is not type(None)]
    else:
        members = [typing.get_origin(annotation) or annotation]
    return members if all(isinstance(each, type) for each in members) else []


def _cannot(parameter: inspect.Parameter, provided: Sequence[type]) -> str:
    transactions = [each.__name__ for each in provided]
    can = ["an event", "Delivery", "UserRow", "logging.LoggerAdapter", *transactions]
    wanted = f"the parameter {parameter.name!r}"
    if parameter.annotation is not parameter.empty:
        name = getattr(parameter.annotation, "__name__", parameter.annotation)
        wanted += f" of type {name}"
    names = ", ".join(_BY_NAME)
    return f"{wanted} can't be filled here, only {', '.join(can)}, or by name {names}"
