"""Resolve the parameters of a handler, once, when it is registered."""

from __future__ import annotations

import functools
import inspect
import logging
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Final, Literal

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.errors import InvalidHandler
from logto_webhooks.events import Event, OrganizationDeleted, UserDeleted
from logto_webhooks.events.local import (
    LocalEvent,
    LocalOrganizationDeleted,
    LocalOrganizationEvent,
    LocalUserDeleted,
    LocalUserEvent,
    UserRow,
)
from logto_webhooks.jobs import Delivery
from logto_webhooks.mapping import Mappings
from logto_webhooks.mapping.declare import EntityMapping, MappedKind

LONGEST_NAME: Final = 200
_CALL_IT: Final = "choose one with name='…'"


def handler_name(function: Any, name: Any) -> str:
    """Return the name by which jobs refer to a function: the given one, or its module and name.

    Raises InvalidHandler.
    """
    if not callable(function) or isinstance(function, type):
        raise InvalidHandler(name=repr(function), problem="it isn't a function")
    own = _make_name(function) if name is None else name
    if name is None and own.endswith("<lambda>"):
        problem = f"a lambda has no name that identifies its jobs; {_CALL_IT}"
        raise InvalidHandler(name=own, problem=problem)
    if not isinstance(own, str) or not own.strip() or not own.isprintable():
        problem = "its name must be printable text"
        raise InvalidHandler(name=repr(own), problem=problem)
    if len(own) > LONGEST_NAME:
        problem = f"its name is longer than {LONGEST_NAME} characters; {_CALL_IT}"
        raise InvalidHandler(name=own, problem=problem)
    return own


def _make_name(function: Any) -> str:
    module, own = (
        getattr(function, attribute, None) for attribute in ("__module__", "__qualname__")
    )
    if module is None or own is None:
        raise InvalidHandler(name=repr(function), problem=f"it has none; {_CALL_IT}")
    return f"{module}:{own}"


def is_awaited(function: Callable[..., Any]) -> bool:
    """Whether the result of a call must be awaited. Raises ValueError for a generator, which nobody
    would run."""
    called = _unwrap(function)
    if any(
        inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        for function in called
    ):
        raise ValueError("it is a generator, so it would never run: remove the yield")
    return any(inspect.iscoroutinefunction(function) for function in called)


def module_of(function: Any) -> str | None:
    """Return the name of the module whose code a call runs."""
    return getattr(_unwrap(function)[0], "__module__", None)


def _unwrap(function: Any) -> tuple[Any, Any]:
    """Return what a call runs: the function of a partial or a staticmethod, and an object's
    `__call__`."""
    while isinstance(function, functools.partial | staticmethod):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    return function, type(function).__call__


class MissingType:
    """A type that isn't defined at runtime, such as one imported only for type checkers."""

    def __class_getitem__(cls, item: object) -> type:
        return cls


def read_parameters(function: Callable[..., Any]) -> Iterable[inspect.Parameter]:
    """Return the parameters. An undefined name becomes a MissingType of that name.

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
                absent[error.name] = type(error.name, (MissingType,), {})
    except Exception as error:
        raise ValueError(f"its annotations can't be read ({error})") from None


def union_members(annotation: Any) -> list[Any]:
    """Return the types of an annotation: all members of a union, or the type itself."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return union_members(annotation.__origin__)
    if origin in (typing.Union, types.UnionType):
        return [
            member for argument in typing.get_args(annotation) for member in union_members(argument)
        ]
    return [origin or annotation]


def annotated_classes(members: Sequence[Any]) -> tuple[type, ...]:
    """Return the classes among the types, without None; none if one isn't a class."""
    classes = tuple(member for member in members if member is not types.NoneType)
    return classes if all(isinstance(member, type) for member in classes) else ()


