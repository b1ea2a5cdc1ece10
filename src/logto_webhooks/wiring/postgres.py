"""PostgreSQL as a Database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from logto_webhooks.adapters.hosts.failures import place_of, translated
from logto_webhooks.adapters.hosts.limits import READ_S
from logto_webhooks.adapters.hosts.loop import LoopHost
from logto_webhooks.adapters.hosts.sessions import placed, translation
from logto_webhooks.adapters.hosts.thread import ThreadHost
from logto_webhooks.adapters.stores import migrate, postgres, premises
from logto_webhooks.adapters.stores.sql import SqlStore
from logto_webhooks.core.doctor.here import Premises
from logto_webhooks.core.ports import HandlerHost
from logto_webhooks.service.work import LONGEST_S

T = TypeVar("T")
CHECK_S: Final = 5.0
# What our work needs, whatever the application's engine is set to.
_LEVEL: Final[dict[str, Any]] = {"isolation_level": postgres.LEVEL}


class Postgres:
    """A PostgreSQL server, on the running event loop; migrated only by `migrate`."""

    budget_s = LONGEST_S
    any_loop = False
    files: Sequence[Path] = ()

    def __init__(self, engine: AsyncEngine, schema: str | None, owns: bool = True) -> None:
        """`owns`: whether the engine is ours to dispose of."""
        self.name = place_of(engine.url)
        self._schema = schema
        self._engine = in_schema(engine if owns else engine.execution_options(**_LEVEL), schema)
        self._host = LoopHost(self._engine, SqlStore, owns, translation(engine))
        self.host: HandlerHost = self._host

    async def open(self) -> None:
        """Raise StoreUnavailable, or SchemaMismatch if `migrate` must be run before."""
        await self.check()

    async def migrate(self) -> None:
        """Bring the schema up to this release; waits for whoever is at it."""
        with translated(self._engine):
            async with self._engine.begin() as connection:
                await connection.run_sync(migrate.upgrade, self._schema)

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless it can be used as it is."""
        await self._host.look(partial(migrate.check, schema=self._schema), CHECK_S)

    async def premises(self) -> Premises:
        """Tell of itself, whatever its schema. Raises StoreUnavailable."""
        return await self._host.look(premises.look(self.name, schema=self._schema), READ_S)

    def may_work(self) -> bool:
        """Any number of processes work on one server."""
        return True

    def migration_sql(self) -> str:
        """Return the statements that make the schema."""
        return migrate.sql("postgresql", self._schema)


class ThreadedPostgres:
    """The same on a synchronous engine, in threads."""

    budget_s = LONGEST_S
    any_loop = True
    files: Sequence[Path] = ()

    def __init__(self, engine: sa.Engine, schema: str | None) -> None:
        """The engine is the application's."""
        self.name = place_of(engine.url)
        self._schema = schema
        placing = {"schema_translate_map": placed(schema)}
        self._engine = engine.execution_options(**_LEVEL, **placing)
        self._host = ThreadHost(
            self._engine,
            SqlStore,
            reads={},
            committed=lambda: None,
            failed=lambda: None,
            stop=postgres.stop,
            owns=False,
            theirs=translation(engine),
        )
        self.host: HandlerHost = self._host

    async def open(self) -> None:
        """Raise StoreUnavailable, or SchemaMismatch if `migrate` must be run before."""
        await self.check()

    async def migrate(self) -> None:
        """Bring the schema up to this release; waits for whoever is at it."""
        await asyncio.to_thread(self._in_transaction, partial(migrate.upgrade, schema=self._schema))

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless it can be used as it is."""
        await self._host.look(partial(migrate.check, schema=self._schema), CHECK_S)

    async def premises(self) -> Premises:
        """Tell of itself, whatever its schema. Raises StoreUnavailable."""
        return await self._host.look(premises.look(self.name, schema=self._schema), READ_S)

    def may_work(self) -> bool:
        """Any number of processes work on one server."""
        return True

    def migration_sql(self) -> str:
        """Return the statements that make the schema."""
        return migrate.sql("postgresql", self._schema)

    def _in_transaction(self, work: Callable[[sa.Connection], T]) -> T:
        with translated(self._engine), self._engine.begin() as connection:
            return work(connection)


def in_schema(engine: AsyncEngine, schema: str | None) -> AsyncEngine:
    """The engine, with our tables in a schema of their own."""
    return engine.execution_options(schema_translate_map=placed(schema))
