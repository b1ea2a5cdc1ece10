"""Describe what a mapping says, so that every process notices when it has changed.

Two processes of one release must describe it equally: so nothing here depends on addresses, on the
order of sets, or on the module that was started (`__main__`).
"""

from __future__ import annotations

import copyreg
import hashlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa

from logto_webhooks.errors import InvalidMapping

_MOST: Final = 100_000  # parts of a description: an object of more is no value
_PROTOCOL: Final = 4  # of pickling, whose functions tell the state of most objects


class _Indescribable(Exception):
    """An object can't be described."""


def describe_definition(parts: Mapping[str, Any], problem: Callable[[str], InvalidMapping]) -> str:
    """Return a digest of what a mapping says. Functions count by their code, and by the values that
    they were made with. Raises what `problem` makes if it contains something that another process
    can't compare."""
    described = []
    for name, part in parts.items():
        try:
            described.append(f"{name}={_Description().describe(part)}")
        except (_Indescribable, RecursionError) as error:
            what = str(error) if isinstance(error, _Indescribable) else "an object that is too deep"
            raise problem(
                f"`{name}` uses {what}, and no other process could tell whether that has changed: "
                "use plain values, or a function that finds the object in a global variable"
            ) from None
    return hashlib.sha256("; ".join(described).encode(errors="replace")).hexdigest()[:32]


class _Description:
    """Describes one part of a mapping."""

    def __init__(self) -> None:
        self._path: list[int] = []  # the objects that are being described
        self._count = 0

    def describe(self, value: Any) -> str:
        """Describe a value. Raises _Indescribable."""
        self._count += 1
        if self._count > _MOST:
            raise _Indescribable("an object that is too large")
        if value is None or type(value) in (bool, int, float, complex, str, bytes, type(...)):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, type):
            return f"class {value.__qualname__}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if id(value) in self._path:
            return f"above {self._path.index(id(value))}"
        self._path.append(id(value))
        try:
            return self._describe_object(value)
        finally:
            self._path.pop()

    def _describe_object(self, value: Any) -> str:
        if type(value) in (list, tuple):
            return f"{type(value).__name__} [{self._describe_all(value)}]"
        if type(value) in (set, frozenset):
            return f"{type(value).__name__} {sorted(map(self.describe, value))}"
        if type(value) in (dict, types.MappingProxyType):
            return f"dict {sorted(self._describe_all(pair) for pair in value.items())}"
        if isinstance(value, types.CodeType):
            return self._describe_code(value)
        if isinstance(value, types.FunctionType):
            return self._describe_function(value)
        if isinstance(value, types.MethodType):
            return f"method [{self._describe_all((value.__func__, value.__self__))}]"
        if (sql := _to_sql(value)) is not None:
            return f"SQL [{self._describe_all(sql)}]"
        if isinstance(value, types.BuiltinFunctionType):  # of a module, or a method of an object
            return f"{self.describe(value.__self__)}.{value.__name__}"
        return self._describe_state(value)

    def _describe_all(self, values: Any) -> str:
        return ", ".join(map(self.describe, values))

    def _describe_function(self, function: types.FunctionType) -> str:
        parts = [function.__code__, function.__defaults__, function.__kwdefaults__]
        cells = [_read_cell(cell) for cell in function.__closure__ or ()]
        return f"function [{self._describe_all([*parts, *cells])}]"

    def _describe_code(self, code: types.CodeType) -> str:
        constants = self._describe_all(code.co_consts)
        return f"{code.co_code.hex()} {code.co_names} {code.co_freevars} {constants}"

    def _describe_state(self, value: Any) -> str:
        """Describe an object by what it would be pickled as, and by the function that is called."""
        called = inspect.getattr_static(type(value), "__call__", None)
        wrapped = inspect.getattr_static(value, "__wrapped__", None)
        of_class = [part for part in (called, wrapped) if isinstance(part, types.FunctionType)]
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            state = reduce(value) if reduce else value.__reduce_ex__(_PROTOCOL)
            if not isinstance(state, str):
                maker, arguments, *rest = state
                made_by = maker if isinstance(maker, type) else getattr(maker, "__qualname__", "")
                state = [made_by, arguments, *map(_list_items, rest[:3])]
        except Exception:
            raise _Indescribable(f"an object of type {type(value).__qualname__}") from None
        return f"{type(value).__qualname__} [{self._describe_all([state, *of_class])}]"


class _Empty:
    """Stands for a variable that has no value yet."""


def _read_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _Empty


def _list_items(state: Any) -> Any:
    """The items that an object contains are told by an iterator."""
    return list(state) if hasattr(state, "__next__") else state


def _to_sql(value: Any) -> Sequence[Any] | None:
    """Describe a table, a column, a type or an expression of SQLAlchemy. Raises _Indescribable."""
    if hasattr(type(value), "__clause_element__"):  # an attribute of a mapped class
        value = value.__clause_element__()
    if isinstance(value, sa.Table):
        return [str(value.fullname)]
    if isinstance(value, sa.Column) and isinstance(value.table, sa.Table):
        return [str(value.table.fullname), str(value.key)]
    if isinstance(value, sa.types.TypeEngine):
        text = repr(value)
        if " at 0x" in text:
            raise _Indescribable(f"an object of type {type(value).__qualname__}")
        return [text]
    if not isinstance(value, sa.sql.ClauseElement):
        return None
    try:
        compiled = value.compile()
    except sa.exc.SQLAlchemyError:
        raise _Indescribable("SQL that only one kind of database has") from None
    return [str(compiled), dict(compiled.params)]