Kind = Literal["event", "delivery", "user", "logger", "transaction", "object"]
LOGGER: Final = logging.LoggerAdapter
# The arguments for making a Session or a subclass of it.
SESSION_ARGUMENTS: Final = ("bind", "join_transaction_mode", "expire_on_commit")
# The modules of defaults that frameworks replace before they call a function.
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
# A session type -> the corresponding one for functions of the other kind.
_COUNTERPARTS: Final = {
    "Session": "AsyncSession",
    "AsyncSession": "Session",
    "Connection": "AsyncConnection",
    "AsyncConnection": "Connection",
}
_FIX: Final = "the default (a session needs only its type), or get the value in the function"
_BY_NAME: Final[dict[str, Kind]] = {
    "event": "event",
    "delivery": "delivery",
    "user": "user",
    "logger": "logger",
}
_BY_TYPE: Final[dict[Any, Kind]] = {Delivery: "delivery", UserRow: "user", LOGGER: "logger"}


class ParameterSource(Struct, frozen=True):
    """A parameter: what fills it, and the types in its annotation; none if its name decided.

    An object of the application has the `mapping` of its class, once that is known.
    """

    name: str
    kind: Kind
    types: tuple[type, ...] = ()
    may_be_none: bool = False
    mapping: EntityMapping | None = None


class Transactions(Struct, frozen=True):
    """The session types that the database has for a handler (`here`), and for the other kind of
    function (`there`): `async def` instead of `def`, or the reverse."""

    here: Sequence[type]
    there: Sequence[type]


class Mapped(Struct, frozen=True):
    """The mapped classes. Until they are `complete`, others may be mapped later."""

    mappings: Mappings
    complete: bool = False


def resolve_parameters(
    function: Callable[..., Any],
    provided: Transactions | None,
    events: Sequence[type],
    mapped: Mapped,
) -> tuple[ParameterSource, ...]:
    """Resolve a handler's parameters. `provided` are the database's session types, None if it isn't
    known yet. `events` are the classes of the events that the handler gets.

    Raises ValueError, which says what can't be filled.
    """
    parameters = [
        source
        for parameter in read_parameters(function)
        if (source := _resolve(parameter, provided, events, mapped))
    ]
    transactions = [parameter for parameter in parameters if parameter.kind == "transaction"]
    if len(transactions) > 1:
        raise ValueError("it has parameters for two transactions, but a handler gets only one")
    for parameter in parameters:
        if parameter.kind == "object" and not any(map(_is_session, transactions)):
            raise ValueError(_ask_for_session(parameter, transactions, provided))
    return tuple(parameters)


