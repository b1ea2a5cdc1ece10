"""What fills columns, as a mapping file says it: names of fields, choices and constants."""

from __future__ import annotations

import json
import math
import types
import typing
import uuid
from collections.abc import Callable, Collection, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Final, Literal

import sqlalchemy as sa
from msgspec import Struct

from logto_webhooks.events.local import OrganizationRow, UserRow
from logto_webhooks.mapping.declare_pairs import MemberRow
from logto_webhooks.mapping.sources import FileSource, find_python_type
from logto_webhooks.validation import nearest

Type = Literal["text", "boolean", "time", "JSON", "list", "any"]
Fail = Callable[[str], Exception]

_NOT: Final = "not "
_JSON_FIELDS: Final = ("profile", "custom_data", "identities")
_NAMES: Final[dict[Any, Type]] = {
    str: "text",
    bool: "boolean",
    datetime: "time",
    dict: "JSON",
    tuple: "list",
}
# Types of columns -> what fills them. Columns of other types are filled by anything.
_FITTING: Final[tuple[tuple[Any, tuple[Type, ...]], ...]] = (
    (sa.Boolean, ("boolean",)),
    (sa.Integer, ("boolean",)),
    (sa.DateTime, ("time",)),
    (sa.Date, ("time",)),
    (sa.Uuid, ("text",)),
    (sa.String, ("text",)),
    (sa.ARRAY, ("list",)),
)
_CONSTANTS: Final[tuple[tuple[Any, tuple[type, ...]], ...]] = (
    (sa.Boolean, (bool,)),
    (sa.Integer, (int,)),
    (sa.Float, (int, float)),  # before Numeric, of which it is a subclass in SQLAlchemy 2.0
    (sa.Numeric, (int, float)),
    (sa.DateTime, (datetime,)),
    (sa.Date, (date,)),
    (sa.Time, (time,)),
    (sa.Uuid, (str,)),
    (sa.String, (str,)),
    (sa.ARRAY, (list,)),
)


_BITS: Final = ((sa.SmallInteger, 16), (sa.BigInteger, 64))  # of integers, by default 32
# Types of fields -> types of the constants that they can equal.
_COMPARED: Final[dict[Type, tuple[type, ...]]] = {
    "text": (str,),
    "boolean": (bool,),
    "JSON": (dict,),
}


_FORMAT: Final = (
    ", which a file can't format: use a column for times, or map the table in Python, with a "
    "function that formats it"
)


class FieldValue(FileSource, frozen=True):
    """The value of a field, or at a path inside its JSON."""

    name: str
    path: tuple[str, ...] = ()

    def __call__(self, row: Any) -> Any:
        """Return the value; None if there is nothing at the path."""
        value = getattr(row, self.name)
        for name in self.path:
            value = value.get(name) if isinstance(value, dict) else None
        return value


class Not(FileSource, frozen=True):
    """Whether a field has no value, or is false."""

    field: FieldValue

    def __call__(self, row: Any) -> bool:
        """Negate the value."""
        return not self.field(row)


class First(FileSource, frozen=True):
    """The first of several fields that has a value."""

    fields: tuple[FieldValue, ...]

    def __call__(self, row: Any) -> Any:
        """Return the value; None if none has one."""
        values = (field(row) for field in self.fields)
        return next((value for value in values if value not in (None, "")), None)


class HasRole(FileSource, frozen=True):
    """Whether a member has a role in the organization."""

    role: str

    def __call__(self, row: MemberRow) -> bool:
        """Look for its name."""
        return self.role in row.roles


class Equals(FileSource, frozen=True):
    """Whether a field has one of some values."""

    field: FieldValue
    values: tuple[Any, ...]

    def __call__(self, row: Any) -> bool:
        """Compare them, and their types: 1 isn't true."""
        value = self.field(row)
        return any(type(value) is type(other) and value == other for other in self.values)


class Every(FileSource, frozen=True):
    """Whether all conditions hold."""

    conditions: tuple[Callable[[Any], Any], ...]

    def __call__(self, row: Any) -> bool:
        """Check them in order."""
        return all(condition(row) for condition in self.conditions)


class Choice(FileSource, frozen=True):
    """One of two constants; the second can be another choice."""

    condition: Callable[[Any], Any]
    then: Any
    otherwise: Any

    def __call__(self, row: Any) -> Any:
        """Choose."""
        if self.condition(row):
            return self.then
        return self.otherwise(row) if isinstance(self.otherwise, Choice) else self.otherwise


class AsInteger(FileSource, frozen=True):
    """A boolean as 1 or 0, for a column of integers."""

    source: Callable[[Any], Any]

    def __call__(self, row: Any) -> Any:
        """Convert only booleans."""
        value = self.source(row)
        return int(value) if isinstance(value, bool) else value


Source = FieldValue | Not | First | Choice | AsInteger


