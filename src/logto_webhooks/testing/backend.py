"""What a test gives, checked: each raises SettingInvalid, which says what to give instead."""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, Union

from msgspec import Struct
from msgspec.structs import replace

from logto_webhooks.database.store import Store
from logto_webhooks.errors import SettingInvalid
from logto_webhooks.samples.request import SignedRequest

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncConnection

Connection = Union["sa.Connection", "AsyncConnection"]
_LONGEST_S: Final = 1e9
_DATABASES: Final = ("sqlite", "postgresql")


def check_deliveries(
    given: Sequence[SignedRequest | Sequence[SignedRequest]],
) -> list[SignedRequest]:
    """All of them, in order."""
    flat: list[Any] = []
    for each in given:
        flat += each if isinstance(each, Sequence) else [each]
    odd = [type(each).__name__ for each in flat if not isinstance(each, SignedRequest)]
    if odd or not flat:
        what = odd[0] if odd else "nothing"
        problem = f"give what testing.make makes, such as testing.make.user_created(), not {what}"
        raise SettingInvalid(name="A delivery", problem=problem)
    return flat


def check_seconds(given: float) -> float:
    """For how long to let time pass."""
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not is_number or not 0 <= given <= _LONGEST_S:
        problem = f"give seconds, a number from 0 to {_LONGEST_S:g}, not {given!r}"
        raise SettingInvalid(name="tick", problem=problem)
    return given


def check_error(given: BaseException | None) -> BaseException:
    """What a handler is made to raise."""
    if given is None:
        return RuntimeError("made to fail")
    if not isinstance(given, BaseException):
        problem = f"give an exception, such as ConnectionError('away'), not {given!r}"
        raise SettingInvalid(name="error", problem=problem)
    return given


def check_times(given: int) -> int:
    """How often."""
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise SettingInvalid(name="times", problem=f"give a number from 1 on, not {given!r}")
    return given


def check_connection(given: Connection, schema: str | None) -> Connection:
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


T = TypeVar("T")
_NO_ASYNC_CONNECTION: Final = "Give testing.app an AsyncConnection if it asks for what is awaited"


class BackendRunner(Protocol):
    """Runs work at once, and calls handlers within it."""

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run; take it back if it raises."""

    async def accept(self, work: Callable[[Store], T], limit_s: float) -> T:
        """Run."""

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run."""

    def provides(self, awaited: bool) -> tuple[type, ...]:
        """The kinds of transaction that a handler, `awaited` or not, can ask for by annotation."""

    async def handle(
        self, wish: type, call: Callable[[Any], Any], finish: Callable[[Store], None]
    ) -> None:
        """Call with the transaction that was wished for, and let `finish` end in the same one."""

    async def close(self) -> None:
        """Nothing is held."""


class Backend(Struct, frozen=True):
    """A host, and the time on its clock: `elapse` lets milliseconds pass for what waits there,
    `until_due` tells how many it is until the next is due, of the jobs those of the handlers named;
    `check` raises SchemaMismatch. `more` says where handlers get what they can't have here."""

    connection: Connection
    host: BackendRunner
    elapse: Callable[[int], Awaitable[None]]
    until_due: Callable[[Sequence[str]], Awaitable[int | None]]
    check: Callable[[], Awaitable[None]]
    more: str = ""


def open_in_memory() -> Backend:
    """A SQLite database in memory, with our tables alone. It ends with what uses it."""
    import sqlalchemy as sa

    from logto_webhooks.database.schema import metadata_with_indexes

    # The garbage collector, which may run in any thread, closes the connection.
    any_thread = {"check_same_thread": False}
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool, connect_args=any_thread)
    connection = engine.connect()
    metadata_with_indexes().create_all(connection)
    backend = open_on_connection(connection, None)
    weakref.finalize(backend.host, _close, connection)
    return replace(backend, check=_has_schema)


async def _has_schema() -> None:
    """The tables were just created."""


def _close(connection: sa.Connection) -> None:
    connection.close()
    connection.engine.dispose()


def open_on_connection(connection: Connection, schema: str | None) -> Backend:
    """A connection that is open, and will be rolled back by who opened it.

    Raises SettingInvalid.
    """
    import sqlalchemy as sa

    from logto_webhooks.database import migrate
    from logto_webhooks.testing import time_travel
    from logto_webhooks.testing.transactions import AsyncSavepointRunner, SavepointRunner

    on = check_connection(connection, schema)
    host: SavepointRunner | AsyncSavepointRunner
    if isinstance(on, sa.Connection):
        host, more = SavepointRunner(on, schema), _NO_ASYNC_CONNECTION
    else:
        host, more = AsyncSavepointRunner(on, schema), ""
    return Backend(
        on,
        host,
        lambda milliseconds: host.on(lambda on: time_travel.advance_time(on, milliseconds)),
        lambda names: host.on(lambda on: time_travel.until_due(on, names)),
        lambda: host.on(lambda on: migrate.check(on, schema)),
        more,
    )
