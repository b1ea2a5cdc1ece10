"""Find the comparisons of a `link` function's condition that are with values which a record lacks.

SQLAlchemy makes IS NULL of `column == None`, and that would find the rows of all others who lack
the value, too. It looks like the IS NULL that a function always has, such as
`deleted_at.is_(None)`. So the function is called again for each value that the record lacks, with
examples in its place: a column that is compared with a value then, instead of with NULL, was
compared with the missing one. No example can show that for each function. So where none has shown
it, only the IS NULL of a time or of true or false counts: nobody is known by these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy.sql import operators, visitors

from logto_webhooks.mapping.functions import NotEvaluated
from logto_webhooks.mapping.sources import FunctionFailed, implementation_of

Call = Callable[[Callable[[Any], Any], Mapping[str, Any]], Mapping[str, Any]]
Path = tuple[str, ...]  # of a field, or in one of its JSON documents

_TEXT: Final = "logto_webhooks"


class _AnyObject(dict[str, Any]):
    """A JSON object that has a text for each name."""

    def __init__(self) -> None:
        super().__init__({_TEXT: _TEXT})  # it isn't empty

    def __missing__(self, name: str) -> str:
        return _TEXT

    def get(self, name: str, default: Any = None) -> Any:
        """Return a text."""
        return self[name]


# A function may convert a value, and fails for those that it can't convert, or makes None of them.
_EXAMPLES: Final = (
    _TEXT,
    f"{_TEXT}@example.com",
    "1",
    1,
    "00000000-0000-4000-8000-000000000001",
    "1970-01-01",
    datetime(1970, 1, 1, tzinfo=UTC),
    _AnyObject(),
)
_EQUALS_NULL: Final = (operators.is_, operators.is_not_distinct_from)
_NULL_COMPARISONS: Final = (*_EQUALS_NULL, operators.is_not, operators.is_distinct_from)
_NOBODY_IS_KNOWN_BY: Final = (sa.Date, sa.DateTime, sa.Time, sa.Interval, sa.Boolean)


class CannotTell(FunctionFailed):
    """It can't be told whether a condition compares a column with a missing value."""


def _fails_with(path: Path) -> CannotTell:
    return CannotTell(
        f"`link` returns a condition with IS NULL, and fails if {'.'.join(path)} has a value, "
        "so it can't be told whether it compares that: leave out the comparison if the value is "
        "missing"
    )


def _is_unclear(column: str) -> CannotTell:
    return CannotTell(
        f"`link` returns a condition with {column} IS NULL, and it can't be told whether that is a "
        "comparison with a value that the record lacks: leave out such a comparison, and use "
        "sa.func.coalesce to find rows without a value"
    )


class MissingValues:
    """Finds the comparisons with missing values in the conditions of one `link` function."""

    def __init__(self, function: Callable[[Any], Any], call: Call, key: str) -> None:
        """`call` calls a function with several rows, and returns its results or errors. `key` is
        the column of Logto's id, which is NULL in each row that can be linked."""
        self._function = function
        self._call = call
        self._key = key
        # Records that lack the same values mostly get the same condition.
        self._known: dict[tuple[frozenset[Path], frozenset[str]], frozenset[str] | Exception] = {}

    def ignore(self, logto_id: str, row: Any, condition: Any) -> Any:
        """Return the condition for a record, in which comparisons with values that it lacks are
        never true; or an exception if these can't be told from others."""
        if not isinstance(condition, sa.ColumnElement) or not (nulls := _count_nulls(condition)):
            return condition
        lacking = self._list_lacking(logto_id, row)
        known = (lacking, frozenset(nulls))
        if known not in self._known:
            missing = self._find_missing(logto_id, row, nulls, lacking)
            if isinstance(missing, NotEvaluated):
                return missing
            self._known[known] = missing
        missing = self._known[known]
        if isinstance(missing, Exception):
            return missing
        unclear = _list_unclear(condition) - missing - {self._key}
        return _is_unclear(min(unclear)) if unclear else _compare_with_null(condition, missing)

    def _list_lacking(self, logto_id: str, row: Any) -> frozenset[Path]:
        """List the fields without a value, and what the function asks for in JSON documents that
        they lack."""
        lacking: set[Path] = set()
        noting = {
            name: _NotingDict(value, (name,), lacking)
            for name in row.__struct_fields__
            if isinstance(value := getattr(row, name), dict)
        }
        self._call(self._function, {logto_id: replace(row, **noting)})
        fields = {(name,) for name in row.__struct_fields__ if getattr(row, name) is None}
        return frozenset(lacking | fields)

    def _find_missing(
        self, logto_id: str, row: Any, nulls: Counter[str], lacking: frozenset[Path]
    ) -> frozenset[str] | Exception:
        """Find what is compared with NULL only because the record lacks a value."""
        missing: set[str] = set()
        left = set(lacking)
        for example in _EXAMPLES:
            for path, condition in self._call_with(example, logto_id, row, lacking).items():
                if isinstance(condition, NotEvaluated):
                    return condition
                if not isinstance(condition, Exception):
                    left.discard(path)
                    missing |= (nulls - _count_nulls(condition)).keys() & _list_compared(condition)
        return _fails_with(min(left)) if left else frozenset(missing)

    def _call_with(
        self, example: Any, logto_id: str, row: Any, paths: Collection[Path]
    ) -> dict[Path, Any]:
        """Call the function once for each path, with a row that has an example there."""
        names = {path: f"{logto_id} {path}" for path in paths}  # no other record has to wait
        rows = {names[path]: _put(row, path, example) for path in paths}
        conditions = self._call(self._function, rows)
        return {path: conditions[names[path]] for path in paths}


