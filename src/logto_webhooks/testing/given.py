"""What a test gives, checked: each raises SettingInvalid, which says what to give instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Union

from logto_webhooks.errors import SettingInvalid
from logto_webhooks.samples.signed import Signed

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncConnection

Connection = Union["sa.Connection", "AsyncConnection"]
_LONGEST_S: Final = 1e9
_DATABASES: Final = ("sqlite", "postgresql")


def deliveries(given: Sequence[Signed | Sequence[Signed]]) -> list[Signed]:
    """All of them, in order."""
    flat: list[Any] = []
    for each in given:
        flat += each if isinstance(each, Sequence) else [each]
    odd = [type(each).__name__ for each in flat if not isinstance(each, Signed)]
    if odd or not flat:
        what = odd[0] if odd else "nothing"
        problem = f"give what testing.make makes, such as testing.make.user_created(), not {what}"
        raise SettingInvalid(name="A delivery", problem=problem)
    return flat


def seconds(given: float) -> float:
    """For how long to let time pass."""
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not is_number or not 0 <= given <= _LONGEST_S:
        problem = f"give seconds, a number from 0 to {_LONGEST_S:g}, not {given!r}"
        raise SettingInvalid(name="tick", problem=problem)
    return given


def error(given: BaseException | None) -> BaseException:
    """What a handler is made to raise."""
    if given is None:
        return RuntimeError("made to fail")
    if not isinstance(given, BaseException):
        problem = f"give an exception, such as ConnectionError('away'), not {given!r}"
        raise SettingInvalid(name="error", problem=problem)
    return given


def times(given: int) -> int:
    """How often."""
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise SettingInvalid(name="times", problem=f"give a number from 1 on, not {given!r}")
    return given


def connection(given: Connection, schema: str | None) -> Connection:
    """One that is open, of a database that can have our tables."""
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

    if not isinstance(given, Connection | AsyncConnection):
        problem = f"it must be a Connection or an AsyncConnection, not {type(given).__name__}"
        raise _unusable(f"{problem}{_INSTEAD.get(type(given).__name__, '')}")
    inner = given.sync_connection if isinstance(given, AsyncConnection) else given
    if inner is None or inner.closed:
        instead = "async with" if inner is not given else "with"
        raise _unusable(f"it isn't open; use it inside `{instead} engine.connect() as connection`")
    dialect = inner.dialect.name
    if dialect not in _DATABASES:
        raise _unusable(f"it must be of SQLite or PostgreSQL, not {dialect}")
    if schema is not None and dialect == "sqlite":
        raise _unusable(f"it is of SQLite, which has no schema {schema!r}, as logto wants")
    return given


_INSTEAD: Final = {
    "Engine": ", which engine.connect() opens",
    "AsyncEngine": ", which engine.connect() opens",
    "Session": "; give session.connection()",
    "AsyncSession": "; give await session.connection()",
}


def _unusable(problem: str) -> SettingInvalid:
    return SettingInvalid(name="connection", problem=problem)
