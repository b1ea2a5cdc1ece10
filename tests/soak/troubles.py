"""What goes wrong with the database, one trouble at a time, at random."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import sqlalchemy as sa

from tests.crash.databases import PostgresVictim
from tests.soak.route import Route


class Troubles:
    """Makes trouble until `stop`; `outages` are the spans in which no statement could succeed."""

    def __init__(self, server: PostgresVictim, engine: sa.Engine, route: Route, seed: int) -> None:
        self._server = server
        self._engine = engine
        self._route = route
        self._random = random.Random(seed)
        self.counts = Counter[str]()
        self.outages: list[tuple[float, float]] = []
        self.stopping = False

    async def make(self) -> None:
        """One after the other, with some seconds of peace between them."""
        kinds: list[Callable[[], Awaitable[None]]] = [
            self.restart,
            self.crash,
            self.freeze,
            self.cut,
            self.terminate,
            self.lock_a_row,
            self.lock_the_inbox,
            self.fail_over,
            self.be_away_for_long,
        ]
        while not self.stopping:
            await asyncio.sleep(self._random.uniform(3, 12))
            trouble = self._random.choices(kinds, [4, 2, 4, 4, 4, 4, 2, 3, 1])[0]
            await trouble()
            self.counts[trouble.__name__] += 1

    async def restart(self) -> None:
        """As an upgrade of the package does."""
        began = time.monotonic()
        await asyncio.to_thread(self._server.stop)
        await asyncio.to_thread(self._server.start)
        self.outages.append((began, time.monotonic()))

    async def crash(self) -> None:
        """Without a checkpoint: it recovers from its log."""
        began = time.monotonic()
        await asyncio.to_thread(self._server.crash)
        await asyncio.to_thread(self._server.start)
        self.outages.append((began, time.monotonic()))

    async def freeze(self) -> None:
        """The route goes silent, and comes back only for new connections."""
        self._route.freeze()
        await asyncio.sleep(self._random.uniform(2, 20))
        self._route.cut()

    async def cut(self) -> None:
        """All connections are reset."""
        self._route.cut()

    async def terminate(self) -> None:
        """The server ends all its sessions."""
        await self._execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )

    async def lock_a_row(self) -> None:
        """Somebody's transaction holds a record and its mirror row."""
        await self._hold(
            self._random.uniform(1, 15),
            "SELECT * FROM logto_records ORDER BY random() LIMIT 5 FOR UPDATE",
            "SELECT * FROM logto_users ORDER BY random() LIMIT 5 FOR UPDATE",
        )

    async def lock_the_inbox(self) -> None:
        """As a careless migration does."""
        await self._hold(self._random.uniform(1, 5), "LOCK TABLE logto_deliveries")

    async def fail_over(self) -> None:
        """Refused for some seconds, then only readable for a moment, then well."""
        began = time.monotonic()
        self._route.closed = True
        self._route.cut()
        await asyncio.sleep(self._random.uniform(0.5, 4))
        await self._execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await self._execute("SELECT pg_reload_conf()")
        self._route.closed = False
        await asyncio.sleep(1)
        await self._execute("SET default_transaction_read_only = off", "ALTER SYSTEM RESET ALL")
        await self._execute("SELECT pg_reload_conf()")
        self.outages.append((began, time.monotonic()))

    async def be_away_for_long(self) -> None:
        """Longer than anybody waits: what comes now is refused with 503."""
        began = time.monotonic()
        self._route.closed = True
        self._route.cut()
        await asyncio.sleep(self._random.uniform(10, 25))
        self._route.closed = False
        self.outages.append((began, time.monotonic()))

    async def _hold(self, seconds: float, *statements: str) -> None:
        def hold() -> None:
            with self._engine.begin() as connection:
                for statement in statements:
                    connection.execute(sa.text(statement))
                time.sleep(seconds)

        await asyncio.to_thread(hold)

    async def _execute(self, *statements: str) -> None:
        def execute() -> None:
            autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")
            with autocommit.connect() as connection:
                for statement in statements:
                    connection.execute(sa.text(statement))

        await asyncio.to_thread(execute)