def read_source(
    value: Any, row_type: type[Struct], column: sa.Column[Any], dialect: str, fail: Fail
) -> Source:
    """Return what fills a column. Raises what `fail` makes."""
    source, type = _read_source(value, row_type, column, dialect, fail)
    fitting = next((fits for kind, fits in _FITTING if isinstance(column.type, kind)), None)
    if fitting and type != "any" and type not in fitting:
        article = "" if type == "JSON" else "a "
        advice = _FORMAT if type == "time" and isinstance(column.type, sa.String) else ""
        raise fail(
            f"{column.name} is of type {_show_type(column)}, and {_show(value)} is "
            f"{article}{type}{advice}"
        )
    return AsInteger(source) if isinstance(column.type, sa.Integer) else source


def _read_source(
    value: Any, row_type: type[Struct], column: sa.Column[Any], dialect: str, fail: Fail
) -> tuple[Source, Type]:
    if isinstance(value, str) and value.startswith(_NOT):
        return Not(_read_field(value.removeprefix(_NOT), row_type, fail)), "boolean"
    if isinstance(value, str):
        field = _read_field(value, row_type, fail)
        return field, _find_type(field, row_type)
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        fields = tuple(_read_field(name, row_type, fail) for name in value)
        types = {_find_type(field, row_type) for field in fields} - {"any"}
        return First(fields), types.pop() if len(types) == 1 else "any"
    if isinstance(value, dict):
        return _read_choice(value, row_type, column, dialect, fail), "any"
    raise fail(
        f"{column.name} is filled by a name such as {_example(row_type)}, by a list of names, or "
        f"by {_choice_example(row_type)}, not by {_show(value)}. For a constant, use "
        "create_defaults"
    )


def _read_choice(
    value: Mapping[str, Any],
    row_type: type[Struct],
    column: sa.Column[Any],
    dialect: str,
    fail: Fail,
) -> Choice:
    names = {"if", "then", "else"}
    if row_type is MemberRow and "if_role" in value:
        names = {"if_role", "then", "else"}
    if value.keys() != names:
        raise fail(f"{column.name} must look like {_choice_example(row_type)}")
    role = value.get("if_role")
    condition: Callable[[Any], Any]
    if role is None:
        condition = read_condition(value["if"], row_type, fail)
    elif isinstance(role, str) and role:
        condition = HasRole(role)
    else:
        raise fail(f"if_role must be a role's name, not {_show(role)}")
    otherwise = value["else"]
    if isinstance(otherwise, dict) and otherwise.keys() & {"if", "if_role"}:
        otherwise = _read_choice(otherwise, row_type, column, dialect, fail)
    else:
        otherwise = read_constant(otherwise, column, dialect, fail)
    return Choice(condition, read_constant(value["then"], column, dialect, fail), otherwise)


def read_condition(value: Any, row_type: type[Struct], fail: Fail) -> Callable[[Any], Any]:
    """Return a condition: a field that must have a value, "not" one, several of them, or a table of
    fields with the values that they must have. Raises what `fail` makes."""
    if isinstance(value, str):
        name = value.removeprefix(_NOT)
        field = _read_field(name, row_type, fail)
        return field if name == value else Not(field)
    if isinstance(value, list) and value:
        return Every(tuple(read_condition(part, row_type, fail) for part in value))
    if isinstance(value, dict) and value:
        return Every(
            tuple(_read_equals(name, wanted, row_type, fail) for name, wanted in value.items())
        )
    raise fail(
        f"a condition is a name such as {_example(row_type)}, which must have a value, a list of "
        f"names, or a table of names with values, not {_show(value)}"
    )


def _read_equals(name: str, wanted: Any, row_type: type[Struct], fail: Fail) -> Equals:
    field = _read_field(name, row_type, fail)
    values = tuple(wanted) if isinstance(wanted, list) else (wanted,)
    if not values:
        raise fail(f"{name} can't be one of no values")
    type = _find_type(field, row_type)
    if type == "list":
        instead = '; to compare a role, use if_role = "admin"' if name == "roles" else ""
        raise fail(f"{name} is a list, so it never equals a constant{instead}")
    for value in values:
        if not _may_equal(type, value):
            what = "a value inside JSON" if field.path else f"a {type}"
            raise fail(f"{name} is {what}, so it never equals {_show(value)}")
    return Equals(field, values)


def _may_equal(type: Type, value: Any) -> bool:
    if type == "time":
        return isinstance(value, datetime) and value.tzinfo is not None
    if type in _COMPARED:
        return isinstance(value, _COMPARED[type])
    return not isinstance(value, date | time)  # JSON has none