class _NotingDict(dict[str, Any]):
    """A JSON object that notes the paths to values that are asked for, but aren't there."""

    def __init__(self, values: dict[str, Any], path: Path, lacking: set[Path]) -> None:
        super().__init__(values)
        self._path = path
        self._lacking = lacking

    def __getitem__(self, name: str) -> Any:
        return self._note(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, and note if there is none."""
        return self._note(name, super().get(name, default))

    def __contains__(self, name: object) -> bool:
        self.get(str(name))
        return super().__contains__(name)

    def _note(self, name: str, value: Any) -> Any:
        path = (*self._path, name)
        if super().get(name) is None:
            self._lacking.add(path)
        return _NotingDict(value, path, self._lacking) if isinstance(value, dict) else value


def _put(row: Any, path: Path, value: Any) -> Any:
    """Return a row with a value at a path."""
    name, *names = path
    if names:
        value = _put_into(getattr(row, name), names, value)
    return replace(row, **{name: value})


def _put_into(document: Any, names: list[str], value: Any) -> dict[str, Any]:
    name, *others = names
    known = document if isinstance(document, dict) else {}
    return known | {name: _put_into(known.get(name), others, value) if others else value}


def _find_compared(part: Any) -> Any:
    """Return what a part of a condition compares with NULL, so that the result is true or false,
    not NULL; None if it doesn't."""
    if isinstance(part, sa.BinaryExpression) and part.operator in _NULL_COMPARISONS:
        if _is_null(part.right):
            return part.left
        if _is_null(part.left):
            return part.right
    return None


def _is_null(operand: Any) -> bool:
    is_parameter = isinstance(operand, sa.BindParameter)
    return isinstance(operand, sa.Null) or (is_parameter and operand.value is None)


def _count_nulls(condition: Any) -> Counter[str]:
    """Count what a condition compares with NULL."""
    compared = map(_find_compared, _iterate(condition))
    return Counter(str(column) for column in compared if column is not None)


def _list_compared(condition: Any) -> set[str]:
    """List what a condition compares with values."""
    return {
        str(side)
        for part in _iterate(condition)
        if isinstance(part, sa.BinaryExpression) and _find_compared(part) is None
        for side in (part.left, part.right)
    }


def _list_unclear(condition: Any) -> set[str]:
    """List what a condition finds rows by that have NULL, and by which somebody may be known."""
    parts = _iterate(condition)
    is_negated = any(
        isinstance(part, sa.Case) or getattr(part, "operator", None) is operators.inv
        for part in parts
    )
    return {
        str(column)
        for part in parts
        if (column := _find_compared(part)) is not None
        and (is_negated or part.operator in _EQUALS_NULL)
        and not isinstance(implementation_of(column.type), _NOBODY_IS_KNOWN_BY)
    }


def _iterate(condition: Any) -> list[Any]:
    is_sql = isinstance(condition, sa.ClauseElement)
    return list(visitors.iterate(condition)) if is_sql else []


def _compare_with_null(
    condition: sa.ColumnElement[bool], missing: frozenset[str]
) -> sa.ColumnElement[bool]:
    """Return a condition with `= NULL`, which is never true, where a missing value is compared."""

    def compare(part: Any) -> None:
        column = _find_compared(part)
        if str(column) in missing:
            part.left, part.operator, part.right = column, operators.eq, sa.null()

    return visitors.cloned_traverse(condition, {}, {"binary": compare}) if missing else condition
