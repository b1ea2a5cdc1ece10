"""What a test gives, checked: each raises SettingInvalid, which says what to give instead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, Union

from msgspec import Struct

from logto_webhooks.errors import SettingInvalid
from logto_webhooks.interfaces import Clock, Store
from logto_webhooks.samples.request import SignedRequest
from logto_webhooks.states import DeliveryState
from logto_webhooks.testing.memory import MemoryHost, MemoryStore, Tables

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
_NO_CONNECTION: Final = "Give testing.app an open connection: in memory there is no transaction"
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

    host: BackendRunner
    elapse: Callable[[int], Awaitable[None]]
    until_due: Callable[[Sequence[str]], Awaitable[int | None]]
    check: Callable[[], Awaitable[None]]
    more: str = ""


def open_in_memory(clock: Clock) -> Backend:
    """The store in memory; it goes by `clock`."""
    tables = Tables()

    def open_store() -> tuple[Store, Callable[[], None]]:
        nonlocal tables
        snapshot = tables.copy()

        def undo() -> None:
            nonlocal tables
            tables = snapshot

        return MemoryStore(tables, clock), undo

    async def elapse(milliseconds: int) -> None:
        """The clock is all there is."""

    async def until_due(names: Sequence[str]) -> int | None:
        pending = [
            each.due_at for each in tables.inbox.values() if each.state is DeliveryState.PENDING
        ]
        lines = tables.jobs.lines.items()
        due = pending + [kept.due_at for (handler, _), kept in lines if handler in names]
        return min(due) - clock.now() if due else None

    async def check() -> None:
        """There is no schema."""

    return Backend(MemoryHost(open_store), elapse, until_due, check, _NO_CONNECTION)


def open_on_connection(connection: Connection, schema: str | None) -> Backend:
    """A connection that is open, and will be rolled back by who opened it.

    Raises SettingInvalid.
    """
    import sqlalchemy as sa

    from logto_webhooks.database import migrate
    from logto_webhooks.database.store import DatabaseStore
    from logto_webhooks.testing import time_travel
    from logto_webhooks.testing.transactions import AsyncSavepointRunner, SavepointRunner

    on = check_connection(connection, schema)
    host: SavepointRunner | AsyncSavepointRunner
    if isinstance(on, sa.Connection):
        host, more = SavepointRunner(on, DatabaseStore, schema), _NO_ASYNC_CONNECTION
    else:
        host, more = AsyncSavepointRunner(on, DatabaseStore, schema), ""
    return Backend(
        host,
        lambda milliseconds: host.on(lambda on: time_travel.advance_time(on, milliseconds)),
        lambda names: host.on(lambda on: time_travel.until_due(on, names)),
        lambda: host.on(lambda on: migrate.check(on, schema)),
        more,
    )