def read_constant(value: Any, column: sa.Column[Any], dialect: str, fail: Fail) -> Any:
    """Return a constant for a column of a database; None for `{ null = true }`. Raises what `fail`
    makes."""
    if value == {"null": True}:
        if isinstance(column.type, sa.JSON):
            raise fail(
                f"{column.name} can't be null, because it is of type {_show_type(column)}; use {{}}"
            )
        if not column.nullable or column.primary_key:
            raise fail(f"{column.name} can't be null, because it is NOT NULL")
        return None
    if isinstance(column.type, sa.ARRAY) and isinstance(value, list):
        item: sa.Column[Any] = sa.Column(f"an item of {column.name}", column.type.item_type)
        return [_read_item(part, item, dialect, fail) for part in value]
    if isinstance(column.type, sa.Integer | sa.Numeric | sa.Float) and isinstance(value, bool):
        return int(value)
    if not _fits(value, column) or not _is_in_range(value, column, dialect):
        raise fail(f"{column.name} is of type {_show_type(column)}, and can't be {_show(value)}")
    if isinstance(column.type, sa.Enum) and value not in column.type.enums:
        allowed = ", ".join(column.type.enums)
        raise fail(f"{column.name} can't be {_show(value)}; it can be one of {allowed}")
    return value


def _read_item(value: Any, column: sa.Column[Any], dialect: str, fail: Fail) -> Any:
    """Read an item of a list, which can be another list."""
    if isinstance(value, list) and not isinstance(column.type, sa.JSON):
        return [_read_item(part, column, dialect, fail) for part in value]
    return read_constant(value, column, dialect, fail)


def _fits(value: Any, column: sa.Column[Any]) -> bool:
    """Whether a constant is of a type that the column takes."""
    if isinstance(column.type, sa.JSON):
        return _is_json(value)
    types = next((types for kind, types in _CONSTANTS if isinstance(column.type, kind)), None)
    if types is None:
        own = find_python_type(column)
        return isinstance(value, own) if own else not isinstance(value, dict | list)
    if isinstance(value, bool):
        return bool in types
    if isinstance(value, datetime):
        return datetime in types  # it is a date, too
    return isinstance(value, types)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):  # dates, and numbers such as inf
        return False
    return True


def _is_in_range(value: Any, column: sa.Column[Any], dialect: str) -> bool:
    """Whether a constant isn't too large, too long or malformed for the column. SQLite has only one
    size of integers, and doesn't limit text."""
    kind, is_postgres = column.type, dialect == "postgresql"
    if isinstance(kind, sa.Uuid):
        return _is_uuid(value)
    if isinstance(value, str) and isinstance(kind, sa.String):
        # PostgreSQL cuts off spaces that are too many.
        is_short = kind.length is None or len(value.rstrip(" ")) <= kind.length
        return not is_postgres or isinstance(kind, sa.Enum) or (is_short and "\0" not in value)
    if isinstance(value, int) and isinstance(kind, sa.Integer):
        bits = next((bits for size, bits in _BITS if isinstance(kind, size)), 32)
        limit = 1 << (bits if is_postgres else 64) - 1
        return -limit <= value < limit
    if isinstance(value, int | float) and isinstance(kind, sa.Numeric | sa.Float):
        if not math.isfinite(value):
            return isinstance(kind, sa.Float) and (is_postgres or not math.isnan(value))
        is_limited = is_postgres and not isinstance(kind, sa.Float) and kind.precision is not None
        digits = (kind.precision or 0) - (kind.scale or 0)
        return not is_limited or abs(round(Decimal(str(value)), kind.scale or 0)) < 10**digits
    return True


def _is_uuid(value: str) -> bool:
    try:
        uuid.UUID(value)
    except ValueError:
        return False
    return True


def _read_field(name: Any, row_type: type[Struct], fail: Fail) -> FieldValue:
    fields = row_type.__struct_fields__
    if not isinstance(name, str):
        raise fail(f"{_show(name)} isn't a name such as {_example(row_type)}")
    field, *path = name.split(".")
    if path and field in fields and field not in _JSON_FIELDS:
        raise fail(f"there is nothing inside {field}, so it can't be {_show(name)}")
    if field not in fields or not all(path):
        known = _list_names(fields)
        raise fail(f"Logto has no {_show(name)}; {nearest(name, known)}")
    return FieldValue(field, tuple(path))


def _list_names(fields: Collection[str]) -> list[str]:
    profile = ["profile.givenName", "profile.familyName"] if "profile" in fields else []
    return [*fields, *profile]


def _find_type(field: FieldValue, row_type: type[Struct]) -> Type:
    if field.path:
        return "any"
    hint = typing.get_type_hints(row_type)[field.name]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return _NAMES[typing.get_origin(options[0]) or options[0]]


def _example(row_type: type[Struct]) -> str:
    return {UserRow: '"email"', OrganizationRow: '"name"', MemberRow: '"joined_at"'}.get(
        row_type, '"name"'
    )


def _choice_example(row_type: type[Struct]) -> str:
    if row_type is MemberRow:
        return '{ if_role = "admin", then = "admin", else = "member" }'
    return '{ if = "custom_data.paid", then = "paid", else = "free" }'


def _show(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return "a table" if isinstance(value, dict) else str(value)


def _show_type(column: sa.Column[Any]) -> str:
    if isinstance(column.type, sa.Enum):
        return column.type.name or "ENUM"
    if isinstance(column.type, sa.Uuid):
        return "UUID"
    return str(column.type)