def _resolve(
    parameter: inspect.Parameter,
    provided: Transactions | None,
    events: Sequence[type],
    mapped: Mapped,
) -> ParameterSource | None:
    """Return what fills a parameter; None if it keeps its default."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return None
    members = [] if _says_nothing(parameter) else union_members(parameter.annotation)
    classes = annotated_classes(members)
    _refuse_marker(parameter)
    kind = _find_kind(parameter, classes, provided)
    if parameter.kind is parameter.POSITIONAL_ONLY or kind is None:
        if parameter.default is not parameter.empty:
            return None
        raise ValueError(_explain(parameter, classes, provided))
    may_be_none = types.NoneType in members
    mapping = mapped.mappings.find_entity(classes[0]) if kind == "object" else None
    source = ParameterSource(parameter.name, kind, classes, may_be_none, mapping)
    if mapping is not None:
        _check_object(source, mapping, events)
    elif kind == "object" and mapped.complete:
        if parameter.default is not parameter.empty:
            return None
        problem = "isn't mapped: call map_users or map_organizations with it before the start"
        raise ValueError(f"{_describe(parameter)} can't be filled: the class {problem}")
    else:
        _check(source, events)
    return source


def _find_kind(
    parameter: inspect.Parameter, classes: Sequence[type], provided: Transactions | None
) -> Kind | None:
    if _says_nothing(parameter):
        return _BY_NAME.get(parameter.name)
    if isinstance(parameter.annotation, str):  # still a string after evaluation
        raise ValueError(f"{_describe(parameter)} is quoted twice: remove the quotes")
    if any(issubclass(annotated, MissingType) for annotated in classes):
        problem = "isn't defined at runtime: import it outside of `if TYPE_CHECKING`"
        raise ValueError(f"{_describe(parameter)} {problem}")
    if classes and all(issubclass(annotated, Event | LocalEvent) for annotated in classes):
        return "event"
    if len(classes) != 1:
        return None
    if kind := _BY_TYPE.get(classes[0]):
        return kind
    if sa.inspect(classes[0], raiseerr=False) is not None:  # a class of the application's ORM
        return "object"
    if provided is None:
        may_be = parameter.default is parameter.empty
    else:
        may_be = _is_provided(parameter, classes[0], provided.here)
    return "transaction" if may_be else None


def _is_provided(parameter: inspect.Parameter, annotated: type, provided: Sequence[type]) -> bool:
    """Whether the database has a session of that type. Raises ValueError for a subclass that can't
    be made."""
    if annotated in provided:
        return True
    if not issubclass(annotated, tuple(provided)):
        return False
    try:
        inspect.signature(annotated).bind(**dict.fromkeys(SESSION_ARGUMENTS))
    except (TypeError, ValueError):
        arguments = ", ".join(f"{argument}=…" for argument in SESSION_ARGUMENTS)
        call = f"{annotated.__name__}({arguments})"
        problem = f"can't be created by {call}: its __init__ must accept these"
        raise ValueError(f"{_describe(parameter)} {problem}") from None
    return True


def _refuse_marker(parameter: inspect.Parameter) -> None:
    """Raise ValueError for a default that only a framework understands."""
    kind = type(parameter.default)
    module = kind.__module__.partition(".")[0]
    if (
        kind.__module__ in _MARKER_MODULES
        or module in _MARKER_PACKAGES
        or kind.__name__ in _MARKERS
    ):
        problem = f"only a framework can fill it, but no framework calls handlers: remove {_FIX}"
        shown = f"{kind.__module__}.{kind.__name__}"
        raise ValueError(f"{_describe(parameter)} has a {shown} as its default; {problem}")


def _says_nothing(parameter: inspect.Parameter) -> bool:
    return parameter.annotation in (parameter.empty, Any)


def _check(source: ParameterSource, events: Sequence[type]) -> None:
    """Raise ValueError if a parameter's types don't accept all values that it can get."""
    if not source.types:
        return
    if source.kind == "event":
        for event_class in events:
            if not issubclass(event_class, source.types):
                problem = f"doesn't accept {event_class.__name__}"
                bases = (Event, LocalEvent)
                needed = [base for base in bases if any(issubclass(each, base) for each in events)]
                any_of = " | ".join(f"events.{base.__name__}" for base in needed)
                fix = f"add it to the type, or use {any_of}"
                raise ValueError(f"the parameter {source.name!r} {problem}: {fix}")
    has_row = all(issubclass(event_class, LocalUserEvent) for event_class in events)
    if source.kind == "user" and not source.may_be_none and not has_row:
        problem = "not every event has a user, so write UserRow | None"
        raise ValueError(f"the parameter {source.name!r} may be None: {problem}")


_DELETED: Final[dict[MappedKind, tuple[type, ...]]] = {
    "user": (LocalUserDeleted, UserDeleted),
    "organization": (LocalOrganizationDeleted, OrganizationDeleted),
}


def _check_object(source: ParameterSource, mapping: EntityMapping, events: Sequence[type]) -> None:
    """Raise ValueError if there is no object for events that the handler gets."""
    kind, name = mapping.kind, source.types[0].__name__
    described = f"the parameter {source.name!r} of type {name}"
    if not source.may_be_none and not all(_always_has(kind, each) for each in events):
        article = "an" if kind == "organization" else "a"
        problem = f"not every event has {article} {kind}, so write {name} | None"
        raise ValueError(f"{described} may be None: {problem}")
    deleted = [each for each in events if issubclass(each, _DELETED[kind])]
    is_only_deleted = len(deleted) == len(events)
    if mapping.when_deleted == "delete" and deleted and (is_only_deleted or not source.may_be_none):
        fix = "use the event's fields instead" if is_only_deleted else f"write {name} | None"
        problem = f'when_deleted="delete" deletes the row before {deleted[0].__name__} is handled'
        raise ValueError(f"{described} can't be filled: {problem}; {fix}")


def _always_has(kind: MappedKind, event: type) -> bool:
    """Whether each event of a class names a user, or an organization."""
    with_row = LocalUserEvent if kind == "user" else LocalOrganizationEvent
    fields = msgspec.structs.fields(event)
    return issubclass(event, with_row) or any(
        field.name == f"{kind}_id" and field.required for field in fields
    )


def _is_session(transaction: ParameterSource) -> bool:
    """Whether a transaction loads objects: a Connection doesn't."""
    return not any(
        base.__module__.startswith("sqlalchemy.") and base.__name__.endswith("Connection")
        for base in transaction.types[0].__mro__
    )


