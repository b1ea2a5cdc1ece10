"""What fills a column: a function of the application, or a column of the mirror.

What can't work for any record is refused when a mapping is registered.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final, Union, get_args, get_origin

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.errors import InvalidMapping

Function = Callable[[Any], Any]  # of a row of the mirror
_NUMBERS: Final = (bool, int, float, Decimal)
_TIMES: Final = (date, time, timedelta)  # a datetime is a date
# The type of a column of the mirror -> types of columns that none of its values fits.
_UNFIT: Final[dict[type, tuple[type, ...]]] = {
    str: (*_NUMBERS, *_TIMES, bytes, dict, list),
    bool: (*_TIMES, bytes, dict, list),
    # Some drivers write a time as text, which never equals the time when it is read again.
    datetime: (str, *_NUMBERS, timedelta, bytes, dict, list),
    dict: (str, *_NUMBERS, *_TIMES, bytes, list),
    tuple: (str, *_NUMBERS, *_TIMES, bytes),
}
# The same for constants. Drivers and databases convert some, such as "0.00" for a number.
_UNFIT_CONSTANTS: Final[dict[type, tuple[type, ...]]] = {
    str: (bytes, dict, list),
    bool: (*_TIMES, bytes, dict, list),
    int: (*_TIMES, bytes, dict, list),
    float: (*_TIMES, bytes, dict, list),
    datetime: (*_NUMBERS, timedelta, bytes, dict, list),
    dict: (str, *_NUMBERS, *_TIMES, bytes, list),
    list: (str, *_NUMBERS, *_TIMES, bytes),
    tuple: (str, *_NUMBERS, *_TIMES, bytes),
}
_WORDS: Final = {str: "text", bool: "true or false", datetime: "a time", tuple: "a list"}


class FileSource(Struct, frozen=True):
    """What fills a column, as a map file says it. It can be called like a function, but is none of
    the application's, so it takes no time."""


def is_function(source: Any) -> bool:
    """Whether a source or a condition is a function of the application."""
    return callable(source) and not isinstance(source, FileSource)


RAISED: Final = " raised "  # in each reason why a row isn't written because a function raised


class FunctionFailed(Exception):
    """A function of the application has no result. The message says why, without values."""


class FunctionRaised(FunctionFailed):
    """A function of the application raised. The message of its error may contain personal data."""

    def __init__(self, what: str, error: BaseException) -> None:
        super().__init__(f"{what}{RAISED}{type(error).__name__}")


def describe_raised(error: Exception) -> str:
    """Say which function of the mapping has no result, and why. The message of another error may
    contain personal data."""
    if isinstance(error, FunctionFailed):
        return str(error)
    return f"the mapping{RAISED}{type(error).__name__}"


def check_function(
    what: str, function: Any, problem: Callable[[str], InvalidMapping], returns: str = "a value"
) -> Function:
    """Return a function that tells what it is when it raises. Raises what `problem` makes if the
    database's transaction can't call it with a row."""
    if not callable(function):
        raise problem(f"{what} must be a function of the row that returns {returns}")
    call = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):
        raise problem(
            f"{what} is async, but it is called within the database's transaction: make it a plain "
            "function"
        )
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise problem(f"{what} must take one argument, the row of Logto's record") from None
    except ValueError:  # it has no signature
        pass

    def run(row: Any) -> Any:
        try:
            return function(row)
        except BaseException as error:  # it is called where nobody can be cancelled
            is_main = threading.current_thread() is threading.main_thread()
            if isinstance(error, KeyboardInterrupt) and is_main:  # Ctrl-C
                raise
            raise FunctionRaised(what, error) from error

    return run


def check_type(
    row_type: type[Struct],
    field: str,
    column: sa.Column[Any],
    problem: Callable[[str], InvalidMapping],
) -> None:
    """Raise what `problem` makes if no value of the mirror's column fits a column."""
    [of_field] = [each for each in msgspec.structs.fields(row_type) if each.name == field]
    kinds = _find_kinds(of_field.type)
    own = find_python_type(column)
    if own is None or not kinds or not all(is_unfit(kind, own) for kind in kinds):
        return
    word = _WORDS.get(kinds[0], kinds[0].__name__)
    advice = "use a function of the row"
    if kinds[0] is datetime and issubclass(own, str):
        value = f"row.{field}"
        advice += f" that formats it, such as lambda row: {value} and {value}.isoformat()"
    raise problem(
        f"{column.name} can't be filled by {field!r}, because that is {word}, and the column is "
        f"of type {column.type!r}: {advice}"
    )


def is_unfit(kind: type, own: type) -> bool:
    """Whether no value of a kind fits a column of another."""
    return any(issubclass(own, unfit) for unfit in _UNFIT.get(kind, ()))


def is_unfit_constant(value: Any, column: sa.Column[Any]) -> bool:
    """Whether a column can't hold a constant."""
    own = find_python_type(column)
    kind = next((kind for kind in type(value).__mro__ if kind in _UNFIT_CONSTANTS), None)
    return own is not None and kind is not None and issubclass(own, _UNFIT_CONSTANTS[kind])


def takes_none(column: sa.Column[Any]) -> bool:
    """Whether a column can be set to None, which a type may write as something else than null."""
    return bool(column.nullable) or isinstance(column.type, sa.TypeDecorator | sa.JSON)


def find_misfit(table: sa.Table, values: Mapping[str, Any]) -> str:
    """Say which value is of a type that its column doesn't take; "" if that isn't known."""
    for name, value in values.items():
        column = table.c[name]
        own = find_python_type(column)
        if value is None or own is None or isinstance(value, own):
            continue
        if isinstance(value, int | float | Decimal) and own in (int, float, Decimal):
            continue
        problem = f"the value of {column.name} is of type {type(value).__name__}"
        is_time_as_text = isinstance(value, date | time) and issubclass(own, str)
        advice = ": fill it with a function that formats the time" if is_time_as_text else ""
        return f"{problem}, which doesn't fit the column{advice}"
    return ""


def find_python_type(column: sa.Column[Any]) -> type | None:
    """Return the type of a column's values; None if it takes others, too."""
    if isinstance(column.type, sa.TypeDecorator | sa.JSON | sa.Enum):
        return None
    try:
        return column.type.python_type
    except NotImplementedError:
        return None


def implementation_of(column_type: Any) -> Any:
    """Return the type that an application's own type is made of."""
    while isinstance(column_type, sa.types.TypeDecorator):
        column_type = column_type.impl_instance
    return column_type


def _find_kinds(annotation: Any) -> list[type]:
    """Return the types in an annotation, without None."""
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return [kind for part in get_args(annotation) for kind in _find_kinds(part)]
    kind = get_origin(annotation) or annotation
    return [kind] if isinstance(kind, type) and kind is not types.NoneType else []
