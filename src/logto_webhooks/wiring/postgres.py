"""PostgreSQL as a Database."""

from __future__ import annotations

import sqlalchemy as sa

from logto_webhooks.adapters.hosts.failures import translated
from logto_webhooks.adapters.hosts.loop import LoopHost
from logto_webhooks.adapters.stores import migrate, postgres
from logto_webhooks.adapters.stores.sql import SqlStore
from logto_webhooks.core.ports import Host
from logto_webhooks.service.work import LONGEST_S


class Postgres:
    """A PostgreSQL server, on the running event loop; migrated only by `migrate`."""

    budget_s = LONGEST_S

    def __init__(self, url: sa.URL, schema: str | None) -> None:
        self.name = url.render_as_string(hide_password=True)
        self._schema = schema
        self._engine = postgres.engine_of(url, schema)
        self.host: Host = LoopHost(self._engine, SqlStore)

    async def open(self) -> None:
        """Raise StoreUnavailable, or SchemaMismatch if `migrate` must be run before."""
        await self.check()

    async def migrate(self) -> None:
        """Bring the schema up to this release; waits for whoever is at it."""
        with translated():
            async with self._engine.begin() as connection:
                await connection.run_sync(migrate.upgrade, self._schema)

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless it can be used as it is."""
        with translated():
            async with self._engine.connect() as connection:
                await connection.run_sync(migrate.check, self._schema)

    def may_work(self) -> bool:
        """Any number of processes work on one server."""
        return True

    def migration_sql(self) -> str:
        """Return the statements that make the schema."""
        return migrate.sql("postgresql", self._schema)