def _ask_for_session(
    source: ParameterSource,
    transactions: Sequence[ParameterSource],
    provided: Transactions | None,
) -> str:
    """Say what to write so that an object can be loaded."""
    sessions = [name for name in _list_names(provided.here if provided else ()) if "Sess" in name]
    wanted = sessions[0] if sessions else "Session"
    fix = f"add the parameter session: {wanted}"
    if transactions:
        fix = f"use {wanted} instead of {transactions[0].types[0].__name__}"
    if provided and not provided.here:
        fix = f"write `def` instead of `async def`, and {fix}"
    described = f"the parameter {source.name!r} of type {source.types[0].__name__}"
    return f"{described} is loaded in the handler's session, but there is none: {fix}"


def _explain(
    parameter: inspect.Parameter, classes: Sequence[type], provided: Transactions | None
) -> str:
    if parameter.kind is parameter.POSITIONAL_ONLY:
        return f"{_describe(parameter)} is positional-only, but must accept a keyword: remove the /"
    here = _list_names(provided.here if provided else ())
    there = _list_names(provided.there if provided else ())
    kinds = ("`def`", "`async def`")
    other = "{} instead of {}".format(*(kinds[::-1] if "AsyncSession" in there else kinds))
    for base in chain.from_iterable(each.__mro__ for each in classes if provided):
        counterpart = _COUNTERPARTS.get(base.__name__)
        if counterpart and base.__module__.startswith("sqlalchemy.") and base.__name__ not in here:
            advice = [f"use {counterpart}"] if counterpart in here else []
            if base.__name__ in there:
                advice.append(f"write {other}")
            elif not advice:
                advice.append(f"write {other}, and use {counterpart}")
            return f"{_describe(parameter)} can't be filled; {', or '.join(advice)}"
    can = ["an event", "Delivery", "UserRow | None", "a mapped class", "logging.LoggerAdapter"]
    can += here
    if provided is None:
        can.append("a session or connection of SQLAlchemy")
    elif not here:
        can.append(f"{' or '.join(there)} (but write {other})")
    names = ", ".join(_BY_NAME)
    choices = f"one of the types {', '.join(can)}, or one of the names {names}"
    return f"{_describe(parameter)} can't be filled; use {choices}"


def _list_names(types: Sequence[type]) -> list[str]:
    return [each.__name__ for each in types]


def _describe(parameter: inspect.Parameter) -> str:
    named = f"the parameter {parameter.name!r}"
    if parameter.annotation is parameter.empty:
        return named
    return f"{named} of type {getattr(parameter.annotation, '__name__', parameter.annotation)}"
