"""Where a test's application plays: the store in memory, or a connection that the test opened."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeVar

from msgspec import Struct

from logto_webhooks.adapters.hosts.memory import MemoryHost
from logto_webhooks.adapters.stores.memory import MemoryStore
from logto_webhooks.adapters.stores.memory_tables import Tables
from logto_webhooks.core.lifecycle import State
from logto_webhooks.core.ports import Clock, Store
from logto_webhooks.testing import given
from logto_webhooks.testing.given import Connection

T = TypeVar("T")
_NO_CONNECTION: Final = "Give testing.app an open connection: in memory there is no transaction"
_NO_ASYNC_CONNECTION: Final = "Give testing.app an AsyncConnection if it asks for what is awaited"


class StageHost(Protocol):
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


class Stage(Struct, frozen=True):
    """A host, and the time on its clock: `elapse` lets milliseconds pass for what waits there,
    `until_due` tells how many it is until the next is due, of the jobs those of the handlers named;
    `check` raises SchemaMismatch. `more` says where handlers get what they can't have here."""

    host: StageHost
    elapse: Callable[[int], Awaitable[None]]
    until_due: Callable[[Sequence[str]], Awaitable[int | None]]
    check: Callable[[], Awaitable[None]]
    more: str = ""


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

    async def until_due(names: Sequence[str]) -> int | None:
        pending = [each.due_at for each in tables.inbox.values() if each.state is State.PENDING]
        lines = tables.jobs.lines.items()
        due = pending + [kept.due_at for (handler, _), kept in lines if handler in names]
        return min(due) - clock.now() if due else None

    async def check() -> None:
        """There is no schema."""

    return Stage(MemoryHost(open_store), elapse, until_due, check, _NO_CONNECTION)


def on_connection(connection: Connection, schema: str | None) -> Stage:
    """A connection that is open, and will be rolled back by who opened it.

    Raises SettingInvalid.
    """
    import sqlalchemy as sa

    from logto_webhooks.adapters.hosts.inline import InlineHost, InlineLoopHost
    from logto_webhooks.adapters.stores import elapse, migrate
    from logto_webhooks.adapters.stores.sql import SqlStore

    on = given.connection(connection, schema)
    host: InlineHost | InlineLoopHost
    if isinstance(on, sa.Connection):
        host, more = InlineHost(on, SqlStore, schema), _NO_ASYNC_CONNECTION
    else:
        host, more = InlineLoopHost(on, SqlStore, schema), ""
    return Stage(
        host,
        lambda milliseconds: host.on(lambda on: elapse.elapse(on, milliseconds)),
        lambda names: host.on(lambda on: elapse.until_due(on, names)),
        lambda: host.on(lambda on: migrate.check(on, schema)),
        more,
    )
