"""Find the comparisons of a `link` function's condition that are with values which a record lacks.

SQLAlchemy makes IS NULL of `column == None`, and that would find the rows of all others who lack
the value, too. It looks like the IS NULL that a function always has, such as
`deleted_at.is_(None)`. So the function is called once more for each value that the record lacks,
with a value in its place: a column that is compared with a value then, instead of with NULL, was
compared with the missing one.
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
from logto_webhooks.mapping.sources import FunctionFailed

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


# A function may convert a value, and fails for those that it can't convert.
_EXAMPLES: Final = (
    _TEXT,
    "1",
    1,
    "00000000-0000-4000-8000-000000000001",
    "1970-01-01",
    datetime(1970, 1, 1, tzinfo=UTC),
    _AnyObject(),
)
_NULL_COMPARISONS: Final = (
    operators.is_,
    operators.is_not,
    operators.is_not_distinct_from,
    operators.is_distinct_from,
)


class CannotTell(FunctionFailed):
    """It can't be told whether a condition compares a column with a missing value."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"`link` returns a condition with IS NULL, and fails if {'.'.join(path)} has a value, "
            "so it can't be told whether it compares that: leave out the comparison if the value "
            "is missing"
        )


class MissingValues:
    """Finds the comparisons with missing values in the conditions of one `link` function."""

    def __init__(self, function: Callable[[Any], Any], call: Call) -> None:
        """`call` calls a function with several rows, and returns its results or errors."""
        self._function = function
        self._call = call
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
        return missing if isinstance(missing, Exception) else _compare_with_null(condition, missing)

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
            for path, condition in self._call_with(example, logto_id, row, left).items():
                if isinstance(condition, NotEvaluated):
                    return condition
                if not isinstance(condition, Exception):
                    left.discard(path)
                    missing |= (nulls - _count_nulls(condition)).keys() & _list_compared(condition)
        return CannotTell(min(left)) if left else frozenset(missing)

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


def _is_null(part: Any) -> bool:
    """Whether a part of a condition is a comparison with NULL that is true or false, not NULL."""
    return (
        isinstance(part, sa.BinaryExpression)
        and part.operator in _NULL_COMPARISONS
        and isinstance(part.right, sa.Null)
    )


def _count_nulls(condition: Any) -> Counter[str]:
    """Count what a condition compares with NULL."""
    return Counter(str(part.left) for part in _iterate(condition) if _is_null(part))


def _list_compared(condition: Any) -> set[str]:
    """List what a condition compares with values."""
    return {
        str(part.left)
        for part in _iterate(condition)
        if isinstance(part, sa.BinaryExpression) and not _is_null(part)
    }


def _iterate(condition: Any) -> list[Any]:
    is_sql = isinstance(condition, sa.ClauseElement)
    return list(visitors.iterate(condition)) if is_sql else []


def _compare_with_null(
    condition: sa.ColumnElement[bool], missing: frozenset[str]
) -> sa.ColumnElement[bool]:
    """Return a condition with `= NULL`, which is never true, where a missing value is compared."""

    def replace_missing(element: Any, **_: Any) -> Any:
        if not _is_null(element) or str(element.left) not in missing:
            return None
        return sa.BinaryExpression(element.left, sa.null(), operators.eq, type_=sa.Boolean())

    return visitors.replacement_traverse(condition, {}, replace_missing) if missing else condition
