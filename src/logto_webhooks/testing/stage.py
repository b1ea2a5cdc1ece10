"""Where a test's application plays: the store in memory, or a connection that the test opened."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Union

from msgspec import Struct

from logto_webhooks.adapters.hosts.memory import MemoryHost
from logto_webhooks.adapters.stores.memory import MemoryStore
from logto_webhooks.adapters.stores.memory_tables import Tables
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.ports import Clock, Store
from logto_webhooks.errors import SettingInvalid

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")
Connection = Union["sa.Connection", "AsyncConnection"]


class StageHost(Protocol):
    """Runs work at once, and calls handlers within it."""

    async def run(self, work: Callable[[Store], T]) -> T:
        """Run; take it back if it raises."""

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


class Stage(Struct, frozen=True):
    """A host, and the time on its clock: `elapse` lets milliseconds pass for what waits there,
    `until_due` tells how many it is until the next is due; `check` raises SchemaMismatch."""

    host: StageHost
    elapse: Callable[[int], Awaitable[None]]
    until_due: Callable[[], Awaitable[int | None]]
    check: Callable[[], Awaitable[None]]


def in_memory(clock: Clock) -> Stage:
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

    async def until_due() -> int | None:
        pending = [each.due_at for each in tables.inbox.values() if each.state is State.PENDING]
        due = pending + [each.due_at for each in tables.jobs.lines.values()]
        return min(due) - clock.now() if due else None

    async def check() -> None:
        """There is no schema."""

    return Stage(MemoryHost(open_store), elapse, until_due, check)


def on_connection(connection: Connection, schema: str | None) -> Stage:
    """A connection that is open, and will be rolled back by who opened it.

    Raises SettingInvalid for what is none.
    """
    import sqlalchemy as sa

    from logto_webhooks.adapters.hosts.inline import InlineHost, InlineLoopHost
    from logto_webhooks.adapters.stores import elapse, migrate
    from logto_webhooks.adapters.stores.sql import SqlStore

    host: InlineHost | InlineLoopHost
    if isinstance(connection, sa.Connection):
        host = InlineHost(connection, SqlStore, schema)
    elif hasattr(connection, "run_sync") and hasattr(connection, "begin_nested"):
        host = InlineLoopHost(connection, SqlStore, schema)
    else:
        problem = f"it must be a Connection or an AsyncConnection, not {type(connection).__name__}"
        raise SettingInvalid(name="connection", problem=problem)
    return Stage(
        host,
        lambda milliseconds: host.on(lambda on: elapse.elapse(on, milliseconds)),
        lambda: host.on(elapse.until_due),
        lambda: host.on(lambda on: migrate.check(on, schema)),
    )
