"""PostgreSQL: the engine, and the Database on it."""

from __future__ import annotations

import asyncio
import importlib
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from logto_webhooks import canonical_json
from logto_webhooks.database import migrate
from logto_webhooks.database.async_runner import AsyncRunner, drop_connection
from logto_webhooks.database.errors import SETTING, place_of, translate_errors
from logto_webhooks.database.inspect import DatabaseInfo, inspect_database
from logto_webhooks.database.postgres_url import ASYNCPG, Address, address_of
from logto_webhooks.database.runner import READ_S, HandlerRunner
from logto_webhooks.database.sessions import schema_map, translation
from logto_webhooks.database.store import LONGEST_S
from logto_webhooks.database.sync_runner import ThreadRunner

# A transaction in which what follows a lock sees what others committed before it.
LEVEL: Final = "READ COMMITTED"
CONNECT_S: Final = 3.0
STATEMENT_S: Final = 8.0


def make_postgres_engine(url: sa.URL | str, name: str = "database_url", **pool: Any) -> AsyncEngine:
    """Make an engine; it connects on first use. Raises SettingInvalid with the setting's `name`.

    `postgres://…` and `postgresql://…` use asyncpg; `+asyncpg` and `+psycopg` name a driver.
    `?pgbouncer=true` is for PgBouncer in transaction mode, which hands connections around:
    nothing is prepared ahead then.
    `pool` are SQLAlchemy's options of a pool, instead of ours.
    """
    text = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    address = address_of(text, name)
    driver, pooled = address.driver, address.pooled
    settings = {} if pooled else _SETTINGS
    return create_async_engine(
        address.url,
        connect_args={
            **_OPTIONS[driver],
            **(_UNPREPARED[driver] if pooled else {}),
            **address.arguments(settings, CONNECT_S),
            **_by_hosts(address),
        },
        isolation_level=LEVEL,
        hide_parameters=True,
        json_serializer=lambda value: canonical_json.encode(value).decode(),
        json_deserializer=canonical_json.decode,
        execution_options={SETTING: name},
        **(pool or _POOL),
    )


# A worker that was paused in the middle of a transaction must not hold its locks for ever.
_IDLE: Final = "10s"
_POOL: Final[dict[str, Any]] = {"pool_size": 5, "max_overflow": 5, "pool_timeout": CONNECT_S}
# Settings of the server for our connections; the URL's own win. PgBouncer takes none.
_SETTINGS: Final[dict[str, str]] = {
    "idle_in_transaction_session_timeout": _IDLE,
    # Also where the client can't be reached any more, or has given up.
    "statement_timeout": f"{STATEMENT_S:.0f}s",
}
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "asyncpg": {"command_timeout": STATEMENT_S},
    "psycopg": {"tcp_user_timeout": int(STATEMENT_S * 1000)},
}
_UNPREPARED: Final[dict[str, dict[str, Any]]] = {
    "asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"logto_{uuid.uuid4().hex}",
    },
    "psycopg": {"prepare_threshold": None},
}


HOST_S: Final = 1.0  # for each but the last: to accept is tried for little more than two of them


def _by_hosts(address: Address) -> dict[str, Any]:
    """How several hosts are tried where one may be silent. What prefers a standby knows only after
    all of them."""
    preferred = address.parameters.get("target_session_attrs") == "prefer-standby"
    if len(address.hosts) < 2 or address.driver != ASYNCPG or preferred:
        return {}
    return {"async_creator_fn": _connect_to_one}


async def _connect_to_one(host: Sequence[str], port: Sequence[int], **arguments: Any) -> Any:
    """Connect to the first host that can be used. asyncpg itself would spend all its time on one
    that doesn't answer."""
    asyncpg: Any = importlib.import_module(ASYNCPG)
    places = list(zip(host, port, strict=True))
    for name, number in places[:-1]:
        one = {**arguments, "timeout": min(HOST_S, arguments["timeout"])}
        with suppress(
            OSError,
            asyncpg.PostgresConnectionError,
            asyncpg.CannotConnectNowError,
            asyncpg.TargetServerAttributeNotMatched,
        ):
            return await asyncpg.connect(host=name, port=number, **one)
    name, number = places[-1]
    return await asyncpg.connect(host=name, port=number, **arguments)


CHECK_S: Final = 5.0
# What our work needs, whatever the application's engine is set to.
_LEVEL: Final[dict[str, Any]] = {"isolation_level": LEVEL}


class Postgres:
    """A PostgreSQL server, on the running event loop or, with a synchronous engine, in threads;
    migrated only by `migrate`."""

    budget_s = LONGEST_S
    files: Sequence[Path] = ()

    def __init__(
        self, engine: AsyncEngine | sa.Engine, schema: str | None, owns: bool = True
    ) -> None:
        """`owns`: whether the engine is ours to dispose of."""
        self.name = place_of(engine.url)
        self.any_loop = isinstance(engine, sa.Engine)
        self._schema = schema
        theirs = translation(engine)
        options = {"schema_translate_map": schema_map(schema)} | ({} if owns else _LEVEL)
        self._engine = engine.execution_options(**options)
        self._runner = (
            ThreadRunner(self._engine, owns, theirs)
            if isinstance(self._engine, sa.Engine)
            else AsyncRunner(self._engine, owns, theirs)
        )
        self.host: HandlerRunner = self._runner

    async def open(self) -> None:
        """Raise StoreUnavailable, or SchemaMismatch if `migrate` must be run before."""
        await self.check()

    async def migrate(self) -> None:
        """Bring the schema up to this release; waits for whoever is at it."""
        engine = self._engine
        with translate_errors(engine):
            if isinstance(engine, sa.Engine):
                await asyncio.to_thread(_migrate, engine, self._schema)
                return
            async with engine.connect() as connection:
                try:
                    await connection.run_sync(migrate.upgrade, self._schema)
                    await connection.commit()
                finally:
                    await drop_connection(connection)

    async def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless it can be used as it is."""
        await self._runner.look(partial(migrate.check, schema=self._schema), CHECK_S)

    async def premises(self) -> DatabaseInfo:
        """Tell of itself, whatever its schema. Raises StoreUnavailable."""
        return await self._runner.look(inspect_database(self.name, schema=self._schema), READ_S)

    def may_work(self) -> bool:
        """Any number of processes work on one server."""
        return True

    def migration_sql(self) -> str:
        """Return the statements that make the schema."""
        return migrate.sql("postgresql", self._schema)


def _migrate(engine: sa.Engine, schema: str | None) -> None:
    with engine.begin() as connection:
        migrate.upgrade(connection, schema)
