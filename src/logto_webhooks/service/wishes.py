"""What a handler's parameters are filled with: decided once, when it is registered."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from msgspec import Struct

from logto_webhooks.core.events import Event
from logto_webhooks.core.events.local import LocalEvent, LocalUserEvent, UserRow
from logto_webhooks.core.jobs import Delivery
from logto_webhooks.service.annotations import Absent, classes_of, members_of, parameters_of

Kind = Literal["event", "delivery", "user", "logger", "transaction"]
LOGGER: Final = logging.LoggerAdapter
# What a subclass of a Session is made with.
SESSION_ARGUMENTS: Final = ("bind", "join_transaction_mode", "expire_on_commit")
# Where defaults come from that frameworks replace before they call a function.
_MARKER_MODULES: Final = {
    "fastapi.params",
    "litestar.params",
    "dependency_injector.wiring",
    "typer.models",
    "pydantic.fields",
    "ninja.params.models",
}
_MARKER_PACKAGES: Final = {"fast_depends", "faststream", "taskiq_dependencies", "injector", "ninja"}
_MARKERS: Final = {"Depends", "Security", "Dependency", "Provide", "Inject", "Injected"}
_FIX: Final = "the default (sessions are given by their type), or get the value in the function"
_BY_NAME: Final[dict[str, Kind]] = {
    "event": "event",
    "delivery": "delivery",
    "user": "user",
    "logger": "logger",
}
_BY_TYPE: Final[dict[Any, Kind]] = {Delivery: "delivery", UserRow: "user", LOGGER: "logger"}


class Wish(Struct, frozen=True):
    """One parameter: what fills it, and of which types that may be; without any, it was named."""

    name: str
    kind: Kind
    types: tuple[type, ...] = ()


def wishes_of(
    function: Callable[..., Any], provided: Sequence[type] | None, told: Sequence[type]
) -> tuple[Wish, ...]:
    """Look at a handler's parameters. `provided` are the database's transactions, None if it
    isn't known yet; `told` the classes of the events that the handler is given.

    Raises ValueError, which says what can't be filled.
    """
    wishes = [wish for each in parameters_of(function) if (wish := _wish(each, provided, told))]
    if sum(each.kind == "transaction" for each in wishes) > 1:
        raise ValueError("it asks for two transactions: a handler has one")
    return tuple(wishes)


def _wish(
    parameter: inspect.Parameter, provided: Sequence[type] | None, told: Sequence[type]
) -> Wish | None:
    """What fills a parameter; None if it keeps its default."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return None
    members = [] if _says_nothing(parameter) else members_of(parameter.annotation)
    classes = classes_of(members)
    _refuse_marker(parameter)
    kind = _kind(parameter, classes, provided)
    if parameter.kind is parameter.POSITIONAL_ONLY or kind is None:
        if parameter.default is not parameter.empty:
            return None
        raise ValueError(_cannot(parameter, provided or ()))
    wish = Wish(parameter.name, kind, classes)
    _check(wish, told, may_be_none=types.NoneType in members)
    return wish


def _kind(
    parameter: inspect.Parameter, classes: Sequence[type], provided: Sequence[type] | None
) -> Kind | None:
    if _says_nothing(parameter):
        return _BY_NAME.get(parameter.name)
    if isinstance(parameter.annotation, str):  # as all are where annotations are imported
        raise ValueError(f"{_named(parameter)} is quoted twice: leave out the quotes")
    if any(issubclass(each, Absent) for each in classes):
        problem = "isn't there when this runs: import it outside of `if TYPE_CHECKING`"
        raise ValueError(f"{_named(parameter)} {problem}")
    if classes and all(issubclass(each, Event | LocalEvent) for each in classes):
        return "event"
    if len(classes) != 1:
        return None
    if kind := _BY_TYPE.get(classes[0]):
        return kind
    if provided is None:
        may_be = parameter.default is parameter.empty
    else:
        may_be = _is_provided(parameter, classes[0], provided)
    return "transaction" if may_be else None


def _is_provided(parameter: inspect.Parameter, wanted: type, provided: Sequence[type]) -> bool:
    """Whether a transaction can be given as that. Raises ValueError for a subclass that can't be
    made."""
    if wanted in provided:
        return True
    if not issubclass(wanted, tuple(provided)):
        return False
    try:
        inspect.signature(wanted).bind(**dict.fromkeys(SESSION_ARGUMENTS))
    except (TypeError, ValueError):
        arguments = ", ".join(f"{each}=…" for each in SESSION_ARGUMENTS)
        problem = f"can't be made by {wanted.__name__}({arguments}): let its __init__ take these"
        raise ValueError(f"{_named(parameter)} {problem}") from None
    return True


def _refuse_marker(parameter: inspect.Parameter) -> None:
    """Raise ValueError for a default that means something to a framework alone."""
    kind = type(parameter.default)
    module = kind.__module__.partition(".")[0]
    if (
        kind.__module__ in _MARKER_MODULES
        or module in _MARKER_PACKAGES
        or kind.__name__ in _MARKERS
    ):
        problem = f"a framework would fill that, and no framework calls a handler: remove {_FIX}"
        shown = f"{kind.__module__}.{kind.__name__}"
        raise ValueError(f"{_named(parameter)} has a {shown} as its default; {problem}")


def _says_nothing(parameter: inspect.Parameter) -> bool:
    return parameter.annotation in (parameter.empty, Any)


def _check(wish: Wish, told: Sequence[type], may_be_none: bool) -> None:
    """Raise ValueError if the types of a parameter leave out what it will be given."""
    if not wish.types:
        return
    if wish.kind == "event":
        for each in told:
            if not issubclass(each, wish.types):
                problem = "let its type have it, too, or be events.Event"
                raise ValueError(
                    f"the parameter {wish.name!r} isn't for {each.__name__}: {problem}"
                )
    has_row = all(issubclass(each, LocalUserEvent) for each in told)
    if wish.kind == "user" and not may_be_none and not has_row:
        problem = "not every event has one here, so write UserRow | None"
        raise ValueError(f"the parameter {wish.name!r} may be None: {problem}")


def _cannot(parameter: inspect.Parameter, provided: Sequence[type]) -> str:
    if parameter.kind is parameter.POSITIONAL_ONLY:
        return f"{_named(parameter)} is positional-only, and all are given by name: remove the /"
    transactions = [each.__name__ for each in provided]
    can = ["an event", "Delivery", "UserRow | None", "logging.LoggerAdapter", *transactions]
    names = ", ".join(_BY_NAME)
    return f"{_named(parameter)} can't be filled here, only {', '.join(can)}, or by name {names}"


def _named(parameter: inspect.Parameter) -> str:
    named = f"the parameter {parameter.name!r}"
    if parameter.annotation is parameter.empty:
        return named
    return f"{named} of type {getattr(parameter.annotation, '__name__', parameter.annotation)}"
