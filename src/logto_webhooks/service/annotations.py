"""Reading the annotations of a function's parameters, whatever their form."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class Absent:
    """A type that isn't there when the function runs, such as one imported for type checkers."""

    def __class_getitem__(cls, item: object) -> type:
        return cls


def parameters_of(function: Callable[..., Any]) -> Iterable[inspect.Parameter]:
    """The parameters; a name that isn't there stands for an Absent type of that name.

    Raises ValueError.
    """
    absent: dict[str, Any] = {}
    try:
        while True:
            try:
                signature = inspect.signature(function, eval_str=True, locals=absent)
                return signature.parameters.values()
            except NameError as error:
                if error.name is None or error.name in absent:
                    raise
                absent[error.name] = type(error.name, (Absent,), {})
    except Exception as error:
        raise ValueError(f"its annotations can't be read ({error})") from None


def members_of(annotation: Any) -> list[Any]:
    """What an annotation means, of a union each."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return members_of(annotation.__origin__)
    if origin in (typing.Union, types.UnionType):
        return [one for each in typing.get_args(annotation) for one in members_of(each)]
    return [origin or annotation]


def classes_of(members: Sequence[Any]) -> tuple[type, ...]:
    """The classes, without None; none if anything is odd."""
    classes = tuple(each for each in members if each is not types.NoneType)
    return classes if all(isinstance(each, type) for each in classes) else ()
