"""The engine for PostgreSQL: any spelling of its URL, and durable commits."""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from logto_webhooks.adapters.stores.address import address_of
from logto_webhooks.core import canonical
from logto_webhooks.core.ports import SETTING

# A transaction in which what follows a lock sees what others committed before it.
LEVEL: Final = "READ COMMITTED"
CONNECT_S: Final = 3.0
CANCEL_EVERY_S: Final = 0.1
STATEMENT_S: Final = 8.0


def engine_of(url: sa.URL | str, name: str = "database_url", **pool: Any) -> AsyncEngine:
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
        },
        isolation_level=LEVEL,
        hide_parameters=True,
        json_serializer=lambda value: canonical.encode(value).decode(),
        json_deserializer=canonical.decode,
        execution_options={SETTING: name},
        **(pool or _POOL),
    )


def stop(connection: sa.Connection) -> None:
    """Close it, from any thread; a statement that runs is cancelled.

    psycopg crashes when it is closed while it sends something: its lock is waited for.
    """
    driver: Any = connection.connection.driver_connection
    lock = getattr(driver, "lock", None)
    while lock and not lock.acquire(timeout=CANCEL_EVERY_S):
        with suppress(Exception):  # what can't be cancelled ends by itself
            driver.cancel_safe(timeout=CONNECT_S)
    try:
        driver.close()
    finally:
        if lock:
            lock.release()


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
